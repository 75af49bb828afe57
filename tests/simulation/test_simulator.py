from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Run, fit
from safetensors.numpy import load_file

from ps_elastic.analysis.replay.decisions import replay_decisions
from ps_elastic.cli import main
from ps_elastic.config.load import load
from ps_elastic.errors import CHECK_FAILED, ConfigError, Stalled, WorkersLost
from ps_elastic.policies import Policy, policies
from ps_elastic.policies.events import Action, Drop, Push, Release, Wake
from ps_elastic.policies.ledger import Ledger
from ps_elastic.records.tracker import Pages
from ps_elastic.simulation.simulate import simulate

QUIET = "simulation.network.latency_s=0"  # so that times are whole numbers
FAULTS = {
    "lost_push": {"chance": 0.05},
    "lost_reply": {"chance": 0.05},
    "duplicate": {"chance": 0.1},
    "delay": [{"chance": 0.1, "delay_s": 0.3}, {"chance": 0.1, "delay_s": 0.3, "of": "reply"}],
    "slow": {"workers": 1, "factor": 4},
    "pause": {"workers": 3, "at_s": 0.5, "for_s": 1},
    "crash": {"workers": 2, "at_s": 1, "noticed_s": 0.2},
    "leave": {"workers": 4, "at_s": 2},
    "join": [{"workers": 2, "at_s": 2}, {"workers": 6, "at_s": 1.5}],
}


def run(
    folder: Path, source: str | Mapping[str, Any], *overrides: str, workers: int = 3, samples: int = 60, **more: Any
) -> Run:
    """A simulated run; the decisions of every run made here are replayed and must be the same."""
    config = {"task": source} if isinstance(source, str) else source
    directory = folder / f"sim-{len(list(folder.iterdir()))}"
    summary = simulate(config, [f"train.samples={samples}", *overrides], workers=workers, run_dir=directory, **more)
    policy = load(directory / "config.yaml", simulated=True).policy.build()
    events = (directory / "events.jsonl").read_text().splitlines()
    replayed = replay_decisions(policy, events, range(1, workers + 1))
    assert replayed.match, replayed.first_mismatch
    return Run(directory, summary)


def told(made: Run, *events: str) -> list[dict[str, Any]]:
    lines = map(json.loads, made.events)
    return [line for line in lines if not events or line["event"] in events]


def arrivals(made: Run) -> list[tuple[float, int, int]]:
    return [(line["t_s"], line["worker"], line["step"]) for line in told(made, "push")]


# ---- the same as a real run


@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("quadratic", []),
        ("quadratic", ["optimizer.momentum=0.9", "simulation.compute.straggler_share=0.4"]),
        ("helpers:Blobs", ["compressor=top_k:ratio=0.1", "buckets=layer", "schedule=cosine"]),
        ("helpers:Images", ["update.accumulate=2"]),
        ("helpers:Dropout", ["optimizer=adam", "seed=5"]),
        ("helpers:Blobs", ["train.evaluate_every_samples=12", "train.stop_at=loss<=1.0"]),
    ],
)
def test_a_synchronous_run_gives_the_parameters_of_train(tmp_path: Path, task: str, overrides: list[str]) -> None:
    real = fit(tmp_path, task, *overrides, samples=60)
    simulated = run(tmp_path, task, *overrides, "simulation.compute.name=pareto")
    assert simulated.summary["parameters_sha256"] == real.summary["parameters_sha256"]
    assert simulated.summary["metrics"] == real.summary["metrics"]
    assert simulated.summary["samples"] == real.summary["samples"]


def test_digits_too(tmp_path: Path) -> None:
    source = str(Path(__file__).resolve().parents[2] / "configs" / "digits.yaml")
    real = fit(tmp_path, load(source).to_dict(), samples=960)
    simulated = run(tmp_path, load(source).to_dict(), "simulation.compute.name=exponential", samples=960)
    assert simulated.summary["parameters_sha256"] == real.summary["parameters_sha256"]


