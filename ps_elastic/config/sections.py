"""The sections of a configuration, each a frozen dataclass: a range stands with the type, and `__post_init__` checks
what concerns several keys.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, NamedTuple

from ps_elastic.config.plugin import Plugin, one_line
from ps_elastic.errors import ConfigError, unknown
from ps_elastic.plugins import (
    BelowOne,
    Duration,
    NotNegative,
    Positive,
    Range,
    Time,
    UpToOne,
    Workers,
    expect,
    plain,
    show,
)

# Ranges that only a configuration has
Share = Annotated[float, Range("a number from 0 to 1")]
Exponent = Annotated[float, Range("a number > 1: the mean is infinite else")]
Speeds = Annotated[tuple[float, ...], Range("numbers > 0")]
Part = Annotated[float, Range("a number >= 0 and <= 1")]
Batches = Annotated[int, Range("a number of batches >= 1")]
Unanswered = Annotated[int, Range("a number of pushes >= 0 and <= 255")]
Samples = Annotated[int, Range("a number of samples >= 1")]
Warmup = Annotated[int, Range("a number of samples >= 0")]
# and may be null
Limit = Annotated[float | None, Range("a number > 0, or null")]
Deadline = Annotated[float | None, Range("a number of seconds > 0, or null")]
Bandwidth = Annotated[float | None, Range("a number of bytes > 0, or null")]
Every = Annotated[int | None, Range("a number of samples >= 1, or null")]
Cores = Annotated[int | None, Range("a number of cores >= 1, or null")]
Interval = Annotated[int | None, Range("a number of samples > 0")]


class _Holder:
    """A section with keys beside those of the plug-in that it holds."""

    plugin: Plugin

    def text(self) -> str:
        """The one-line form, stating only what differs from the defaults."""
        common = {field.name: field.default for field in fields(self) if field.name != "plugin"}  # type: ignore[arg-type]
        changed = {key: value for key, default in common.items() if (value := getattr(self, key)) != default}
        return f"{self.plugin.text()}{one_line('', changed)}"


@dataclass(frozen=True)
class Update(_Holder):
    """What a worker does between pull and push."""

    plugin: Plugin
    accumulate: Batches = 1  # batches whose mean gradient makes one push; larger: fewer, larger pushes
    pipeline: Unanswered = 0  # pushes that may be unanswered while the worker goes on; larger: less waiting, staler


@dataclass(frozen=True)
class Compressor(_Holder):
    """How a gradient travels from worker to server."""

    plugin: Plugin
    error_feedback: bool | Literal["auto"] = "auto"  # what was left out is added to the next; auto: where biased

    @property
    def feeds_back(self) -> bool:
        """Whether it is so."""
        return bool(self.plugin.build().biased if self.error_feedback == "auto" else self.error_feedback)


@dataclass(frozen=True)
class Optimizer:
    """What the server does with a combined gradient; the meaning of each key is that of torch.optim."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Positive = 0.1
    momentum: BelowOne = 0.0  # sgd
    nesterov: bool = False  # sgd
    betas: Annotated[tuple[float, float], Range("two numbers >= 0 and < 1")] = (0.9, 0.999)  # adam, adamw
    eps: Positive = 1e-8  # adam, adamw
    weight_decay: NotNegative = 0.0
    decay_norm_and_bias: bool = True  # false: no decay on normalisation weights and on biases
    clip_norm: Limit = None  # of each worker's own gradient, before it is encoded

    def __post_init__(self) -> None:
        refuse_foreign(self, {"sgd": ("momentum", "nesterov"), "adam": ("betas", "eps"), "adamw": ("betas", "eps")})
        expect(self.momentum > 0 or not self.nesterov, self, "nesterov", "false: there is no momentum")


@dataclass(frozen=True)
class Schedule:
    """How the learning rate changes with the samples used."""

    name: Literal["constant", "step", "cosine"] = "constant"
    warmup_samples: Warmup = 0  # the rate rises linearly from 0 over so many samples
    step_samples: Interval = None  # step: the rate is multiplied by gamma after each so many samples
    gamma: UpToOne = 0.1  # step
    final: Part = 0.0  # cosine: the part of `lr` that is left when `train.samples` are used

    def __post_init__(self) -> None:
        refuse_foreign(self, {"step": ("step_samples", "gamma"), "cosine": ("final",)})
        if self.name == "step" and self.step_samples is None:
            raise ConfigError("required with schedule.name=step: a number of samples > 0", key="step_samples")


