from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import few_or_many
from hypothesis import given, settings
from hypothesis import strategies as st

from ps_elastic.compressors import Compressor
from ps_elastic.config.load import check, load
from ps_elastic.config.plugin import Plugin
from ps_elastic.config.schema import Config
from ps_elastic.config.sections import Target, Train
from ps_elastic.errors import ConfigError
from ps_elastic.tasks import Task


@dataclass
class Nothing(Task):
    """A task of one number."""

    batch_size: int = 32
    data_dir: str | None = None
    noise: float = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"got {self.batch_size}, expected >= 1", key="batch_size")

    def model(self, seed: int) -> Any:
        raise NotImplementedError

    def batches(self, worker: int, workers: int, seed: int) -> Iterator[Any]:
        raise NotImplementedError

    def loss(self, model: Any, batch: Any) -> Any:
        raise NotImplementedError

    def evaluate(self, model: Any) -> dict[str, float]:
        raise NotImplementedError


@dataclass
class Part(Compressor):
    """A compressor with a setting, and no torch."""

    ratio: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"got {self.ratio}, expected 0 < ratio <= 1", key="ratio")

    def encode(self, vector: Any) -> Any:
        raise NotImplementedError

    def accumulate(self, payload: Any, out: Any, weight: float = 1.0) -> None:
        raise NotImplementedError

    def check(self, payload: Any, numel: int) -> None:
        raise NotImplementedError

    def max_nbytes(self, numel: int) -> int:
        raise NotImplementedError


TASK = f"{__name__}:Nothing"
PART = f"{__name__}:Part"


def made(*overrides: str, **sections: Any) -> Config:
    return load({"task": TASK, **sections}, overrides)


def refused(*overrides: str, **sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        made(*overrides, **sections)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_only_the_task_is_required() -> None:
    config = made()
    assert config.name == "Nothing"
    assert config.task == Plugin("task", TASK, {"batch_size": 32, "data_dir": None, "noise": 0.0})
    assert (config.policy.name, config.update.plugin.name, config.compressor.plugin.name) == (
        "synchronous",
        "sgd",
        "identity",
    )
    assert (config.downlink.name, config.optimizer.name, config.schedule.name) == ("identity", "sgd", "constant")
    assert (config.seed, config.threads, config.transport, bool(config.faults)) == (0, 1, "auto", False)
    with pytest.raises(ConfigError, match=r"^task: required: what to train, such as `task: digits`$"):
        load(None)
    with pytest.raises(ConfigError, match=r"^task: required"):
        load({"task": None, "seed": 1})


def test_a_file_without_a_task_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# nothing stated\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert (caught.value.source, caught.value.key) == (str(path), "task")


def test_a_file_and_the_command_line_make_one_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"name: mine\ntask: {{name: '{TASK}', batch_size: 8}}\npolicy: stale_synchronous:bound=2\n"
        "optimizer: {lr: 1e-4, momentum: 0.9}\ntrain: {samples: 3e5}\n"
    )
    config = load(str(path), ["policy.bound=5", f"compressor={PART}:ratio=0.5:error_feedback=false", "seed=7"])
    assert (config.name, config.seed, config.train.samples) == ("mine", 7, 300_000)
    assert (config.optimizer.lr, config.optimizer.momentum) == (1e-4, 0.9)
    assert config.policy.build().bound == 5
    assert config.compressor.plugin.build() == Part(0.5)
    assert config.compressor.error_feedback is False
    assert config.compressor.text() == f"{PART}:ratio=0.5:error_feedback=false"
    assert made("update.accumulate=2").update.text() == "sgd:accumulate=2"
    assert config.task.build() == Nothing(8)


