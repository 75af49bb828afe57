"""Server and workers taking turns in one process: staleness and discrepancy are what theory says."""

from __future__ import annotations

import copy
import heapq
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from helpers import Desk, Run, fit

from ps_elastic.config.load import load
from ps_elastic.config.sections import Optimizer
from ps_elastic.errors import Stalled
from ps_elastic.policies import Policy
from ps_elastic.policies.events import Action, Push, Release, Step, Wake
from ps_elastic.policies.ledger import Ledger
from ps_elastic.policies.rules.stale_synchronous import StaleSynchronous
from ps_elastic.records.tracker import Tracker
from ps_elastic.runtime import loops
from ps_elastic.runtime.build import make_parts, make_server, make_worker
from ps_elastic.transport.messages import Reply


def test_workers_take_turns_in_their_order(tmp_path: Path) -> None:
    run = fit(tmp_path, "helpers:Blobs", "policy=asynchronous", samples=48)
    assert run.column("worker") == [1, 2, 3] * 4
    assert run.column("t_s") == pytest.approx([i / 3 for i in range(1, 13)])


def test_time_is_logical_so_that_two_runs_have_the_same_log(tmp_path: Path) -> None:
    first, second = (fit(tmp_path, "helpers:Blobs", "policy=asynchronous", samples=48) for _ in range(2))
    assert first.events == second.events
    names = [path.name for path in sorted((first.directory / "metrics").iterdir())]
    assert names == [f"rank-{rank:03d}.jsonl" for rank in range(4)]
    assert (first.directory / "metrics" / names[0]).read_text() == (second.directory / "metrics" / names[0]).read_text()


@dataclass
class Patient(Policy):
    """Steps when its time has come, not when a push has."""

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        if len(ledger.held) == 1:
            yield Wake(ledger.now + 100)

    def on_wake(self, ledger: Ledger) -> Iterator[Action]:
        yield Step.mean(ledger.held)
        yield Release(tuple(ledger.waiting))


def test_when_all_wait_the_clock_jumps_to_the_wake(tmp_path: Path) -> None:
    run = fit(tmp_path, "helpers:Blobs", f"policy={__name__}:Patient", samples=36)
    assert run.column("t_s") == pytest.approx(
        [100 + 1 / 3] * 3 + [201 + 1 / 3 - 1 / 3] * 3 + [301 + 2 / 3 - 1] * 3, abs=2
    )
    assert run.summary["versions"] == 3


@dataclass
class Mute(Policy):
    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        yield from ()


def test_a_rule_that_releases_nobody_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(Stalled, match=r"workers \[1, 2, 3\] all wait; held: \(1, 1\), \(2, 1\), \(3, 1\)"):
        fit(tmp_path, "helpers:Blobs", f"policy={__name__}:Mute", samples=48)


def test_a_server_that_waits_for_nobody_cannot_hang() -> None:
    desk = Desk(StaleSynchronous(), 2)
    desk.server.start = lambda now: iter(())  # type: ignore[method-assign]
    with pytest.raises(Stalled, match="no worker has anything to do at version 0"):
        loops.take_turns(desk.server, {})


# ---- what theory says


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_round_robin_is_p_minus_1_steps_stale_after_warm_up(tmp_path: Path, workers: int) -> None:
    run = fit(tmp_path, "helpers:Blobs", "policy=asynchronous", workers=workers, samples=120)
    staleness = run.column("staleness")
    assert staleness == [min(t, workers - 1) for t in range(30)]
    assert run.summary["staleness"]["max"] == workers - 1


@pytest.mark.parametrize("task", ["helpers:Blobs", "helpers:Images"])
def test_synchronous_has_no_discrepancy_on_any_push(tmp_path: Path, task: str) -> None:
    run = fit(tmp_path, task, "policy=synchronous", "optimizer.momentum=0.9", workers=4, samples=200)
    assert run.column("discrepancy") == [0.0] * run.summary["used"]
    assert run.column("staleness") == [0] * run.summary["used"]
    assert all(run.column("discrepancy", rank, "reply") == [0.0] * 13 for rank in (1, 2, 3, 4))


