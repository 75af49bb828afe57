"""Training under the real mpirun: the same numbers as in one process, whatever the messages look like."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from conftest import PROGRAMS, ROOT, TRAIN, Job, Said, Several, Trained, ranks_command
from run_folder import Reader

from ps_elastic.analysis.replay.decisions import replay_decisions
from ps_elastic.cli.replay import command as replay_command
from ps_elastic.cluster import launcher
from ps_elastic.cluster.environment import Mpi
from ps_elastic.config.load import load
from ps_elastic.records.fields import FILES
from ps_elastic.runtime.train import train

pytestmark = pytest.mark.mpi

DIGITS = str(ROOT / "configs" / "digits.yaml")
WORKERS = 3
SHORT = ("train.samples=3000", "train.evaluate_every_samples=1500")
TOP_K = ("compressor=top_k:ratio=0.05",)  # with error feedback, as `auto` says
TROUBLED = "troubled.yaml"
MESSAGES = ("transport=messages",)
SHARED = ("transport=shared",)
ASYNC = ("policy=asynchronous",)
IN_FLIGHT = ("task.floats=300000", "train.samples=120")
PERCEPTRON = "perceptron.yaml"  # a model of several blocks
ADAM = ("optimizer={name: adamw, lr: 0.001, weight_decay: 0.1}",)
LOCAL = ("update=local_sgd", "optimizer.momentum=0")
ENDS = {
    "small_and_large_models_and_chunks_arrive_whole",
    "a_push_in_place_is_sent_from_where_the_gradient_lies",
    "the_steady_state_allocates_nothing_of_the_size_of_the_model",
    "buckets_travel_apart",
    "large_buckets_leave_from_the_gradient_and_small_ones_behind_their_header",
    "a_header_without_its_bucket_is_no_push_and_stops_nothing",
    "a_bucket_of_another_size_than_its_header_says_is_refused",
    "a_model_that_leaves_with_its_step_is_that_of_the_reply_or_thrown_away",
    "of_two_arrivals_the_push_is_looked_at_before_the_ask",
    "a_farewell_brings_its_text",
    "foreign_bytes_are_refused_by_the_rank_they_came_from",
    "a_wait_ends_in_time",
    "a_rank_that_takes_nothing_in_is_told_by_name",
    "a_message_that_has_left_leaves_the_end_idle",
    "ranks_of_one_host_find_each_other_and_count_their_cores",
    "who_sleeps_is_woken_by_the_bell_and_no_wake_is_lost",
    "a_worker_that_waits_is_asked_for_help_and_gets_its_reply",
    "one_who_is_slow_is_looked_after",
    "more_chunks_than_tags_are_refused",
}


PERCEPTRON_TEXT = """
task: {name: "ps_elastic.analysis.bench.tasks:Perceptron", parameters: 200000, batch_size: 4}
optimizer: {lr: 0.05, momentum: 0.9, weight_decay: 0.001, decay_norm_and_bias: false}
train: {samples: 240, evaluate_every_samples: 120}
"""


class Run:
    """One finished run: what its ranks said, and its folder."""

    def __init__(self, said: list[Said], folder: Path) -> None:
        self.said, self.folder = said, folder

    @property
    def summary(self) -> dict[str, Any]:
        assert [rank.code for rank in self.said] == [0] * len(self.said), self.said
        return json.loads((self.folder / "summary.json").read_text())

    def metrics(self, rank: int, event: str) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics" / f"rank-{rank:03d}.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["event"] == event]


RUNS: dict[str, tuple[str, tuple[str, ...], dict[str, int | str]]] = {
    "synchronous": (DIGITS, (*SHORT, *MESSAGES), {}),
    "again": (DIGITS, (*SHORT, *MESSAGES), {}),
    "chunks": (DIGITS, (*SHORT, *MESSAGES), {"chunk_bytes": 4096}),
    "model apart": (DIGITS, (*SHORT, *MESSAGES), {"inline_bytes": 1024}),
    "model apart, chunks": (DIGITS, (*SHORT, *MESSAGES), {"inline_bytes": 1024, "chunk_bytes": 4096}),
    "shared": (DIGITS, (*SHORT, *SHARED), {}),
    "shared, chunks": (DIGITS, (*SHORT, *SHARED), {"inline_bytes": 1024, "chunk_bytes": 4096}),
    "mixed": (DIGITS, SHORT, {"apart": "2", "inline_bytes": 1024}),
    "all apart": (DIGITS, SHORT, {"apart": "1,2,3"}),
    "too little room": (DIGITS, SHORT, {"room": 10_000_000}),
    "layer": (DIGITS, (*SHORT, *MESSAGES, "buckets=layer"), {}),
    "layer, chunks": (DIGITS, (*SHORT, *MESSAGES, "buckets=layer"), {"inline_bytes": 1024, "chunk_bytes": 4096}),
    "layer, late": (
        DIGITS,
        (*SHORT, *MESSAGES, "buckets=layer", "train.on_nonfinite=drop"),
        {},
    ),  # nothing leaves early
    "auto": (DIGITS, (*SHORT, "buckets=auto"), {}),
    "auto, apart": (DIGITS, (*SHORT, "buckets=auto"), {"apart": "3"}),
    "layer, shared": (DIGITS, (*SHORT, "buckets=layer"), {}),
    "layer, mixed": (DIGITS, (*SHORT, "buckets=layer"), {"apart": "1"}),
    "local steps, messages": (DIGITS, (*SHORT, *LOCAL, *MESSAGES), {}),
    "local steps": (DIGITS, (*SHORT, *LOCAL), {"inline_bytes": 1024}),
    "top_k": (DIGITS, (*SHORT, *TOP_K, *MESSAGES), {}),
    "top_k again": (DIGITS, (*SHORT, *TOP_K, *MESSAGES), {"inline_bytes": 1024}),
    "top_k, shared": (DIGITS, (*SHORT, *TOP_K), {}),
    "top_k, layer": (DIGITS, (*SHORT, *TOP_K, *MESSAGES, "buckets=layer"), {}),
    "top_k, layer, mixed": (DIGITS, (*SHORT, *TOP_K, "buckets=layer"), {"apart": "1,3"}),
    "top_k, layer, late": (DIGITS, (*SHORT, *TOP_K, "buckets=layer", "train.on_nonfinite=drop"), {}),
    "asynchronous": (DIGITS, (*SHORT, *ASYNC, *MESSAGES), {"inline_bytes": 1024, "chunk_bytes": 4096}),
    "asynchronous, top_k": (DIGITS, (*SHORT, *TOP_K, *ASYNC, *MESSAGES), {}),
    "asynchronous, shared": (DIGITS, (*SHORT, *ASYNC), {"inline_bytes": 1024}),
    "asynchronous, mixed": (DIGITS, (*SHORT, *ASYNC), {"inline_bytes": 1024, "apart": "3"}),
    "stale_synchronous": (DIGITS, (*SHORT, "policy=stale_synchronous:bound=1"), {}),
    "elastic_bound, shared": (DIGITS, (*SHORT, "policy=elastic_bound:bound=4"), {"inline_bytes": 1024}),
    "first_k": (DIGITS, (*SHORT, "policy=first_k:k=2"), {}),
    "in flight": (TROUBLED, (*IN_FLIGHT, *ASYNC, *MESSAGES, "train.samples=240"), {}),
    "in flight, asgrad": (TROUBLED, (*IN_FLIGHT, *MESSAGES, "policy=asgrad"), {}),  # steps last
    "in flight, shared": (TROUBLED, (*IN_FLIGHT, *ASYNC, "train.samples=240"), {}),
    "in flight, shared, asgrad": (TROUBLED, (*IN_FLIGHT, "policy=asgrad"), {}),
    "in flight, in place": (TROUBLED, (*IN_FLIGHT, "policy=random_subset:q=2"), {}),
    "in flight, mixed": (TROUBLED, (*IN_FLIGHT, *ASYNC, "tracker.discrepancy=off"), {"apart": "2"}),
    "in flight, chunks": (
        TROUBLED,
        (*IN_FLIGHT, *ASYNC, *MESSAGES, "tracker.discrepancy=off"),
        {"chunk_bytes": 1 << 16},
    ),
    "long": (
        TROUBLED,
        (*ASYNC, "task.floats=20000", "train.samples=2500", "train.evaluate_every_samples=300"),
        {},
    ),
    "sleeping workers": (
        TROUBLED,
        ("task.sleep_s=0.3", "train.samples=21", "train.evaluate_every_samples=3"),
        {},
    ),
    "unshared steps": (PERCEPTRON, SHARED, {"least": 1 << 40}),
    "shared steps": (PERCEPTRON, SHARED, {"least": 0}),
    "shared steps, mixed": (PERCEPTRON, (), {"least": 0, "apart": "3"}),
    "shared steps, too little room": (PERCEPTRON, (), {"least": 0, "room": 20_500_000}),
    "shared steps, adam": (PERCEPTRON, (*SHARED, *ADAM), {"least": 0}),
    "shared steps, adam, messages": (PERCEPTRON, (*MESSAGES, *ADAM), {}),
    "shared steps, first_k": (PERCEPTRON, ("policy=first_k:k=2",), {"least": 0}),
    "shared steps, asynchronous": (PERCEPTRON, (*ASYNC, "tracker.discrepancy=off"), {"least": 0}),
    "impatient": (TROUBLED, ("task.fault=pause", "survive.ask_again_s=0.1", "train.samples=30"), {}),
    "patient": (TROUBLED, (*MESSAGES, "train.samples=30"), {}),
}


# Alone in having chunks, or a mixture, that ends.py and others of RUNS have too: these are compared in the slow tests.
MORE = {
    "chunks", "model apart", "layer, chunks", "layer, mixed", "top_k again", "top_k, layer, late", "in flight, mixed",
    "in flight, chunks",
}  # fmt: skip


class Runs:
    """RUNS, by name; each trained by a server and three workers."""

    def __init__(self, trained: Trained) -> None:
        self._trained = trained

    def __getitem__(self, name: str) -> Run:
        folder = self._trained[name]
        return Run(self._trained.said[name], folder)

    def trained(self) -> list[Path]:
        """The folders of those that were trained so far."""
        return list(self._trained.values())


@pytest.fixture(scope="module")
def runs(several: Several, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("runs")
    (folder / TROUBLED).write_text("task: troubled:Troubled\n")
    (folder / PERCEPTRON).write_text(PERCEPTRON_TEXT)
    plan = {
        name: {"argv": ["train", str(folder / config), *overrides], **knobs}
        for name, (config, overrides, knobs) in RUNS.items()
    }
    return Runs(Trained(several, plan, [name for name in RUNS if name not in MORE], folder))


def params(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in MORE else name for name in names]


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The summary of one of RUNS, trained in this process."""
    folder = tmp_path_factory.mktemp("in_process")

    def run(name: str) -> dict[str, Any]:
        config, overrides, _ = RUNS[name]
        summary = train(config, overrides, workers=WORKERS, run_dir=folder / str(len(list(folder.iterdir()))))
        assert summary is not None
        return summary

    return run


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("synchronous", ["again", "model apart, chunks"]),
        pytest.param("synchronous", ["chunks", "model apart"], marks=pytest.mark.slow),
        ("shared", ["shared, chunks", "mixed", "all apart", "too little room"]),
        ("layer", ["synchronous", "layer, late", "auto", "auto, apart", "layer, shared"]),
        pytest.param("layer", ["layer, chunks", "layer, mixed"], marks=pytest.mark.slow),
        ("local steps, messages", ["local steps"]),
        ("top_k", ["top_k, shared"]),
        ("top_k, layer", ["top_k, layer, mixed"]),
        pytest.param("top_k", ["top_k again"], marks=pytest.mark.slow),
        pytest.param("top_k, layer", ["top_k, layer, late"], marks=pytest.mark.slow),
    ],
)
def test_synchronous_is_bitwise_the_same_under_mpirun_in_process_and_again(runs, in_process, name, others):
    expected = in_process(name)
    for found in (runs[other].summary for other in (name, *others)):
        assert found["parameters_sha256"] == expected["parameters_sha256"]
        assert (found["samples"], found["used"]) == (expected["samples"], expected["used"])
        assert found["metrics"] == expected["metrics"]