def test_equal_workers_in_turn_are_those_of_one_process(tmp_path: Path) -> None:
    """The numbers that a worker observes itself too: every worker computes as if alone, though all share memory."""
    real = fit(tmp_path, "helpers:Images", "policy=asynchronous", samples=60)
    simulated = run(tmp_path, "helpers:Images", "policy=asynchronous")
    assert simulated.summary["parameters_sha256"] == real.summary["parameters_sha256"]
    for rank in (1, 2, 3):
        for column in ("step", "version", "discrepancy", "moved", "residual_norm"):
            ours, theirs = simulated.column(column, rank, "reply"), real.column(column, rank, "reply")
            assert ours[:5] == theirs[:5]
    ours, theirs = (load_file(made.directory / "model.safetensors") for made in (simulated, real))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)  # running statistics among them


# ---- one seed, one log


def logs(made: Run) -> dict[str, str]:
    files = [made.directory / "events.jsonl", *sorted((made.directory / "metrics").iterdir())]
    return {file.name: file.read_text() for file in files}


# By headers alone a rule decides as it does in whole runs: in the quick suite two are enough.
FEW = ("elastic_bound", "deadline")
WHOLE_AND_HEADERS = [
    *((name, False) for name, _ in policies.items()),
    *(pytest.param(name, True, marks=[] if name in FEW else pytest.mark.slow) for name, _ in policies.items()),
]


@pytest.mark.parametrize(("name", "headers_only"), WHOLE_AND_HEADERS)
def test_every_rule_survives_every_fault_and_one_seed_gives_one_log(
    tmp_path: Path, name: str, headers_only: bool
) -> None:
    policy = policies.load(name)
    source = {"task": "quadratic", "policy": name, "faults": FAULTS, "optimizer": {"lr": 0.01}}
    source |= {} if "gradient" in policy.units else {"update": "sisa"}
    overrides = ["simulation.compute={name: exponential}", "survive.ask_again_s=0.5", "seed=3"]
    one, two = (run(tmp_path, source, *overrides, workers=5, headers_only=headers_only) for _ in range(2))
    assert logs(one) == logs(two)
    assert one.summary["exit"] == 0 and one.summary["samples"] >= 60
    assert sorted(one.summary["lost_workers"]) == [2, 4]
    assert {line["event"] for line in told(one)} >= {"push", "asked", "joined", "left", "done"}
    if headers_only:  # the seed is that of times and faults, whatever is pushed
        other = run(tmp_path, source, *overrides, "seed=4", workers=5, headers_only=True)
        assert logs(other)["events.jsonl"] != logs(one)["events.jsonl"]


# ---- time


def test_a_push_takes_what_the_models_say(tmp_path: Path) -> None:
    network = "simulation.network={latency_s: 0.5, bandwidth_bytes_per_s: 368, service_s: 0.25}"
    made = run(tmp_path, "quadratic", network, "simulation.compute.mean_s=2", workers=1, samples=2)
    # A frame is 112 bytes, model and gradient are padded to 256 each: a second, and half a second of latency.
    there = 1 + 0.5
    assert arrivals(made) == [(there + 2 + there + 0.25, 1, 1), (2 * (there + 2 + there + 0.25), 1, 2)]
    reply = made.lines(1, "reply")[0]
    assert (reply["compute_s"], reply["wait_s"]) == (2.0, there + 0.25 + there)
    assert made.summary["virtual_s"] >= arrivals(made)[-1][0]


def test_workers_queue_for_the_server(tmp_path: Path) -> None:
    network = "simulation.network={latency_s: 0, service_s: 1}"
    made = run(tmp_path, "quadratic", network, "policy=asynchronous", "simulation.compute.mean_s=2", samples=4)
    assert arrivals(made)[:4] == [(3.0, 1, 1), (4.0, 2, 1), (5.0, 3, 1), (6.0, 1, 2)]


def test_workers_queue_for_cores(tmp_path: Path) -> None:
    compute = "simulation.compute={mean_s: 1, cores: 1}"
    made = run(tmp_path, "quadratic", QUIET, compute, "policy=asynchronous", workers=2, samples=4)
    assert arrivals(made)[:4] == [(1.0, 1, 1), (2.0, 2, 1), (3.0, 1, 2), (4.0, 2, 2)]