@pytest.mark.parametrize("rule", ["asynchronous", "stale_synchronous:bound=1", "first_k:k=2", "helpers:Dealer"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_no_discrepancy_exceeds_the_length_of_the_path(tmp_path: Path, rule: str, optimizer: str) -> None:
    run = fit(tmp_path, "helpers:Blobs", f"policy={rule}", f"optimizer.name={optimizer}", "optimizer.lr=0.03",
              "schedule.name=cosine", "compressor=top_k:ratio=0.2", workers=4, samples=240)  # fmt: skip
    lines = run.lines(0, "used")
    assert len(lines) == 60
    assert all(line["discrepancy"] <= line["path_length"] for line in lines)
    assert any(line["discrepancy"] > 0 for line in lines) or rule.startswith("first_k")


def slope(tmp_path: Path, *overrides: str, workers: int) -> Run:
    return fit(tmp_path, "helpers:Slope", "policy=asynchronous", *overrides, workers=workers, samples=4 * workers)


def test_a_constant_gradient_at_delay_tau_is_alpha_min_t_tau_g_away(tmp_path: Path) -> None:
    """g = (3, 4), alpha = 0.1, tau = 3. Each of p = 4 pushes has share 1/4, so that 0.4 is the rate of a round."""
    run = slope(tmp_path, "optimizer.lr=0.4", workers=4)
    expected = [0.0, 0.5, 1.0] + [1.5] * 13
    assert run.column("discrepancy") == pytest.approx(expected, rel=1e-6)  # a few float32 roundings
    assert run.column("path_length") == pytest.approx(expected, rel=6e-6)  # straight; it is widened by 4e-6
    assert run.summary["B_max"] == pytest.approx(3 * 5 / 4, rel=1e-6)  # (p-1)/p ||g||


def test_a_worker_sees_the_discrepancy_that_the_server_measures(tmp_path: Path) -> None:
    """Plain SGD, one push a step, the reply built right after it: ||new model + own update - old view|| is D."""
    run = fit(tmp_path, "helpers:Blobs", "policy=asynchronous", workers=4, samples=200)
    for rank in (1, 2, 3, 4):
        lines = [line for line in run.lines(rank, "reply") if line["outcome"] == "used" and line["moved"] is not None]
        assert len(lines) >= 12
        for line in lines:
            # Adding the own update back rounds each entry once, at numbers of about 1.
            assert line["moved"] == pytest.approx(line["discrepancy"], rel=1e-4, abs=1e-6)
        assert any(line["discrepancy"] > 0 for line in lines)


def test_every_rank_logs_the_servers_number(tmp_path: Path) -> None:
    run = fit(tmp_path, "helpers:Blobs", "policy=asynchronous", workers=3, samples=120)
    server = {(line["worker"], line["step"]): line["discrepancy"] for line in run.lines(0, "used")}
    for rank in (1, 2, 3):
        for line in run.lines(rank, "reply"):
            assert line["discrepancy"] == server.get((rank, line["step"]))


@pytest.mark.parametrize("workers", [2, 4])
def test_b_rms_is_at_most_tau_m_rms_of_the_same_run(tmp_path: Path, workers: int) -> None:
    """Pathwise for a constant step size (Cauchy-Schwarz); each push moves the model by 1/p of its norm."""
    run = fit(tmp_path, "helpers:Blobs", "policy=asynchronous", workers=workers, samples=400)
    norms = run.column("payload_norm")
    m_rms = math.sqrt(sum(norm**2 for norm in norms) / len(norms))
    bound = (workers - 1) * m_rms / workers
    assert 0.1 * bound < run.summary["B_rms"] <= bound * (1 + 1e-6)
    scaled = [line["discrepancy"] / line["step_size"] for line in run.lines(0, "used")]
    assert run.summary["B_rms"] == pytest.approx(math.sqrt(sum(b * b for b in scaled) / len(scaled)), rel=1e-9)
    assert run.summary["B_max"] == max(scaled)


def test_stale_synchronous_keeps_its_two_bounds() -> None:
    """Bound 2, seconds a step 1, 1.2, 2, 5: completed clocks differ by 3 = s + 1, a view misses 8 <= (2s+1)(p-1)."""
    seconds, bound = {1: 1.0, 2: 1.2, 3: 2.0, 4: 5.0}, 2
    desk = Desk(StaleSynchronous(bound=bound), 4, optimizer=Optimizer(lr=0.01))
    order = count()
    heap = [(seconds[worker], next(order), worker) for worker in seconds]
    done: Counter[int] = Counter()
    widest, largest = 0, 0
    while len(desk.told("used")) < 400:
        now, _, worker = heapq.heappop(heap)
        done[worker] += 1
        widest = max(widest, max(done.values()) - min(done[w] for w in seconds))
        before = {w: reply.version for w, reply in desk.views.items()}
        replies: dict[int, Reply] = desk.push(worker)
        largest = max(largest, desk.told("used")[-1]["staleness"])
        assert desk.told("used")[-1]["base"] == before[worker]
        for released in replies:
            heapq.heappush(heap, (now + seconds[released], next(order), released))
    assert widest == bound + 1
    assert largest == 8 <= (2 * bound + 1) * 3


def test_a_bound_of_zero_keeps_everybody_in_step(tmp_path: Path) -> None:
    run = fit(tmp_path, "helpers:Blobs", "policy=stale_synchronous:bound=0", workers=3, samples=120)
    assert run.column("step") == [step for step in range(1, 11) for _ in range(3)]
    assert run.column("staleness") == [0, 1, 2] * 10


class Reading:
    """Reads the model where it lies: what it had to say before the model changed, and at each step."""

    def __init__(self) -> None:
        self.flushed: list[float] = []  # the model's first entry then
        self.begun: list[list[int]] = []
        self.x = np.empty(0)

    def flush(self) -> None:
        self.flushed.append(float(self.x[0]))

    def begin_step(self, workers: Sequence[int], model: np.ndarray) -> None:
        self.begun.append(list(workers))


@pytest.mark.parametrize("policy", ["asynchronous", "salf"])
def test_who_reads_the_model_where_it_lies_is_told_before_any_part_of_it_changes(policy: str) -> None:
    config = load({"task": "helpers:Slope", "policy": policy, "train": {"samples": 9}, "buckets": "layer"})
    parts, reading = make_parts(config, 1), Reading()
    server, _ = make_server(
        config, parts, 1, Tracker(0, lambda line: None), lambda line: None, background=False, readers=reading
    )
    reading.x = server.store.x.numpy()
    made = make_worker(config, parts._replace(model=copy.deepcopy(parts.model)), 1, 1, Tracker(1, lambda line: None))
    before: list[float] = []
    loops.take_turns(server, {1: made}, lambda now: before.append(float(reading.x[0])))
    assert reading.flushed == [0.0, *before[:-1]] and len(set(before)) == 9
    assert reading.begun == ([] if policy == "salf" else [[1]] * 9)  # a part alone is nobody's next model
