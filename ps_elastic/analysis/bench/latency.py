from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ps_elastic.analysis.bench.base import Benchmark, Row, benchmarks, row
from ps_elastic.analysis.bench.jobs import Phase, middle, round_trips_s, run_phases, wide
from ps_elastic.plugins import Whole
from ps_elastic.transport.wire import HEADER_BYTES

WARM_UP = 10  # round trips of each turn that are not counted
ABOVE_US = {"spinning": 30, "between steps": 30, "asleep": 120}


@benchmarks.register("latency")
@dataclass
class Latency(Benchmark):
    """Push, apply and pull of a small model, and how much of it is above a bare ping-pong of as many bytes.

    Ours is one worker of a real run, from the start of its sending until the next model is loaded. spinning: it sends
    again at once; between steps: it computes, for as short as a worker can; asleep: for so long that the server sleeps.
    """

    parameters: int = 1_000
    rounds: Whole = 300  # of each turn while spinning
    asleep_rounds: Whole = 50  # of each turn from sleep
    away_s: float = 0.02  # that the worker computes, for the server to go to sleep
    repeats: Whole = 5  # turns; more: steadier

    def rows(self) -> Iterator[Row]:
        busy = wide(self.parameters, workers=1, pushes=self.rounds + WARM_UP)
        away = wide(self.parameters, workers=1, pushes=self.asleep_rounds + WARM_UP, compute_s=self.away_s)
        turn: list[tuple[str, Phase]] = [
            ("bare", {"do": "ping_pong", "nbytes": HEADER_BYTES + 4 * self.parameters, "rounds": self.rounds}),
            ("spinning", {"do": "send", "config": busy}),
            ("between steps", {"do": "train", "config": busy}),
            ("asleep", {"do": "train", "config": away}),
        ]
        found = run_phases(2, turn * self.repeats)
        bare = 1e6 * middle(turn[1] for turn in found["bare"])
        for case, most in ABOVE_US.items():
            ours = 1e6 * middle((round_trips_s(turn[1]) for turn in found[case]), WARM_UP)
            size = f"{self.parameters:,} parameters, {case}"
            yield row(f"{size}, round trip", ours, "us", bare, "bare ping-pong")
            yield row(f"{size}, above the ping-pong", ours - bare, "us", None, "", f"<= {most}")
