"""Every rule against its own constant, on the quadratic, over 20 seeds; and one with a condition broken on purpose."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timezone
from typing import Any

from _page import Claim, Evidence, publish

from ps_elastic.record import environment

NAME, TITLE = "verify", "Rules and their constants"
ALL = "verify --seeds 20 --json"
BROKEN = "verify variance_bounded --task quadratic:heterogeneity=3 --seeds 20 --json"


def main() -> int:
    """Verify every registered rule, then the broken case; 0, or 6 if a claim does not hold."""
    everything, broken = verdicts(ALL), verdicts(BROKEN)
    exceeded = [verdict["policy"] for verdict in everything if verdict["verdict"] == "exceeded"]
    claims = [
        Claim(
            f"none of {len(everything)} rules is exceeded in the conditions of its theorem {exceeded or ''}".strip(),
            not exceeded,
        ),
        Claim(f"different data for each worker: {broken[0]['reason']}", broken[0]["verdict"] == "not applicable"),
    ]
    headings = ["rule", "verdict", "B_sup", "95 %", "B_theory", "tightness", "constant, or why there is none"]
    facts = environment()
    where = {key: facts[key] for key in ("versions", "platform", "processor", "cores")}
    setting = {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}", **where, "mpi": "No MPI: virtual time"}
    command = f"ps-elastic {ALL}; ps-elastic {BROKEN}"
    table = [headings, *map(row, everything), *map(row, broken)]
    return publish(
        Evidence(
            NAME, "Rules and their constants", command, setting, table, claims, {"all": everything, "broken": broken}
        )
    )


def verdicts(command: str) -> list[dict[str, Any]]:
    """What `ps-elastic COMMAND` says of each rule; it ends with 6 where one is exceeded."""
    done = subprocess.run([sys.executable, "-m", "ps_elastic", *command.split()], stdout=subprocess.PIPE, check=False)
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return rows


def row(verdict: dict[str, Any]) -> list[str]:
    def number(key: str) -> str:
        return "-" if verdict[key] is None else f"{verdict[key]:.3g}"

    interval = f"{number('low')} to {number('high')}"
    why = verdict["reason"] or verdict["formula"]
    return [
        verdict["policy"],
        verdict["verdict"],
        number("B_sup"),
        interval,
        number("B_theory"),
        number("tightness"),
        why,
    ]


if __name__ == "__main__":
    sys.exit(main())