def test_what_is_loaded_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        made().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("polcy=synchronous", "command line: polcy: unknown key 'polcy'; nearest 'policy'; known: buckets, checkpoint"),
        ("train.sampels=3", "command line: train.sampels: unknown key 'sampels'; nearest 'samples'; known: autocast"),
        ("task.batchsize=3", "command line: task.batchsize: unknown key of task "),
        ("compressor.eror_feedback=true", "eror_feedback'; nearest 'error_feedback'; known: error_feedback, name"),
        ("update.acumulate=2", "nearest 'accumulate'; known: accumulate, name, pipeline"),
        ("downlink.error_feedback=true", "command line: downlink.error_feedback: unknown key of compressor identity"),
        ("policy=synchronus", "command line: policy.name: unknown policy 'synchronus'; nearest 'synchronous'"),
        (
            "optimizer=amad",
            "command line: optimizer.name: unknown value 'amad'; nearest 'adam'; known: adam, adamw, sgd",
        ),
        ("transport=message", "command line: transport: unknown value 'message'; nearest 'messages'"),
        ("seed=true", "command line: seed: got true, expected a whole number"),
        ("seed=1.5", "command line: seed: got 1.5, expected a whole number"),
        ("seed='3'", "command line: seed: got '3', expected a whole number"),
        ("seed.x=3", "command line: seed: got {'x': 3}, expected a whole number"),
        ("seed=-1", "command line: seed: got -1, expected a whole number >= 0 and < 2^63"),
        ("threads=0", "command line: threads: got 0, expected a number of threads >= 1"),
        ("server_threads=0", "command line: server_threads: got 0, expected a number of threads >= 1, or auto"),
        ("server_threads=all", "server_threads: got 'all', expected 'auto' or a whole number"),
        ("buckets=parts", "buckets: got 'parts', expected 'whole' or 'layer' or 'auto' or a whole number"),
        ("buckets=3", "buckets: got 3, expected a number of bytes >= 4, or a name"),
        ("name=a/b", "name: got 'a/b', expected letters, digits"),
        ("name=..", "name: got '..', expected letters, digits"),
        ("train=3", "command line: train: got 3, expected a mapping of keys"),
        ("train.samples=0", "train.samples: got 0, expected a number of samples >= 1"),
        ("train.evaluate_every_samples=0", "train.evaluate_every_samples: got 0"),
        ("train.stop_at=accuracy", "train.stop_at: got 'accuracy', expected METRIC>=NUMBER or METRIC<=NUMBER"),
        ("train.stop_at=accuracy>0.9", "train.stop_at: got 'accuracy>0.9', expected METRIC>=NUMBER"),
        ("train.stop_at=accuracy>=high", "train.stop_at: got 'accuracy>=high'"),
        ("train.stop_at=accuracy>=nan", "train.stop_at: got 'accuracy>=nan'"),
        ("train.stop_at=accuracy>=0.9.1", "train.stop_at: got 'accuracy>=0.9.1'"),
        ("train.stop_at=loss<=0.1", "train.evaluate_every_samples: required with train.stop_at"),
        ("train.autocast=half", "train.autocast: unknown value 'half'"),
        ("train.on_nonfinite=ignore", "train.on_nonfinite: unknown value 'ignore'; known: drop, stop"),
        ("task.batch_size=0", "command line: task.batch_size: got 0, expected >= 1"),
        ("task.noise=.inf", "command line: task.noise: got inf, expected a number"),
        ("update.accumulate=0", "update.accumulate: got 0, expected a number of batches >= 1"),
        ("update.pipeline=-1", "update.pipeline: got -1, expected a number of pushes >= 0"),
        ("compressor.error_feedback=maybe", "got 'maybe', expected true or false or 'auto'"),
        ("optimizer.lr=0", "optimizer.lr: got 0.0, expected a number > 0"),
        ("optimizer.lr=.nan", "optimizer.lr: got nan, expected a number"),
        ("optimizer.momentum=1", "optimizer.momentum: got 1.0, expected a number >= 0 and < 1"),
        ("optimizer.nesterov=true", "optimizer.nesterov: got true, expected false: there is no momentum"),
        ("optimizer=adam:momentum=0.9", "optimizer.momentum: got 0.9, expected its default, 0.0: it is for sgd"),
        ("optimizer=adamw:nesterov=true", "optimizer.nesterov: got true, expected its default, false: it is for sgd"),
        ("optimizer.eps=1e-3", "optimizer.eps: got 0.001, expected its default, 1e-08: it is for adam and adamw"),
        ("optimizer=adam:betas=[0.9, 1]", "optimizer.betas: got [0.9, 1.0], expected two numbers >= 0 and < 1"),
        ("optimizer=adam:betas=0.9", "optimizer.betas: got 0.9, expected [a number, a number]"),
        ("optimizer=adam:eps=0", "optimizer.eps: got 0.0, expected a number > 0"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay: got -1.0, expected a number >= 0"),
        ("optimizer.clip_norm=0", "optimizer.clip_norm: got 0.0, expected a number > 0, or null"),
        ("schedule=step", "schedule.step_samples: required with schedule.name=step"),
        ("schedule=step:step_samples=0", "schedule.step_samples: got 0, expected a number of samples > 0"),
        ("schedule=step:gamma=2", "schedule.gamma: got 2.0, expected a number > 0 and <= 1"),
        ("schedule=cosine:final=2", "schedule.final: got 2.0, expected a number >= 0 and <= 1"),
        ("schedule=cosine:gamma=0.2", "schedule.gamma: got 0.2, expected its default, 0.1: it is for step"),
        ("schedule.warmup_samples=-1", "schedule.warmup_samples: got -1, expected a number of samples >= 0"),
        ("checkpoint.every_samples=0", "checkpoint.every_samples: got 0, expected a number of samples >= 1"),
        ("checkpoint.keep=0", "checkpoint.keep: got 0"),
        ("survive.min_workers=0", "survive.min_workers: got 0"),
        ("survive.respawn=-1", "survive.respawn: got -1"),
        ("survive.ask_again_s=0", "survive.ask_again_s: got 0.0, expected a number of seconds > 0"),
        ("survive.stall_deadline_s=3", "got 3.0, expected a number of seconds >= stall_warning_s = 30.0"),
        ("tracker.discrepancy=none", "tracker.discrepancy: unknown value 'none'; known: bound, exact, off"),
        ("faults=3", "faults: got 3, expected a mapping of keys"),
        ("device=gpu", "device: unknown value 'gpu'"),
    ],
)
def test_a_wrong_value_is_refused_by_key_saying_got_and_expected(override: str, message: str) -> None:
    assert message in refused(override)