@pytest.mark.parametrize(
    ("name", "why"),
    [("auto", "on the server's host"), ("auto, apart", r"a push should be whole at the server [\d.]+ ms after")],
)
def test_auto_buckets_are_chosen_once_told_and_written_down(runs, name, why):
    run = runs[name]
    written = load(str(run.folder / "config.yaml"), plugins=False).buckets
    assert run.summary["exit"] == 0
    assert re.search(f"buckets: auto is {written}.*{why}", run.said[0].stderr), run.said[0].stderr
    assert written == "whole" or int(written) >= 1 << 16


def told_of_steps(run: Run) -> list[Any]:
    """All numbers of a run that depend on how the model moved."""
    applied = [re.findall(r'\["applied", .*?\]', line) for line in (run.folder / "events.jsonl").open()]
    used = [(line["worker"], line["step"], line["path_length"], line["norm"]) for line in run.metrics(0, "used")]
    return [applied, used, run.summary["parameters_sha256"], run.summary["metrics"]]


def test_shared_steps_are_bitwise_those_of_rank_0_alone_and_so_is_all_that_is_logged(runs):
    alone = runs["unshared steps"]
    assert alone.summary["shared_steps"] == 0 and alone.summary["shared_by_workers"] is None
    assert runs["shared steps, too little room"].summary["shared_steps"] == 0
    for name, share in (("shared steps", 1), ("shared steps, mixed", 0), ("shared steps, too little room", 0)):
        run = runs[name]
        assert run.summary["shared_steps"] == share * run.summary["versions"], name
        assert told_of_steps(run) == told_of_steps(alone), name
    assert told_of_steps(runs["shared steps, adam"]) == told_of_steps(runs["shared steps, adam, messages"])
    assert runs["shared steps, adam"].summary["shared_steps"] == runs["shared steps, adam"].summary["versions"]


