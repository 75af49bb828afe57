"""Every registered policy against its own constant: quadratics, Fashion-MNIST, and conditions broken on purpose."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timezone
from typing import Any, NamedTuple

from _page import REPOSITORY, Claim, Evidence, publish

from ps_elastic.records.writer import environment

NAME, TITLE = "verify", "Policies and their constants"
OUT = f"runs/evidence/{NAME}"
UNEQUAL, UNPAID = "equal data on all workers", "every late push is repaid"


class Part(NamedTuple):
    """Policies to be verified on one task; broken: the condition that does not hold, on purpose."""

    task: str
    arguments: str  # of `ps-elastic verify`
    broken: str | None = None


PARTS = {
    "quadratic": Part("quadratic", "--seeds 20"),
    "fashion_mnist": Part("Fashion-MNIST", "--task fashion_mnist --seeds 5"),
    "unequal_data": Part(
        "quadratic, different data", "variance_bounded --task quadratic:heterogeneity=3 --seeds 20", UNEQUAL
    ),
    "lost_push": Part(
        "quadratic, lost pushes",
        "norm_bounded variance_bounded --config launch/experiments/lost_push.yaml --seeds 20",
        UNPAID,
    ),
}
HEADINGS = [
    "task",
    "policy",
    "verdict",
    "B_sup",
    "95 %",
    "B_theory",
    "tightness",
    "pushes",
    "constant, or why there is none",
]
NOTES = """\
**Question:** does each policy keep the constant B that its theory gives it? **Answer:** the lines below the table
tell it for each task. **What fails:** a policy that is `exceeded`. The last rows break a condition on purpose, and
the verdict must name it.

- B_sup = max over t of sqrt(mean over seeds of (D_t/alpha)^2), with a 95 % interval by the bootstrap over seeds.
- The tightness is B_sup/B_theory. Small values mean that the bound allows much more than happened.
- The column "pushes" counts the gradients used in each run. M and sigma in B_theory come from other seeds.
- D is measured to each policy's own x_t. [Elastic consistency](../explanation/elastic_consistency.md#which-x) says
  which one that is.
- The words of the verdicts are `identity` (exact), `within` (below bound), `exceeded` (above bound) and
  `not applicable` (conditions not met). [Theory](../explanation/theory.md#verifying-a-policy) explains them.
- Nobody knows L of the Fashion-MNIST network. So nobody knows whether alpha <= 1/(6L) holds there.
""".splitlines()


def main() -> int:
    """Verify what is not verified yet, and write the page; 0, or 6 if a claim does not hold."""
    return publish(evidence({name: verdicts(part, name) for name, part in PARTS.items()}))


def command(part: Part, name: str) -> str:
    return f"ps-elastic verify {part.arguments} --keep {OUT}/{name} --json"


def verdicts(part: Part, name: str) -> list[dict[str, Any]]:
    """What the command says of each policy. It ends with 6 if one is above its bound; any other failure is raised."""
    arguments = command(part, name).split()[1:]
    done = subprocess.run(
        [sys.executable, "-m", "ps_elastic", *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE, check=False
    )
    if done.returncode not in (0, 6):
        raise SystemExit(done.returncode)
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return rows


def evidence(found: dict[str, list[dict[str, Any]]]) -> Evidence:
    facts = environment()
    where = {key: facts[key] for key in ("versions", "platform", "processor", "cores")}
    setting = {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}", **where, "mpi": "No MPI: simulated time"}
    commands = "\n".join(command(part, name) for name, part in PARTS.items())
    table = [HEADINGS, *(row(PARTS[name].task, verdict) for name, rows in found.items() for verdict in rows)]
    return Evidence(NAME, TITLE, commands, setting, table, claims(found), found, NOTES)


def claims(found: dict[str, list[dict[str, Any]]]) -> list[Claim]:
    made = []
    for name, rows in found.items():
        task, _, broken = PARTS[name]
        if broken is None:
            exceeded = [verdict["policy"] for verdict in rows if verdict["verdict"] == "exceeded"]
            text = f"{task}: none of {len(rows)} policies is `exceeded`, that is above its bound"
            made.append(Claim(f"{text} {exceeded or ''}".strip(), not exceeded))
            continue
        for verdict in rows:
            said = verdict["verdict"] == "not applicable" and broken in verdict["reason"]
            made.append(Claim(f"{task}: the verdict on {verdict['policy']} names what is broken: {broken}", said))
    return made


def row(task: str, verdict: dict[str, Any]) -> list[str]:
    def number(key: str) -> str:
        return "-" if verdict[key] is None else f"{verdict[key]:.3g}"

    interval = "-" if verdict["low"] is None else f"{number('low')} to {number('high')}"
    why = verdict["reason"] or verdict["formula"]
    sup, theory, tightness = map(number, ("B_sup", "B_theory", "tightness"))
    return [task, verdict["policy"], verdict["verdict"], sup, interval, theory, tightness, str(verdict["pushes"]), why]


if __name__ == "__main__":
    sys.exit(main())
