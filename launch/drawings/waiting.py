"""What three workers do under three policies, one of them slow: bars of simulated runs with fixed compute times."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from drawings.svg import BLUE, GREY, Drawing

from ps_elastic import simulate

POLICIES = {
    "synchronous": "synchronous",
    "stale_synchronous:bound=1": "stale_synchronous, bound 1",
    "asynchronous": "asynchronous",
}
TIMES_S = (1.0, 1.0, 3.0)  # to compute a gradient
END_S = 12.0
LEFT, SCALE, BAR, ROW = 130, 36.0, 16, 22


class Spell(NamedTuple):
    """Seconds in which a worker did one thing."""

    worker: int
    begin: float
    end: float
    computes: bool


def spells(policy: str) -> tuple[list[Spell], int]:
    """What each worker did until END_S under `policy`, and how many gradients the server had used by then.

    Nothing is computed and no message takes any time, so the simulated times are the same on every machine.
    """
    compute = {"name": "constant", "mean_s": 1.0, "speeds": [1 / seconds for seconds in TIMES_S]}
    costs = {"compute": compute, "network": {"latency_s": 0.0}}
    settings = {"task": "quadratic", "policy": policy, "train": {"samples": 60}, "simulation": costs}
    with tempfile.TemporaryDirectory() as folder:
        simulate(settings, workers=len(TIMES_S), headers_only=True, run_dir=f"{folder}/run")
        lines = (Path(folder) / "run" / "events.jsonl").read_text().splitlines()
    return _read([json.loads(line) for line in lines])


def _read(events: list[dict[str, Any]]) -> tuple[list[Spell], int]:
    found, used = [], 0
    computing, waiting = dict.fromkeys(range(1, len(TIMES_S) + 1), 0.0), {}
    for event in events:
        now = event["t_s"]
        if now > END_S:
            break
        if event["event"] == "push":
            found.append(Spell(event["worker"], computing.pop(event["worker"]), now, True))
            waiting[event["worker"]] = now
        for action in event["actions"]:
            if action[0] == "step":
                used += len(action[1])
            elif action[0] == "release":
                for worker in action[1]:
                    if now > (since := waiting.pop(worker)):
                        found.append(Spell(worker, since, now, False))
                    computing[worker] = now
    for open_ones, computes in ((computing, True), (waiting, False)):
        found += [Spell(worker, since, END_S, computes) for worker, since in open_ones.items() if since < END_S]
    return found, used


def draw() -> str:
    d = Drawing(
        640,
        344,
        "Computing and waiting under three policies",
        "Bars of three workers over 12 seconds; worker 3 is three times as slow. Under synchronous,"
        " workers 1 and 2 wait for worker 3 in every round."
        " Under stale_synchronous with bound 1 they run ahead at first and then wait."
        " Under asynchronous no worker waits.",
    )
    hatch = d.hatched("waiting", GREY)
    d.box(LEFT, 8, 26, BAR, BLUE, fill=BLUE, corner=2)
    d.text(LEFT + 34, 21, "computing a gradient", anchor="start", style=["small"])
    d.box(LEFT + 180, 8, 26, BAR, GREY, fill=hatch, corner=2)
    d.text(LEFT + 214, 21, "waiting for the server", anchor="start", style=["small"])
    top = 58.0
    for policy, name in POLICIES.items():
        found, used = spells(policy)
        d.text(LEFT, top - 8, name, anchor="start", style=["bold"])
        d.text(LEFT + SCALE * END_S, top - 8, f"{used} gradients used", anchor="end", style=["small"])
        for worker in range(1, len(TIMES_S) + 1):
            slow = " (slow)" if worker == len(TIMES_S) else ""
            d.text(LEFT - 10, top + (worker - 1) * ROW + 13, f"worker {worker}{slow}", anchor="end", style=["small"])
        for spell in sorted(found):
            x, y = LEFT + SCALE * spell.begin, top + (spell.worker - 1) * ROW
            width = SCALE * (spell.end - spell.begin) - 2  # a gap between one gradient and the next
            colour = BLUE if spell.computes else GREY
            d.box(x + 1, y, width, BAR, colour, fill=BLUE if spell.computes else hatch, corner=2)
        top += 3 * ROW + 30
    axis = top - 30 + 6
    d.line([(LEFT, axis), (LEFT + SCALE * END_S, axis)], GREY, width=1)
    for second in range(0, int(END_S) + 1, 2):
        x = LEFT + SCALE * second
        d.line([(x, axis), (x, axis + 5)], GREY, width=1)
        d.text(x, axis + 19, f"{second} s" if second in (0, END_S) else str(second), style=["small"])
    return d.svg()