@pytest.mark.parametrize("ratio", ["0", "2", "-0.5", "nan", ".nan"])
def test_a_ratio_out_of_range_is_refused_by_key(ratio: str) -> None:
    text = refused(f"compressor={PART}:ratio={ratio}")
    assert text.startswith("command line: compressor.ratio: got ")
    assert ", expected " in text


def test_a_wrong_value_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"task: '{TASK}'\npolicy: {{name: stale_synchronous, bond: 4}}\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    expected = "unknown key of policy stale_synchronous 'bond'; nearest 'bound'; known: bound, name"
    assert str(caught.value) == f"{path}: policy.bond: {expected}"


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        (f"downlink={PART}", "downlink", f"got '{PART}'"),
        ("faults.crash={workers: 1}", "faults", "got {'crash': [{'workers': 1, "),
        ("checkpoint.every_samples=1000", "checkpoint.every_samples", "got 1000"),
        ("survive.respawn=1", "survive.respawn", "got 1"),
    ],
)
def test_what_this_version_cannot_do_is_refused_and_not_ignored(override: str, key: str, message: str) -> None:
    assert refused(override).startswith(f"command line: {key}: {message}")
    assert "which this version does not support: " in refused(override)


def test_shared_memory_and_running_ahead_are_not_to_be_had_together() -> None:
    both = ["transport=shared", "update.pipeline=1", "policy=message_passing"]
    with pytest.raises(ConfigError, match=r"update\.pipeline") as caught:
        load({"task": TASK}, both)
    assert caught.value.key == "transport"
    for transport in ("auto", "messages"):
        load({"task": TASK}, [*both, f"transport={transport}"])


def test_check_names_every_problem_and_load_the_first() -> None:
    source = {"task": TASK, "polcy": 1, "seed": -1, "train": {"samples": "x", "inti": 1, "on_nonfinite": "no"}}
    source |= {"compressor": {"name": PART, "ratio": 2, "error_feedback": 3}, "policy": {"name": "first_k", "k": 0}}
    errors = check(source, ["optimizer.lr=-1", "optimizer.weight_decay=-1", "survive.respawn=1"])
    keys = [error.key for error in errors]
    assert sorted(keys) == [
        *(
            "compressor.error_feedback",
            "compressor.ratio",
            "optimizer.lr",
            "optimizer.weight_decay",
            "polcy",
            "policy.k",
        ),
        *("seed", "survive.respawn", "train.inti", "train.on_nonfinite", "train.samples"),
    ]
    with pytest.raises(ConfigError) as caught:
        load(source, ["optimizer.lr=-1", "optimizer.weight_decay=-1", "survive.respawn=1"])
    assert str(caught.value) == str(errors[0])


def test_a_mistake_in_a_name_does_not_blame_the_keys_beside_it() -> None:
    assert [error.key for error in check({"task": TASK, "optimizer": "amad:betas=[0.8, 0.9]"})] == ["optimizer.name"]
    assert [error.key for error in check({"task": TASK, "policy": "frist_k:k=3"})] == ["policy.name"]
    assert [error.key for error in check({"task": TASK, "schedule": "step"})] == ["schedule.step_samples"]
    assert [error.key for error in check({"seed": 1})] == ["task"]


def test_a_good_configuration_has_no_problems() -> None:
    assert check({"task": TASK}) == []


def test_the_target_is_parsed_and_tested() -> None:
    train = made("train.stop_at=accuracy >= 9e-1", "train.evaluate_every_samples=10").train
    assert train.target == Target("accuracy", ">=", 0.9)
    assert train.target.reached({"accuracy": 0.9}) and not train.target.reached({"accuracy": 0.89})
    assert Train(evaluate_every_samples=1, stop_at="loss<=.1").target == Target("loss", "<=", 0.1)
    loss = Target("loss", "<=", 0.1)
    assert loss.reached({"loss": 0.1}) and not loss.reached({"loss": 0.2})
    assert not loss.reached({"loss": float("nan")})
    with pytest.raises(ConfigError, match=r"train\.stop_at: unknown metric 'acuracy'; nearest 'accuracy'"):
        Target("acuracy", ">=", 1).reached({"accuracy": 1.0, "loss": 0.0})
    assert Train().target is None