def test_a_slow_worker_a_pause_and_a_delay_put_pushes_off(tmp_path: Path) -> None:
    source = {
        "task": "quadratic",
        "policy": "asynchronous",
        "faults": {
            "slow": {"workers": 2, "factor": 2, "steps": [1]},
            "pause": {"workers": 1, "at_s": 1.5, "for_s": 3},
            "delay": {"workers": 3, "steps": [2], "delay_s": 0.75},
        },
    }
    made = run(tmp_path, source, QUIET, "simulation.compute.mean_s=1", samples=12)
    first = {w: [t for t, worker, _ in arrivals(made) if worker == w][:3] for w in (1, 2, 3)}
    assert first == {1: [1.0, 5.0, 6.0], 2: [2.0, 3.0, 4.0], 3: [1.0, 2.75, 3.75]}


def test_no_message_overtakes_another_of_the_same_worker(tmp_path: Path) -> None:
    """The ask of a worker whose push is late comes behind it: the push is not taken for lost."""
    source = {"task": "quadratic", "faults": {"delay": {"workers": 1, "steps": [1], "delay_s": 9}}}
    made = run(tmp_path, source, QUIET, "survive.ask_again_s=2", "simulation.compute.mean_s=1", workers=1, samples=2)
    lines = [(line["event"], line["t_s"], line.get("ignored")) for line in told(made)]
    assert lines[1] == ("push", 10.0, None)
    assert [line for line in lines if line[0] == "asked" and line[1] == 10.0]
    assert arrivals(made) == [(10.0, 1, 1), (11.0, 1, 2)]


@dataclass
class Alarm(Policy):
    """Use what is here one second after the first push of a round."""

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        if len(ledger.held) == 1:
            yield Wake(ledger.now + 1.0)

    def on_wake(self, ledger: Ledger) -> Iterator[Action]:
        for id in tuple(ledger.held):
            yield Drop(id, "counted")
        yield Release(tuple(ledger.waiting))


def test_at_equal_times_pushes_come_before_a_wake(tmp_path: Path) -> None:
    source = {"task": "quadratic", "policy": "deadline:deadline_s=1"}
    made = run(tmp_path, source, QUIET, "simulation.compute={mean_s: 2, speeds: [2, 1]}", workers=2, samples=2)
    assert [(line["event"], line["t_s"]) for line in told(made)[1:4]] == [("push", 1.0), ("push", 2.0), ("done", 2.0)]


def test_a_wake_comes_at_its_time_though_nothing_else_does(tmp_path: Path) -> None:
    source = {"task": "quadratic", "policy": "deadline:deadline_s=0.25"}
    made = run(tmp_path, source, QUIET, "simulation.compute={mean_s: 2, speeds: [2, 1]}", workers=2, samples=3)
    assert [(line["event"], line["t_s"]) for line in told(made)[1:4]] == [("push", 1.0), ("woke", 1.25), ("push", 2.0)]


# ---- what goes wrong


def faulty(folder: Path, faults: dict[str, Any], *overrides: str, **more: Any) -> Run:
    source = {"task": "quadratic", "faults": faults}
    return run(folder, source, QUIET, "survive.ask_again_s=2", "simulation.compute.mean_s=1", *overrides, **more)


def test_a_lost_push_is_asked_for_and_made_again(tmp_path: Path) -> None:
    made = faulty(tmp_path, {"lost_push": {"workers": 2, "steps": [1]}}, workers=2, samples=4)
    lines = [(line["event"], line["t_s"], line.get("worker"), line.get("step")) for line in told(made)[1:5]]
    assert lines[:2] == [("push", 1.0, 1, 1), ("asked", 3.0, 1, 1)]  # worker 1 waits for worker 2, and asks too
    assert ("asked", 3.0, 2, 1) in lines
    assert (4.0, 2, 2) in arrivals(made)
    assert (2, 1) not in [(worker, step) for _, worker, step in arrivals(made)]


