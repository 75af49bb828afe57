"""What the benchmarks of the message path make of what their ranks found; no rank is started."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from ps_elastic.analysis.bench import (
    Benchmark,
    Row,
    base,
    idle,
    latency,
    memory,
    rate,
    roundtrip,
    row,
    run_all,
    run_benchmark,
    scale,
    step,
)
from ps_elastic.cli import main
from ps_elastic.config.load import load
from ps_elastic.errors import ConfigError, Interrupted, PlatformError
from ps_elastic.plugins import Registry

Plan = Sequence[tuple[str, dict[str, Any]]]


class Ranks:
    """Stands in for `run_phases`: gives what `answers` has for each name, and keeps the plans."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, answers: dict[str, list[Any]]) -> None:
        self.plans: list[tuple[int, Plan]] = []
        self.variables: list[dict[str, str]] = []
        self._answers = answers
        monkeypatch.setattr(module, "run_phases", self._run)

    def _run(self, ranks: int, plan: Plan, **variables: str) -> dict[str, list[list[Any]]]:
        self.plans.append((ranks, plan))
        self.variables.append(variables)
        found: dict[str, list[list[Any]]] = {}
        for name, phase in plan:
            if "config" in phase:
                load(phase["config"])  # a user could write it
            found.setdefault(name, []).append(self._answers[name])
        return found


def by_case(text: str) -> dict[str, dict[str, Any]]:
    return {line["case"]: line for line in run_benchmark(text)["rows"]}


def evenly(step_s: float, count: int) -> dict[str, dict[str, list[float]]]:
    """The times of so many replies, after a slow start."""
    return {"replies": {"t_s": [-30.0, -20.0, -10.0, *(step_s * i for i in range(count))]}}


def test_overheads_are_counted_from_the_local_loop_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "local 10000000": [[], [9.0] * 3 + [0.010] * 2, [9.0] * 3 + [0.010] * 2],
        "ours 10000000": [{}, evenly(0.011, 3), evenly(0.013, 3)],
        "ddp 10000000": [[], [9.0] * 3 + [0.030] * 2, [9.0] * 3 + [0.030] * 2],
        "allreduce 10000000": [[], [9.0] * 3 + [0.009] * 2, [9.0] * 3 + [0.009] * 2],
    }
    Ranks(monkeypatch, step, answers)
    ddp, allreduce, whole = run_benchmark("step:sizes=[10000000]:steps=[2]:repeats=2")["rows"]
    assert (ddp["ours"], ddp["baseline"], ddp["ratio"]) == pytest.approx((2.0, 20.0, 0.1))
    assert (ddp["target"], ddp["met"]) == ("ratio <= 0.12", True)
    assert (allreduce["baseline"], allreduce["met"]) == (
        None,
        False,
    )  # faster than no exchange: nothing to compare with
    assert (whole["ours"], whole["baseline"], whole["met"]) == (pytest.approx(12.0), pytest.approx(10.0), None)


def test_each_turn_of_a_step_has_all_loops_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("local", "ours", "ddp", "allreduce")
    times = {"ours": [{}, evenly(1.0, 9), evenly(1.0, 9)]}
    answers = {f"{kind} {size}": times.get(kind, [[], [1.0] * 9, [1.0] * 9]) for kind in kinds for size in (1000, 2000)}
    ranks = Ranks(monkeypatch, step, answers)
    run_benchmark("step:sizes=[1000, 2000]:steps=[4, 4]:repeats=2:buckets=4096")
    [(count, plan)] = ranks.plans
    assert count == 3
    assert [name for name, _ in plan] == [f"{kind} {size}" for size in (1000, 2000) for _ in range(2) for kind in kinds]
    meeting_points = [phase["meeting_point"] for _, phase in plan if phase["do"] == "ddp"]
    assert len(set(meeting_points)) == 4
    assert {phase["config"]["buckets"] for _, phase in plan if "config" in phase} == {4096}


def steps(trips_s: list[float]) -> dict[str, Any]:
    """The replies of a worker whose steps took so long, besides 2 ms each of computing and encoding."""
    took = [0.003, *(trip + 0.002 for trip in trips_s)]
    own = {"compute_s": [0.0015] * len(took), "encode_s": [0.0005] * len(took)}
    return {"replies": {"t_s": [sum(took[: i + 1]) for i in range(len(took))], **own}}


def test_latency_is_told_above_the_ping_pong(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "bare": [[], [5e-6] * 3],
        "spinning": [{}, {"trips": [9.0] * 10 + [30e-6] * 3}],
        "between steps": [{}, steps([9.0] * 10 + [40e-6] * 3)],
        "asleep": [{}, steps([9.0] * 10 + [100e-6] * 3)],
    }
    Ranks(monkeypatch, latency, answers)
    rows = by_case("latency:repeats=1")
    above = {case.split(", ")[1]: line for case, line in rows.items() if case.endswith("above the ping-pong")}
    assert {case: (round(line["ours"]), line["met"]) for case, line in above.items()} == {
        "spinning": (25, True), "between steps": (35, False), "asleep": (95, True),
    }  # fmt: skip


def test_large_round_trips_go_by_messages_in_one_piece_and_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = steps([9.0, 9.0, 0.04])
    answers = {"bare": [[], [9.0, 9.0, 0.04]], "in one piece": [{}, replies], "in buckets": [{}, replies]}
    ranks = Ranks(monkeypatch, roundtrip, answers)
    one, buckets = run_benchmark("roundtrip:parameters=4000:bucket_bytes=400:repeats=1")["rows"]
    assert (one["ratio"], one["met"]) == (pytest.approx(1.0), True)
    assert (buckets["ratio"], buckets["met"]) == (pytest.approx(1.0), False)
    configs = [phase["config"] for _, phase in ranks.plans[0][1] if "config" in phase]
    assert [config["buckets"] for config in configs] == ["whole", 400]
    assert all(config["transport"] == "messages" for config in configs)