@pytest.mark.parametrize("name", ["pkg.mod:Own", "digits", "my-mod:Some_Task"])
def test_the_name_is_that_of_the_task_unless_given(name: str) -> None:
    assert load({"task": name}, plugins=False).name == name.rpartition(":")[2]
    assert load({"task": name, "name": "run-1"}, plugins=False).name == "run-1"


def test_plugins_may_be_left_as_written_without_importing_torch() -> None:
    code = (
        "import sys\nfrom ps_elastic.config.load import load\n"
        "c = load({'task': 'digits:batch_size=8', 'compressor': 'top_k:ratio=2'}, ['policy=first_k'], plugins=False)\n"
        "assert c.task.text() == 'digits:batch_size=8' and c.compressor.text() == 'top_k:ratio=2', c\n"
        "assert c.policy.settings == {'k': 2}\n"
        "print(sorted({'torch', 'numpy', 'mpi4py'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_digest_is_of_every_value_and_not_of_how_it_was_written() -> None:
    same = made("policy=stale_synchronous", "policy.bound=3").digest()
    assert same == made(policy={"bound": 3.0, "name": "stale_synchronous"}).digest()
    assert len(same) == 32
    assert made("seed=1").digest() != made("seed=2").digest()
    config = made()
    canonical = json.dumps(config.to_dict(), sort_keys=True, separators=(",", ":"))
    assert config.digest() == hashlib.sha256(canonical.encode()).digest()


def test_the_resolved_file_states_every_key_in_the_order_of_the_contract() -> None:
    lines = made().to_yaml().splitlines()
    keys = [line.partition(":")[0] for line in lines if not line.startswith((" ", "-"))]
    plugins = ["name", "task", "policy", "update", "compressor", "downlink"]
    sections = ["optimizer", "schedule", "train", "checkpoint", "survive", "faults", "simulation", "tracker"]
    scalars = ["transport", "views", "writers", "writing", "buckets", "device", "threads", "server_threads", "seed"]
    assert keys == [*plugins, *sections, *scalars]
    assert "  pipeline: 0" in lines


CHOICES = st.fixed_dictionaries(
    {"task": st.just(TASK)},
    optional={
        "name": st.from_regex(r"[a-z_][a-z0-9._-]{0,8}", fullmatch=True),
        "seed": st.integers(0, 2**63 - 1),
        "policy": st.sampled_from(["synchronous", "first_k:k=3", {"name": "stale_synchronous", "bound": 1}]),
        "compressor": st.builds(
            lambda ratio, feedback: {"name": PART, "ratio": ratio, "error_feedback": feedback},
            st.floats(1e-12, 1),
            st.sampled_from([True, False, "auto"]),
        ),
        "optimizer": st.one_of(
            st.builds(lambda lr, m: {"lr": lr, "momentum": m}, st.floats(1e-30, 1e30), st.floats(0, 0.99)),
            st.builds(lambda b: {"name": "adam", "betas": [b, 0.5]}, st.floats(0, 0.99)),
        ),
        "schedule": st.sampled_from(["constant", "cosine:final=0.1", "step:step_samples=5:gamma=0.5"]),
        "train": st.builds(
            lambda samples, init: {"samples": samples, "init": init}, st.integers(1, 10**12), st.none() | st.text()
        ),
        "buckets": st.sampled_from(["whole", "layer", 65536]),
    },
)


@few_or_many(25, 60)
def test_what_is_shown_reads_back_the_same(tmp_path: Path, count: int) -> None:
    @settings(deadline=None, max_examples=count)
    @given(CHOICES)
    def check(source: dict[str, Any]) -> None:
        config = load(source)
        assert load(config.to_dict()) == config
        path = tmp_path / "run.yaml"
        path.write_text(config.to_yaml(), encoding="utf-8")
        assert load(path) == config
        assert load(json.loads(json.dumps(config.to_dict()))).digest() == config.digest()

    check()


KEYS = [
    "policy",
    "policy.bound",
    "seed",
    "train.samples",
    "optimizer",
    "optimizer.lr",
    "compressor",
    "name",
    "faults",
    "x.y",
]


@settings(deadline=None)
@given(st.lists(st.builds(lambda key, value: f"{key}={value}", st.sampled_from(KEYS), st.text(max_size=8)), max_size=3))
def test_any_command_line_is_loaded_or_refused_with_exit_2(overrides: list[str]) -> None:
    try:
        config = load({"task": TASK}, overrides)
    except ConfigError:
        assert check({"task": TASK}, overrides)
    else:
        assert load(config.to_dict()) == config
