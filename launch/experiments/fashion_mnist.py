"""Fashion-MNIST, one server and three workers: do two policies and two compressors learn alike, and at what cost?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from _page import REPOSITORY, Claim, Evidence, publish, setting

from ps_elastic import cli

NAME = "fashion_mnist"
OUT = f"runs/evidence/{NAME}"
COMMAND = (
    f"ps-elastic compare configs/{NAME}.yaml --workers 3 --policies synchronous,asynchronous "
    f"--compressors identity,top_k:ratio=0.01 --seeds 1 --out {OUT}"
)
TARGET, NEAR = 0.88, 0.01  # accuracy on the test images; how far from the baseline's counts as the same


def main() -> int:
    """Run what is not finished, and write the page; 0, 6 if a claim fails, or what `compare` ended with."""
    code = cli.main(COMMAND.split()[1:])
    if code:
        return code
    return publish(evidence(REPOSITORY / OUT))


def evidence(out: Path) -> Evidence:
    """What the finished comparison in `out` shows."""
    document = json.loads((out / "comparison.json").read_text())
    rows = document["rows"]
    title = "Fashion-MNIST: 1 server and 3 workers"
    where = setting(out / document["cells"][-1]["run_dir"])
    data = {"rows": rows, "cells": document["cells"]}
    return Evidence(NAME, title, COMMAND, where, [HEADINGS, *map(shown, rows)], claims(rows), data, NOTES)


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """The first row reaches the target, and every other one comes within a point of it or above."""
    base, *others = rows
    accuracy = base["accuracy"]["mean"]
    made = [Claim(f"{name(base)} reaches {TARGET:.0%} ({accuracy:.2%})", accuracy >= TARGET)]
    for row in others:
        difference = row["accuracy"]["mean"] - accuracy
        text = f"{name(row)} is less than a point below {name(base)} ({100 * difference:+.2f} points)"
        made.append(Claim(text, difference > -NEAR))
    return made


def name(row: dict[str, Any]) -> str:
    return f"{row['policy']} with {row['compressor']}"


NOTES = """\
**Question:** do two policies and two compressors learn equally well, and at what cost? **Answer:** the lines below
the table give the difference of each row to the first row, in points of test accuracy. **What fails:** rows that
are a point or more below; they are marked.

One run with one seed each. Time is the training time without start-up. MB up and down are payloads. The discrepancy
is the distance between the worker's copy and the server's model.
""".splitlines()

HEADINGS = [
    "policy",
    "compressor",
    "test accuracy",
    "time, s",
    "MB up",
    "MB down",
    "staleness mean / max",
    "discrepancy rms / max",
    "wait time",
]


def shown(row: dict[str, Any]) -> list[str]:
    """A row of the table, as text."""
    staleness, distance = row["staleness"], row["discrepancy"]
    return [
        row["policy"],
        row["compressor"],
        f"{row['accuracy']['mean']:.2%}",
        f"{row['wall_s']:.0f}",
        f"{row['bytes_up'] / 1e6:,.1f}",
        f"{row['bytes_down'] / 1e6:,.1f}",
        f"{staleness['mean']:.2f} / {staleness['max']:.0f}",
        f"{distance['rms']:.3g} / {distance['max']:.3g}",
        f"{row['wait_share']:.0%}",
    ]


if __name__ == "__main__":
    sys.exit(main())
