"""What a step costs on top of its own computing, one server and one worker on a core each; and what headers add."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from _page import REPOSITORY, Claim, Evidence, publish, setting

from ps_elastic.cluster.launcher import run_job
from ps_elastic.transport.wire import HEADER_BYTES

NAME, TITLE = "overheads", "A step and its own computing: Fashion-MNIST, 1 server and 1 worker"
CONFIG, OUT = "configs/fashion_mnist.yaml", Path("runs/evidence") / NAME
CASES = ("identity", "top_k:ratio=0.01")
REPEATS = 5  # in turn, so that a change of the machine's speed meets all cases
NOTES = """\
**Question:** how long does a step take, compared with its own computing? **Answer:** the column "step / compute" is
the length of a step divided by its computing time. **What fails:** nothing is claimed about times; the claim is
about the header of 112 bytes.

Each figure is the median over five runs of the median over steps. "Wait" is the time until the next model is here.
""".splitlines()
PARTS = ("compute_s", "encode_s", "send_s", "wait_s")


def main() -> int:
    """Run what is not finished, and write the page; 0, 6 if a claim fails, or the code of a run that failed."""
    runs: dict[str, list[Path]] = {case: [] for case in CASES}
    for repeat in range(REPEATS):
        for number, case in enumerate(CASES):
            folder = OUT / f"{number}-{repeat}"
            if not (folder / "summary.json").exists():
                changes = [f"compressor={case}", "train.samples=32000", "train.evaluate_every_samples=null"]
                if code := run_job(CONFIG, 2, changes, REPOSITORY / folder):
                    return code
            runs[case].append(folder)
    rows = [measured(case, folders) for case, folders in runs.items()]
    headings = ["compressor", *(f"{part[:-2]}, ms" for part in PARTS), "step / compute", "bytes of a push", "header"]
    claims = [Claim(f"the header of a bucket has {HEADER_BYTES} bytes, less than 128", HEADER_BYTES < 128)]
    table = [headings, *map(shown, rows)]
    where = setting(REPOSITORY / runs[CASES[-1]][-1])
    return publish(Evidence(NAME, TITLE, f"launch/evidence {NAME}", where, table, claims, {"rows": rows}, NOTES))


def measured(case: str, folders: list[Path]) -> dict[str, Any]:
    """The median over the runs of each part's median over the steps, in seconds; and bytes."""
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    for folder in folders:
        lines = map(json.loads, (REPOSITORY / folder / "metrics" / "rank-001.jsonl").read_text().splitlines())
        replies = [line for line in lines if line["event"] == "reply"]
        for part, values in parts.items():
            values.append(median(reply[part] for reply in replies))
    summary = json.loads((REPOSITORY / folders[0] / "summary.json").read_text())
    return {
        "compressor": case,
        **{part: median(values) for part, values in parts.items()},
        "step_over_compute": median(sum(step) / step[0] for step in zip(*parts.values(), strict=True)),
        "push_bytes": summary["bytes_up"] / summary["pushes"],
    }


def shown(row: dict[str, Any]) -> list[str]:
    parts = [f"{1e3 * row[part]:.3f}" for part in PARTS]
    header = f"{HEADER_BYTES / row['push_bytes']:.2%}"
    return [row["compressor"], *parts, f"{row['step_over_compute']:.2f}", f"{row['push_bytes']:,.0f}", header]


if __name__ == "__main__":
    sys.exit(main())
