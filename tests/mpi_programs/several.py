"""Run several command lines of ps-elastic, one after another, in one job: starting a job is what takes time.

`mpirun -n 4 python several.py PLAN FOLDER`. PLAN: a JSON list of {argv, a list for all ranks or {rank: list};
chunk_bytes, inline_bytes; least, bytes of a model whose steps are shared; apart, ranks to be treated as on other
hosts; room, bytes of shared memory}. Each rank writes FOLDER/rank-N.json: a list of [exit code, stdout, stderr].
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from ps_elastic.cli import main
from ps_elastic.transport import buffers, endpoint, host, links, windows


class Both(io.StringIO):
    """Keeps what is written and shows it too, for the case that the job ends here."""

    def write(self, text: str) -> int:
        sys.__stderr__.write(text)  # type: ignore[union-attr]
        return super().write(text)


def run(argv: list[str]) -> tuple[int, str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(Both()) as err:
        try:
            code = main(argv)
        except SystemExit as ending:
            code = int(ending.code or 0)
    return code, out.getvalue(), err.getvalue()


plan, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
rank = buffers.MPI.COMM_WORLD.Get_rank()
usual = buffers.CHUNK_BYTES, endpoint.INLINE_BYTES, windows.free_bytes, links.LEAST_BYTES
done = []
for entry in plan:
    buffers.CHUNK_BYTES = entry.get("chunk_bytes", usual[0])
    endpoint.INLINE_BYTES = entry.get("inline_bytes", usual[1])
    links.LEAST_BYTES = entry.get("least", usual[3])
    host.APART = entry.get("apart", "")
    windows.free_bytes = (lambda room: lambda: room)(entry["room"]) if "room" in entry else usual[2]
    argv = entry["argv"]
    done.append(run(argv if isinstance(argv, list) else argv.get(str(rank), argv["0"])))
(folder / f"rank-{rank}.json").write_text(json.dumps(done))