def test_shared_steps_are_those_of_a_run_in_one_process(runs, tmp_path):
    (tmp_path / PERCEPTRON).write_text(PERCEPTRON_TEXT)
    assert train(str(tmp_path / PERCEPTRON), (), workers=WORKERS, run_dir=tmp_path / "run")
    assert told_of_steps(Run([Said(0, "", "")], tmp_path / "run")) == told_of_steps(runs["shared steps"])


def test_runs_that_should_differ_do(runs):
    hashes = {runs[name].summary["parameters_sha256"] for name in ("synchronous", "top_k", "top_k, layer")}
    assert len(hashes) == 3


@pytest.mark.parametrize("name", params(RUNS))
def test_the_same_events_give_the_same_actions(runs, name):
    run = runs[name]
    policy = load(str(run.folder / "config.yaml"), plugins=False).policy.build()
    replay = replay_decisions(policy, (run.folder / "events.jsonl").open(), range(1, WORKERS + 1))
    assert replay.match, replay.first_mismatch
    assert replay.events >= run.summary["pushes"]


def test_every_rank_leaves_its_metrics_with_the_keys_of_the_contract(runs):
    run = runs["asynchronous"]
    files = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    assert files == {
        "config.yaml", "env.json", "events.jsonl", "model.safetensors", "summary.json",
        *(f"metrics/rank-{rank:03d}.jsonl" for rank in range(WORKERS + 1)),
    }  # fmt: skip
    used, summary = run.metrics(0, "used"), run.summary
    common = {"event", "t_s", "rank"}
    assert set(used[0]) >= common | {
        "worker", "step", "base", "version", "x", "staleness", "discrepancy", "step_size", "path_length", "norm",
        "payload_norm", "residual_norm", "weight", "share",
    }  # fmt: skip
    assert len(used) == summary["used"]
    assert set(run.metrics(0, "evaluated")[0]) >= common | {"samples", "loss", "accuracy"}
    replies = [run.metrics(rank, "reply") for rank in range(1, WORKERS + 1)]
    assert set(replies[0][0]) >= common | {
        "step", "version", "discrepancy", "moved", "residual_norm", "outcome", "compute_s", "encode_s", "send_s",
        "wait_s",
    }  # fmt: skip
    assert sum(map(len, replies)) == summary["pushes"]
    assert {line["rank"] for line in replies[2]} == {3}