def test_the_rate_is_that_of_the_server_beside_the_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    server = [{"summary": {"pushes": 300, "wall_s": 0.01}}]
    Ranks(monkeypatch, rate, {"echo": [50_000.0], "server": server, "run": server})
    few, computing, many = run_benchmark("rate:repeats=1")["rows"]
    assert (few["ours"], few["ratio"], few["met"]) == (pytest.approx(30_000), pytest.approx(0.6), True)
    assert computing["met"] is None and many["met"] is False


def test_the_time_of_a_push_is_its_share_of_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def turn(name: str) -> list[Any]:
        return [{"looks": [[0.0, 3e-4 * i] for i in range(40)]}]

    Ranks(monkeypatch, scale, {name: turn(name) for name in ("asynchronous", "synchronous")})
    rows = run_benchmark("scale:ranks=[2, 4]:repeats=1")["rows"]
    assert [line["case"] for line in rows] == ["asynchronous, 4 ranks", "synchronous, 4 ranks"]
    for line in rows:
        assert (line["ours"], line["ratio"], line["met"]) == (pytest.approx(300), pytest.approx(1.0), True)


def test_an_idle_server_is_told_in_percent_of_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = {"looks": [[0.1 * i, 0.002 * i + (5 if 3 < i < 58 else 0)] for i in range(60)]}  # a slow start, and end
    ranks = Ranks(monkeypatch, idle, {"blocking": [0.99], "asynchronous": [looks], "synchronous": [looks]})
    first, second, *remote = run_benchmark("idle:repeats=1")["rows"]
    assert (first["ours"], first["baseline"], first["met"]) == (pytest.approx(2.0), pytest.approx(99.0), False)
    assert second["ours"] == first["ours"]
    assert ranks.variables == [{}, {"PS_ELASTIC_APART": "1,2,3"}]
    assert [(line["ours"], line["met"]) for line in remote] == [(first["ours"], None)] * 2


def test_memory_is_counted_in_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    vector = 4 * 1_000_000
    server = {"summary": {"held_max": 2, "snapshots_max": 1}, "before_bytes": vector, "peak_bytes": 8 * vector}
    worker = {"before_bytes": 0, "peak_bytes": 5 * vector}
    ranks = Ranks(monkeypatch, memory, {"tiny": [server] * 3, "large": [server, worker, worker]})
    rows = run_benchmark("memory:parameters=1000000")["rows"]
    assert [(line["ours"], line["baseline"], line["met"]) for line in rows[:2]] == [(7.0, 7.0, True), (5.0, 4.0, False)]
    policies = [plan[-1][1]["config"]["policy"] for _, plan in ranks.plans]
    assert policies == ["synchronous", "asynchronous"]  # in a job each, where nothing large was freed before


def test_all_goes_on_after_a_benchmark_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    some: Registry[Benchmark] = Registry("benchmark", "ps_elastic.analysis.bench")

    @some.register("a")
    @dataclass
    class Fails(Benchmark):
        def rows(self) -> Iterator[Row]:
            yield row("before", 1.0, "s", None, "")
            raise PlatformError("no ranks today")

    @some.register("b")
    @dataclass
    class Works(Benchmark):
        def rows(self) -> Iterator[Row]:
            yield row("after", 2.0, "s", None, "")

    monkeypatch.setattr(some, "_complete", True)
    monkeypatch.setattr(base, "benchmarks", some)
    document = run_all()
    assert [line["case"] for line in document["rows"]] == ["a: before", "b: after"]
    assert document["failed"] == {"a": "no ranks today"} and document["took_s"].keys() == {"a", "b"}
    assert main(["bench", "all"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "ps-elastic: a failed: no ranks today\n"
    lines = ["a: before: 1 s", "b: after: 2 s", "took 0 s: a 0 s, b 0 s"]
    assert captured.out.splitlines() == lines
    assert main(["bench", "all", "--json", "--check"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["rows"] == document["rows"]  # one document, and everything else on stderr
    assert captured.err.splitlines() == [*lines, "ps-elastic: a failed: no ranks today"]


def test_all_ends_when_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    some: Registry[Benchmark] = Registry("benchmark", "ps_elastic.analysis.bench")

    @some.register("a")
    @dataclass
    class Stopped(Benchmark):
        def rows(self) -> Iterator[Row]:
            raise Interrupted("Ctrl-C")
            yield

    monkeypatch.setattr(some, "_complete", True)
    monkeypatch.setattr(base, "benchmarks", some)
    with pytest.raises(Interrupted):
        run_all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step:sizes=[1000]", "steps: got .*, expected 1 numbers, one for each size"),
        ("latency:repeats=0", "repeats: got 0, expected a whole number >= 1"),
        ("rate:pushes=3", "pushes: got 3, expected a number of pushes >= that of ranks"),
        ("scale:ranks=[2]", "ranks: got .*, expected two numbers of ranks or more, each >= 2"),
        ("idle:pushes=3", "pushes: got 3, expected a number of pushes >= 4"),
        ("startup:ranks=1", "ranks: got 1, expected a number of ranks >= 2"),
        ("memory:parameters=1000", "parameters: got 1000, expected a whole number >= 1000000"),
        ("roundtrip:rounds=0", "rounds: got 0, expected a number of round trips >= 1"),
    ],
)
def test_settings_that_measure_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_benchmark(text)