def test_a_lost_reply_is_sent_again_and_changes_nothing_but_the_time(tmp_path: Path) -> None:
    lost = faulty(tmp_path, {"lost_reply": {"workers": 2, "steps": [0, 3]}}, samples=30)
    plain = faulty(tmp_path, {}, samples=30)
    assert lost.summary["parameters_sha256"] == plain.summary["parameters_sha256"]
    assert lost.summary["virtual_s"] == plain.summary["virtual_s"] + 4.0  # asked for 2 s later, twice
    asked = [line for line in told(lost, "asked") if line["worker"] == 2]
    assert [(line["t_s"], line["step"]) for line in asked] == [(2.0, 0), (7.0, 3)]


@pytest.mark.parametrize("headers_only", [False, True])
@pytest.mark.parametrize("rule", ["synchronous", "asynchronous"])
def test_a_first_reply_that_is_lost_is_asked_for_too(tmp_path: Path, rule: str, headers_only: bool) -> None:
    source = {"task": "quadratic", "policy": rule, "faults": {"lost_reply": {"workers": 1, "steps": [0]}}}
    made = run(tmp_path, source, "survive.ask_again_s=0.5", QUIET, headers_only=headers_only)
    assert made.summary["exit"] == 0 and made.summary["samples"] >= 60
    asked = [(line["worker"], line["step"], line["t_s"]) for line in told(made, "asked")]
    assert asked[0] == (1, 0, 0.5) and (2, 0, 0.5) not in asked
    assert next(line["t_s"] for line in told(made, "push") if line["worker"] == 1) == pytest.approx(0.6)


def test_a_push_that_comes_twice_counts_once(tmp_path: Path) -> None:
    twice = faulty(tmp_path, {"duplicate": {}}, samples=30)
    assert twice.summary["parameters_sha256"] == faulty(tmp_path, {}, samples=30).summary["parameters_sha256"]
    ignored = [line for line in told(twice, "push") if line.get("ignored") == "duplicate"]
    assert len(ignored) == twice.summary["pushes"] == 30


def test_a_crash_takes_what_is_computed_with_it_and_the_others_go_on(tmp_path: Path) -> None:
    made = faulty(tmp_path, {"crash": {"workers": 2, "at_s": 2.5, "noticed_s": 1}}, samples=20)
    assert [(line["t_s"], line["worker"]) for line in told(made, "left")] == [(3.5, 2)]
    assert [step for _, worker, step in arrivals(made) if worker == 2] == [1, 2]
    assert made.summary["lost_workers"] == [2]
    assert (4.5, 1, 4) in arrivals(made)  # the round that waited for it went on when it was noticed


def test_who_leaves_finishes_its_push_first(tmp_path: Path) -> None:
    made = faulty(tmp_path, {"leave": {"workers": 2, "at_s": 2.5}}, samples=20)
    assert [(line["event"], line["t_s"]) for line in told(made) if line.get("worker") == 2] == [
        *[("push", t) for t in (1.0, 2.0, 3.0)], ("left", 3.0)
    ]  # fmt: skip
    used = [line for line in made.lines(0, "used") if line["worker"] == 2]
    assert [line["step"] for line in used] == [1, 2, 3]


def test_who_leaves_while_it_waits_is_gone_at_once(tmp_path: Path) -> None:
    source = ("policy=synchronous", "simulation.compute={mean_s: 3, speeds: [3, 1]}")
    made = faulty(tmp_path, {"leave": {"workers": 1, "at_s": 2}}, *source, workers=2, samples=4)
    assert [line["t_s"] for line in told(made, "left")] == [2.0]
    assert [line["worker"] for line in made.lines(0, "used")] == [1, 2, 2, 2]  # what it had pushed is used