def refuse_foreign(section: Any, keys_of: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse values, other than the default, of keys that `section.name` does not use; keys_of: name -> its keys."""
    own = keys_of.get(section.name, ())
    for field in fields(section):
        users = [name for name, keys in keys_of.items() if field.name in keys]
        ignored = bool(users) and field.name not in own
        only = f"its default, {show(field.default)}: it is for {' and '.join(users)}"
        expect(not ignored or getattr(section, field.name) == field.default, section, field.name, only)


class Target(NamedTuple):
    """A metric that is to come as far as `value`."""

    metric: str
    op: str  # ">=" or "<="
    value: float

    def reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether the outcome of an evaluation is there. Raises ConfigError if it lacks the metric."""
        if self.metric not in metrics:
            raise ConfigError(unknown("metric", self.metric, metrics), key="train.stop_at")
        return _COMPARE[self.op](metrics[self.metric], self.value)


_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


_COMPARE: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Train:
    """How long to train, and what to watch."""

    samples: Samples = 100_000  # used by the server; the run ends at the first version that reaches them
    evaluate_every_samples: Every = None  # null: only at the end
    stop_at: str | None = None  # `accuracy>=0.9` or `loss<=0.1`: end as soon as an evaluation says so
    on_nonfinite: Literal["stop", "drop"] = "stop"  # drop: try the next batch, at most 10 in a row
    init: str | None = None  # a file of parameters to start from
    autocast: Literal["bfloat16", "float16"] | None = None  # the type that workers compute in

    def __post_init__(self) -> None:
        if self.target and self.evaluate_every_samples is None:
            raise ConfigError("required with train.stop_at: a number of samples >= 1", key="evaluate_every_samples")

    @property
    def target(self) -> Target | None:
        """`stop_at`, parsed. Raises ConfigError."""
        if self.stop_at is None:
            return None
        parts = re.fullmatch(rf"(\w+)\s*(>=|<=)\s*({_NUMBER})", self.stop_at)
        if parts is None:
            raise ConfigError(f"got {show(self.stop_at)}, expected METRIC>=NUMBER or METRIC<=NUMBER", key="stop_at")
        metric, op, value = parts.groups()
        return Target(metric, op, float(value))


@dataclass(frozen=True)
class Checkpoint:
    """When the state of a run is saved."""

    every_samples: Every = None  # null: never
    keep: Annotated[int, Range("a number of checkpoints >= 1")] = 3  # the newest so many stay


@dataclass(frozen=True)
class Survive:
    """What a run bears before it gives up."""

    min_workers: Workers = 1  # with fewer live workers the run ends with exit 5
    respawn: Annotated[int, Range("a number of workers >= 0")] = 0  # replacements that may be started for lost workers
    stall_warning_s: Duration = 30.0  # without a push: say who is awaited
    stall_deadline_s: Duration = 300.0  # without a push: end with exit 4
    ask_again_s: Duration = 60.0  # a worker without a reply asks again

    def __post_init__(self) -> None:
        least = f"a number of seconds >= stall_warning_s = {show(self.stall_warning_s)}"
        expect(self.stall_deadline_s >= self.stall_warning_s, self, "stall_deadline_s", least)


@dataclass(frozen=True)
class Tracker:
    """How the distance between a worker's view and the server's model is known."""

    discrepancy: Literal["exact", "bound", "off"] = "exact"  # bound: from path lengths, no snapshot of a view is kept


def to_dict(section: Any) -> dict[str, Any]:
    """The section as a file would state it in full."""
    stated: dict[str, Any] = {}
    for field in fields(section):
        value = getattr(section, field.name)
        if field.name == "plugin":
            stated |= value.to_dict()
        else:
            stated[field.name] = to_dict(value) if is_dataclass(value) else plain(value)
    return stated


@dataclass(frozen=True)
class Compute:
    """How long a worker takes for one push, in virtual seconds."""

    name: Literal["constant", "exponential", "pareto", "trace"] = "constant"
    mean_s: Duration = 0.1  # of a worker of speed 1
    shape: Exponent = 2.5  # pareto: tail exponent, > 1; smaller: rarer and longer delays
    trace: str | None = None  # trace: a run folder, or a file with one number of seconds a line
    speeds: Speeds = ()  # of workers 1, 2, ..., repeated; times are divided by it; empty: 1
    spread: NotNegative = 0.0  # standard deviation of the logarithm of a further speed, drawn once per worker
    straggler_share: Share = 0.0  # part of the workers that is slow for the whole run, drawn by the seed
    straggler_chance: Share = 0.0  # that a push of any worker is slow
    straggler_factor: Annotated[float, Range("a number >= 1")] = 5.0  # a slow push takes so many times as long
    cores: Cores = None  # that all workers share, first come first served; null: one each

    def __post_init__(self) -> None:
        drawn = {"constant": ("mean_s",), "exponential": ("mean_s",), "pareto": ("mean_s", "shape")}
        refuse_foreign(self, {**drawn, "trace": ("trace",)})
        if self.name == "trace" and self.trace is None:
            raise ConfigError("required with name=trace: a run folder, or a file of numbers", key="trace")


@dataclass(frozen=True)
class Network:
    """How a message travels between a worker and the server, in each direction; and the server's own time."""

    latency_s: Time = 1e-4  # one way
    bandwidth_bytes_per_s: Bandwidth = None  # of each worker's link; null: no limit
    server_bandwidth_bytes_per_s: Bandwidth = None  # of the server's link, which all share; null: no limit
    service_s: Time = 0.0  # that the server takes for each push; they queue for it


@dataclass(frozen=True)
class Norms:
    """The norms that pushes have where nothing is computed (`--headers-only`).

    A push at n samples has norm (final + (initial - final) 2^(-n / half_life_samples)) e^(spread N(0, 1)).
    """

    initial: Positive = 1.0
    final: Annotated[float | None, Range("a number >= 0, or null")] = None  # null: as the initial one
    half_life_samples: Annotated[int | None, Range("a number of samples > 0, or null")] = None  # null: no decay
    spread: NotNegative = 0.0  # standard deviation of the logarithm
    coherence: Share = 0.5  # part of the squared norm that all pushes have in common; the rest is noise of their own

    def __post_init__(self) -> None:
        if (self.half_life_samples is None) != (self.final is None):
            raise ConfigError("final and half_life_samples go together: state both or neither", key="final")

    def at(self, samples: int) -> float:
        """The norm after `samples`, without noise."""
        if self.half_life_samples is None or self.final is None:
            return self.initial
        left: float = 2.0 ** (-samples / self.half_life_samples)
        return self.final + (self.initial - self.final) * left


@dataclass(frozen=True)
class Simulation:
    """What `ps-elastic simulate` assumes of machines and network; other commands leave it alone."""

    compute: Compute = Compute()
    network: Network = Network()
    norms: Norms = Norms()
    read_s: Time = 0.0  # that a worker takes to read the model with `views: torn`; longer: views are more torn
    deadline_s: Deadline = None  # virtual; then the run ends with exit 4. null: 100 times what one worker would need
