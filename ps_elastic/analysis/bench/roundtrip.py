from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from ps_elastic.analysis.bench.base import Benchmark, Row, Turns, benchmarks, row
from ps_elastic.analysis.bench.jobs import middle, round_trips_s, run_phases, wide
from ps_elastic.plugins import Range

WARM_UP = 2  # round trips of each turn that are not counted


@benchmarks.register("roundtrip")
@dataclass
class RoundTrip(Benchmark):
    """Push, apply and pull of a large model by messages, beside a bare send, SGD update and send back of as many bytes.

    Ours is one worker of a real run, from the start of its sending until the next model is loaded.
    """

    parameters: int = 10_000_000
    tensors: int = 40  # that the buckets are made of
    bucket_bytes: int = 1 << 20
    rounds: Annotated[int, Range("a number of round trips >= 1")] = 8  # of each turn
    repeats: Turns = 5  # turns; more: steadier

    def rows(self) -> Iterator[Row]:
        rounds = self.rounds + WARM_UP
        cases = (("in one piece", "whole", 1.05), ("in buckets", self.bucket_bytes, 0.9))
        plan = []
        for _ in range(self.repeats):
            plan.append(("bare", {"do": "exchange", "floats": self.parameters, "rounds": rounds}))
            for case, buckets, _ in cases:
                settings = {"tensors": self.tensors, "buckets": buckets, "transport": "messages"}
                config = wide(self.parameters, workers=1, pushes=rounds, **settings)
                plan.append((case, {"do": "train", "config": config}))
        found = run_phases(2, plan)
        bare = 1e3 * middle((turn[1] for turn in found["bare"]), WARM_UP)
        for case, _, most in cases:
            ours = 1e3 * middle((round_trips_s(turn[1]) for turn in found[case]), WARM_UP)
            name = f"{self.parameters / 1e6:g} M parameters {case}"
            yield row(name, ours, "ms", bare, "bare send, update, send", f"ratio <= {most}")
