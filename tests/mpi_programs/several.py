"""Run several command lines of ps-elastic, one after another, in one job: starting a job is what takes time.

`mpirun -n 4 python several.py HOME`. HOME/order-0.json, order-1.json and so on, awaited in turn: {folder, where to
run; plan}, or null at the end. A plan is a list of {argv, a list for all ranks or {rank: list}; chunk_bytes,
inline_bytes; least, bytes of a model whose steps are shared; apart, ranks to be treated as on other hosts; room, bytes
of shared memory}. Each rank leaves rank-N.json in the folder of the plan: a list of [exit code, stdout, stderr].
With torn, a list of configurations, in place of a plan it leaves there what torn.py does.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

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


def orders(home: Path) -> Iterator[Any]:
    for number in count():
        file = home / f"order-{number}.json"
        while not file.exists():
            time.sleep(0.05)
        order = json.loads(file.read_text())
        if order is None:
            return
        yield order


def run_all(plan: list[dict[str, Any]]) -> list[tuple[int, str, str]]:
    done = []
    for entry in plan:
        buffers.CHUNK_BYTES = entry.get("chunk_bytes", usual[0])
        endpoint.INLINE_BYTES = entry.get("inline_bytes", usual[1])
        links.LEAST_BYTES = entry.get("least", usual[3])
        host.APART = entry.get("apart", "")
        windows.free_bytes = (lambda room: lambda: room)(entry["room"]) if "room" in entry else usual[2]
        argv = entry["argv"]
        done.append(run(argv if isinstance(argv, list) else argv.get(str(rank), argv["0"])))
    buffers.CHUNK_BYTES, endpoint.INLINE_BYTES, windows.free_bytes, links.LEAST_BYTES = usual
    host.APART = ""
    return done


def look(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    import torn  # it needs more than the others, torch for one

    return torn.look(configs, Path.cwd())


rank = buffers.MPI.COMM_WORLD.Get_rank()
usual = buffers.CHUNK_BYTES, endpoint.INLINE_BYTES, windows.free_bytes, links.LEAST_BYTES
for order in orders(Path(sys.argv[1])):
    os.chdir(order["folder"])
    done = look(order["torn"]) if "torn" in order else run_all(order["plan"])
    Path("said").mkdir(exist_ok=True)
    written = Path("said", f"{rank}.json")
    written.write_text(json.dumps(done))
    written.rename(f"rank-{rank}.json")