def test_what_ranks_write_is_described(runs):
    reader = Reader()
    for folder in runs.trained():
        reader.read(folder)
    assert reader.wrong == []
    described = {field.name for file in FILES if file.name == "env.json" for field in file.fields}
    assert described - {name for file, _, name in reader.seen if file == "env.json"} == {"transport", "headers_only"}


def test_the_discrepancy_that_a_worker_logs_is_the_servers(runs):
    run = runs["asynchronous"]
    told = {(rank, line["step"]): line["discrepancy"] for rank in (1, 2, 3) for line in run.metrics(rank, "reply")}
    used = run.metrics(0, "used")
    assert [told[line["worker"], line["step"]] for line in used] == [line["discrepancy"] for line in used]
    assert run.summary["discrepancy"]["max"] == max(line["discrepancy"] for line in used) > 0


def test_discrepancy_is_at_most_the_path_length_and_zero_when_synchronous(runs):
    for name in ("asynchronous", "asynchronous, top_k", "stale_synchronous", "first_k"):
        for line in runs[name].metrics(0, "used"):
            assert line["discrepancy"] <= line["path_length"]
    assert runs["synchronous"].summary["discrepancy"] == {"rms": 0, "max": 0}
    assert runs["first_k"].summary["discrepancy"] == {"rms": 0, "max": 0}