def test_a_new_worker_joins_and_one_that_was_gone_comes_back(tmp_path: Path) -> None:
    faults = {"crash": {"workers": 2, "at_s": 2.5}, "join": [{"workers": 2, "at_s": 4.25}, {"workers": 4, "at_s": 1.5}]}
    made = faulty(tmp_path, faults, "policy=asynchronous", samples=40)
    assert [(line["t_s"], line["worker"]) for line in told(made, "joined")] == [(1.5, 4), (4.25, 2)]
    steps = [step for _, worker, step in arrivals(made) if worker == 2]
    assert steps[:2] == [1, 2] and steps[2:] == list(range(4, 4 + len(steps) - 2))  # step 3 died with it
    assert [t for t, worker, _ in arrivals(made) if worker == 2][2] == 5.25
    assert [(t, step) for t, worker, step in arrivals(made) if worker == 4][:2] == [(2.5, 1), (3.5, 2)]
    assert {2, 4} <= {line["worker"] for line in made.lines(0, "used")}
    first = made.lines(2, "reply")
    assert all(math.isfinite(line["moved"]) for line in first if line["moved"] is not None)


def test_jobs_queued_for_a_worker_whose_push_was_lost_are_given_anew(tmp_path: Path) -> None:
    """Its views were once kept though their jobs were gone, and given for jobs of the same number."""
    faults = {"lost_push": {"chance": 0.1}, "lost_reply": {"chance": 0.1}}
    for seed in (0, 1, 2):
        overrides = ("policy=asgrad", "optimizer.lr=0.001", "simulation.compute.name=exponential", f"seed={seed}")
        made = faulty(tmp_path, faults, *overrides, workers=5, samples=200)
        assert made.summary["bound_holds"] is not False
        for line in made.lines(0, "used"):
            assert line["discrepancy"] <= line["path_length"] + 1e-9


def test_too_few_workers_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(WorkersLost, match="1 workers are left at 3 simulated s, expected at least 2"):
        faulty(tmp_path, {"crash": [{"workers": 1, "at_s": 2}, {"workers": 3, "at_s": 3}]}, "survive.min_workers=2")


def failed(folder: Path) -> dict[str, Any]:
    (directory,) = folder.iterdir()
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    return summary


def test_a_network_that_loses_everything_ends_as_stalled(tmp_path: Path) -> None:
    with pytest.raises(Stalled, match=r"no push for .* simulated s; awaited: workers \[1, 2, 3\]"):
        faulty(tmp_path, {"lost_push": {}}, "survive={ask_again_s: 5, stall_warning_s: 20, stall_deadline_s: 20}")
    summary = failed(tmp_path)
    assert summary["exit"] == 4 and 20 < summary["virtual_s"] <= 26 and "no push" in summary["error"]


def test_a_rule_that_uses_nothing_ends_as_stalled(tmp_path: Path) -> None:
    with pytest.raises(Stalled, match="not done after 50 simulated s"):
        run(tmp_path, {"task": "quadratic", "policy": "test_simulator:Alarm"}, "simulation.deadline_s=50")
    assert failed(tmp_path)["exit"] == 4


def test_without_a_stated_deadline_there_is_one_too(tmp_path: Path) -> None:
    with pytest.raises(Stalled, match="not done after"):
        run(tmp_path, {"task": "quadratic", "policy": "test_simulator:Alarm"}, samples=1)


@dataclass
class Sleepless(Policy):
    """Wakes itself for ever, at the same time."""

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        yield Wake(ledger.now)

    def on_wake(self, ledger: Ledger) -> Iterator[Action]:
        yield Wake(ledger.now)


def test_a_rule_that_wakes_itself_for_ever_ends_as_stalled(tmp_path: Path) -> None:
    with pytest.raises(Stalled, match=r"woken at .* s without end"):
        run(tmp_path, {"task": "quadratic", "policy": "test_simulator:Sleepless"})


@dataclass
class Holder(Policy):
    """Holds everything."""

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        return iter(())


def test_a_rule_that_holds_everybody_ends_as_stalled(tmp_path: Path) -> None:
    with pytest.raises(Stalled, match="stalled at version 0"):
        run(tmp_path, {"task": "quadratic", "policy": "test_simulator:Holder"})


# ---- the run folder and the command


