from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from ps_elastic.analysis.bench.base import Benchmark, Ranks, Row, Turns, benchmarks, row
from ps_elastic.analysis.bench.jobs import Phase, run_phases, wide
from ps_elastic.cluster.environment import usable_cores
from ps_elastic.plugins import expect
from ps_elastic.transport.wire import HEADER_BYTES


@benchmarks.register("rate")
@dataclass
class Rate(Benchmark):
    """Pushes a second that the server sustains, ledger, tracker and log on, beside a bare echo server in mpi4py.

    The server is that of a real run. Its workers send the same gradient again as soon as they may, since those that
    compute would be the limit; the last row is of a run with workers that do.
    """

    few: Ranks = 4  # ranks
    many: Ranks = 16  # ranks, more than there are cores
    pushes: int = 3_000  # of each turn
    parameters: int = 16
    repeats: Turns = 5  # turns; more: steadier

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.pushes >= max(self.few, self.many), self, "pushes", "a number of pushes >= that of ranks")

    def rows(self) -> Iterator[Row]:
        for ranks, least in ((self.few, "0.333"), (self.many, "1")):
            workers = ranks - 1
            each = self.pushes // workers
            config = wide(self.parameters, workers, each)
            turn: list[tuple[str, Phase]] = [
                ("echo", {"do": "echo", "nbytes": HEADER_BYTES + 4 * self.parameters, "messages": each}),
                ("server", {"do": "send", "config": config}),
            ]
            if ranks == self.few:
                turn.append(("run", {"do": "train", "config": config}))
            found = run_phases(ranks, turn * self.repeats)
            echo = median(turn[0] for turn in found["echo"])
            case = f"{workers} workers on {usable_cores()} cores"
            server = _pushes_per_s(found["server"])
            yield row(f"{case}, what the server sustains", server, "pushes/s", echo, "bare echo", f"ratio >= {least}")
            if "run" in found:
                yield row(f"{case}, workers that compute", _pushes_per_s(found["run"]), "pushes/s", echo, "bare echo")


def _pushes_per_s(turns: list[list[dict[str, dict[str, float]]]]) -> float:
    summaries = [turn[0]["summary"] for turn in turns]
    return median(summary["pushes"] / summary["wall_s"] for summary in summaries)