def test_workers_of_a_stale_synchronous_run_keep_within_its_bound(runs):
    clocks = dict.fromkeys(range(1, WORKERS + 1), 0)
    for line in runs["stale_synchronous"].metrics(0, "used"):
        clocks[line["worker"]] += 1
        assert max(clocks.values()) - min(clocks.values()) <= 2


def test_late_pushes_are_dropped_and_their_workers_told(runs):
    run = runs["first_k"]
    dropped = {(line["worker"], line["step"]) for line in run.metrics(0, "dropped")}
    told = {
        (rank, line["step"])
        for rank in range(1, WORKERS + 1)
        for event in ("reply", "settled")
        for line in run.metrics(rank, event)
        if line["outcome"] == "dropped"
    }
    assert told == dropped
    assert len(dropped) == run.summary["dropped"] > 0
    reasons = {line["reason"] for line in run.metrics(0, "dropped")}
    assert reasons <= {"late", "done"} and "late" in reasons


def test_a_model_under_way_is_not_changed_by_the_next_step(runs):
    # Every worker compares the entries of the model that it received, see `Troubled`.
    for name in ("in flight", "in flight, shared"):
        assert runs[name].summary["used"] == 240
        assert runs[name].summary["discrepancy"]["max"] > 0
    for name in ("asgrad", "shared, asgrad", "in place"):
        assert runs[f"in flight, {name}"].summary["used"] == 120


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chunks", "mixed"])
def test_nor_is_one_in_pieces_or_beside_others_that_are_read_in_place(runs, name):
    assert runs[f"in flight, {name}"].summary["used"] == 120


def test_a_run_tells_what_each_worker_uses(runs):
    told = {
        "synchronous": ("messages", dict.fromkeys("123", "messages")),
        "shared": ("shared", dict.fromkeys("123", "shared")),
        "mixed": ("shared [1, 3], messages [2]", {"1": "shared", "2": "messages", "3": "shared"}),
        "all apart": ("messages", dict.fromkeys("123", "messages")),
        "too little room": (
            "messages (shared windows need 17 MB in /dev/shm, which has 10 MB: messages instead)",
            dict.fromkeys("123", "messages"),
        ),
    }
    for name, (text, transports) in told.items():
        assert json.loads((runs[name].folder / "env.json").read_text())["transport"] == transports
        assert f"; transport: {text}; " in runs[name].said[0].stderr.splitlines()[0]


@pytest.mark.parametrize(
    "name",
    [
        "asynchronous, shared", "asynchronous, mixed", "elastic_bound, shared", "first_k", "shared steps",
        "shared steps, first_k", "shared steps, asynchronous",
    ],
)  # fmt: skip
def test_what_was_computed_over_shared_windows_is_recomputed_bit_for_bit(runs, name):
    pytest.importorskip("sklearn")
    said = CliRunner().invoke(replay_command, [str(runs[name].folder), "--recompute", "--json"])
    found = json.loads(said.stdout)
    assert found["match"] and found["parameters_sha256"] == runs[name].summary["parameters_sha256"], said.output


def test_a_worker_that_computes_on_the_servers_model_keeps_no_copy_to_tell_what_moved(runs):
    assert {line["moved"] for line in runs["shared"].metrics(1, "reply")} == {None}
    assert max(line["moved"] or 0 for line in runs["asynchronous, shared"].metrics(1, "reply")) > 0


def test_the_bytes_on_the_wire_are_the_payload_and_a_header_a_bucket(runs):
    summary = runs["synchronous"].summary
    floats = 4_864  # of the digits perceptron, each tensor padded to a multiple of 64
    assert summary["bytes_up"] == summary["pushes"] * 4 * floats
    assert runs["top_k"].summary["bytes_up"] == summary["pushes"] * 8 * int(0.05 * floats)


def test_the_servers_memory_does_not_grow(runs):
    run = runs["long"]
    resident = [line["resident_bytes"] for line in run.metrics(0, "evaluated")]
    assert run.summary["pushes"] >= 2500
    assert len(resident) >= 6
    # A kept push or model would be 80 kB: 2,000 of them 160 MB. A few MB are the allocator's.
    assert max(resident[2:]) - resident[1] < 8e6