def test_the_folder_is_that_of_train(tmp_path: Path) -> None:
    real, simulated = fit(tmp_path, "quadratic", samples=60), run(tmp_path, "quadratic")

    def names(made: Run) -> set[str]:
        return {str(path.relative_to(made.directory)) for path in made.directory.rglob("*")}

    assert names(simulated) == names(real)
    assert simulated.summary.keys() - real.summary.keys() == {"virtual_s", "cpu_s", "pushes_per_s", "headers_only"}
    assert not real.summary.keys() - simulated.summary.keys()
    written = json.loads((simulated.directory / "summary.json").read_text())
    assert written["virtual_s"] == simulated.summary["virtual_s"] > 0 and written["pushes_per_s"] > 0
    env = json.loads((simulated.directory / "env.json").read_text())
    assert (env["transport"], env["workers"], env["headers_only"]) == ("simulated", 3, False)


def test_the_written_configuration_repeats_the_run(tmp_path: Path) -> None:
    source = {"task": "quadratic", "faults": FAULTS, "policy": "asynchronous"}
    first = run(tmp_path, source, "simulation.compute.name=pareto", workers=5)
    directory = tmp_path / "again"
    simulate(str(first.directory / "config.yaml"), workers=5, run_dir=directory)
    assert logs(Run(directory, {})) == logs(first)


def test_waiting_and_the_time_to_a_target_are_virtual(tmp_path: Path) -> None:
    overrides = ("train.evaluate_every_samples=3", "train.stop_at=distance<=0.5", "simulation.compute.mean_s=1000")
    made = run(tmp_path, "quadratic", "survive={stall_deadline_s: 5000, ask_again_s: 5000}", *overrides, samples=3000)
    assert made.summary["time_to_target_s"] >= 1000
    slow = run(tmp_path, "quadratic", QUIET, "simulation.compute={mean_s: 1, speeds: [1, 0.5]}", workers=2)
    assert slow.summary["wait_share"]["1"] == pytest.approx(0.5, abs=0.05)
    assert slow.summary["wait_share"]["2"] == pytest.approx(0.0, abs=0.01)


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        simulate({"task": "quadratic"}, workers=2, run_dir=tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"workers": 0}, "--workers: got 0, expected a number of workers >= 1"),
        ({"norms": "x"}, "--norms: goes with --headers-only"),
        ({"overrides": ["faults.slow={workers: 9}"]}, "faults.slow.0.workers: got 9, expected ranks from 1 to 2"),
        ({"overrides": ["policy=first_k:k=3"]}, "needs 3 workers, got 2"),
    ],
)
def test_what_cannot_be_simulated_is_refused_before_anything_is_written(
    tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"workers": 2, "run_dir": tmp_path / "run"} | more
    with pytest.raises(ConfigError, match=message):
        simulate({"task": "quadratic"}, **arguments)
    assert not (tmp_path / "run").exists()


def test_the_command_prints_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("task: quadratic\ntrain: {samples: 60}\n")
    arguments = ["simulate", str(tmp_path / "run.yaml"), "policy=asynchronous", "--workers", "64", "--json"]
    assert main([*arguments, "--run-dir", str(tmp_path / "one")]) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert (summary["workers"], summary["policy"]) == (64, "asynchronous")
    target = ["train.stop_at=loss<=1e-9", "train.evaluate_every_samples=30", "--check"]
    assert main([*arguments, *target, "--run-dir", str(tmp_path / "two")]) == CHECK_FAILED
    assert main([*arguments[:-1], "--headers-only", "--run-dir", str(tmp_path / "three")]) == 0
    assert "nothing computed" in capsys.readouterr().err


def test_pages_are_open_only_while_they_are_written(tmp_path: Path) -> None:
    pages = Pages(tmp_path / "lines")
    assert (tmp_path / "lines").read_text() == ""
    pages.write("one")
    pages.write("x" * 20_000)
    assert (tmp_path / "lines").read_text() == "one\n" + "x" * 20_000 + "\n"
    pages.write("last")
    pages.flush()
    pages.flush()
    assert (tmp_path / "lines").read_text().endswith("x\nlast\n")