def test_the_server_sleeps_while_the_workers_compute(runs):
    lines = runs["sleeping workers"].metrics(0, "evaluated")
    first, last = lines[1], lines[-1]
    wall_s, cpu_s = last["wall_s"] - first["wall_s"], last["cpu_s"] - first["cpu_s"]
    assert wall_s > 1.0
    assert cpu_s < 0.05 * wall_s, f"{100 * cpu_s / wall_s:.1f} % of a core"


def test_asking_again_while_another_computes_changes_nothing(runs):
    impatient = runs["impatient"]
    asked = [line for line in (impatient.folder / "events.jsonl").open() if '"event": "asked"' in line]
    assert sum('"ignored": "waiting"' in line for line in asked) >= 4  # two workers waited for about a second
    assert impatient.summary["parameters_sha256"] == runs["patient"].summary["parameters_sha256"]
    assert impatient.summary["pushes"] == runs["patient"].summary["pushes"]


@pytest.fixture(scope="module")
def ends(mpi: Mpi, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The checks of mpi_programs/ends.py, all of which passed."""
    folder = tmp_path_factory.mktemp("ends")
    program = [sys.executable, str(PROGRAMS / "ends.py"), str(folder / "ends.json")]
    job = Job(ranks_command(mpi, 2, program), launcher.mpi_environment(mpi), folder)
    try:
        assert job.wait().code == 0, job.said()
    finally:
        job.kill()
    return json.loads((folder / "ends.json").read_text())


@pytest.mark.parametrize("check", sorted(ENDS))
def test_the_ends_of_the_transport(ends, check):
    assert set(ends) == ENDS and check in ends


@pytest.mark.parametrize("by", ["launch", pytest.param("mpirun", marks=pytest.mark.slow)])
def test_the_command_line_trains_and_prints_one_document(start, start_ranks, tmp_path, by):
    """`launch` starts mpirun, which starts what the second case starts itself."""
    pytest.importorskip("sklearn")
    run_dir = tmp_path / "run"
    words, chunks = [DIGITS, *SHORT, "--run-dir", str(run_dir), "--json"], {"PS_ELASTIC_CHUNK_BYTES": "4096"}
    if by == "launch":
        job = start([*TRAIN[:-1], "launch", "-n", "3", *words], **chunks)
    else:
        job = start_ranks(3, [*TRAIN, *words], **chunks)
    ended = job.wait()
    assert ended.code == 0, ended.stderr
    printed, written = json.loads(ended.stdout), json.loads((run_dir / "summary.json").read_text())
    assert printed == (written if by == "launch" else {**written, "run_dir": str(run_dir)})
    assert (written["exit"], written["workers"]) == (0, 2)
    expected = train(DIGITS, SHORT, workers=2, run_dir=tmp_path / "in_process")
    assert expected and written["parameters_sha256"] == expected["parameters_sha256"]
    assert "samples 3008/3000" in ended.stderr  # the live lines
    told = [f"3 ranks, .*; run folder {re.escape(str(run_dir))}"] if by == "launch" else []
    assert all(re.fullmatch(*pair) for pair in zip(told, ended.messages(), strict=True)), ended.messages()


@pytest.mark.slow
def test_eight_ranks_on_few_cores_make_progress(start_ranks, tmp_path):
    pytest.importorskip("sklearn")
    run_dir = tmp_path / "run"
    ended = start_ranks(8, [*TRAIN, DIGITS, "policy=asynchronous", *SHORT, "--run-dir", str(run_dir)]).wait(200)
    assert ended.code == 0, ended.stderr
    assert json.loads((run_dir / "summary.json").read_text())["metrics"]["accuracy"] > 0.5
    assert all((run_dir / "metrics" / f"rank-{rank:03d}.jsonl").stat().st_size > 1000 for rank in range(8))


@pytest.mark.slow
@pytest.mark.skipif(
    psutil.virtual_memory().available < 12e9, reason="needs 12 GB of memory: four vectors of 2.2 GB, and room"
)
def test_a_payload_over_2_gib_arrives_whole_both_ways(start_ranks, tmp_path):
    ended = start_ranks(2, [sys.executable, str(PROGRAMS / "payload.py")]).wait(250)
    assert ended.code == 0, ended.stderr
    assert ended.stdout.split() == ["2200000000", "bytes", "each", "way"]
    assert np.iinfo(np.int32).max < 2_200_000_000
