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
    """The worker algorithm, from the model received to the push sent."""

    plugin: Plugin
    accumulate: Batches = 1  # batches whose mean gradient is one push; larger: fewer pushes with less noise
    # pushes without reply with which a worker continues (pipelining); larger: less waiting, staler
    pipeline: Unanswered = 0


@dataclass(frozen=True)
class Compressor(_Holder):
    """The compressor of a gradient on its way from a worker to the server."""

    plugin: Plugin
    # add what was left out to the next push. auto: if the compressor is biased
    error_feedback: bool | Literal["auto"] = "auto"

    @property
    def feeds_back(self) -> bool:
        """Whether it is so."""
        return bool(self.plugin.build().biased if self.error_feedback == "auto" else self.error_feedback)


@dataclass(frozen=True)
class Optimizer:
    """The server's optimizer, which applies the combined gradient; each key means what it means in torch.optim."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"  # as in torch.optim
    lr: Positive = 0.1  # learning rate; the schedule and the step scale multiply it. Larger: faster, less stable
    # of sgd: fraction of the last step that the next one keeps; larger: smoother, slower to turn
    momentum: BelowOne = 0.0
    nesterov: bool = False  # of sgd: the form of Nesterov
    # of adam and adamw: memory of the mean and of the mean square; larger: longer
    betas: Annotated[tuple[float, float], Range("two numbers >= 0 and < 1")] = (0.9, 0.999)
    eps: Positive = 1e-8  # of adam and adamw, in gradient units: added to the root mean square; larger: smaller steps
    weight_decay: NotNegative = 0.0  # L2 penalty, or the decoupled decay of adamw; larger: smaller parameters
    decay_norm_and_bias: bool = True  # false: no decay of normalisation weights and biases
    # largest norm of a worker's gradient, cut before it is encoded; smaller: cuts more. null: no limit
    clip_norm: Limit = None

    def __post_init__(self) -> None:
        refuse_foreign(self, {"sgd": ("momentum", "nesterov"), "adam": ("betas", "eps"), "adamw": ("betas", "eps")})
        expect(self.momentum > 0 or not self.nesterov, self, "nesterov", "false: there is no momentum")


@dataclass(frozen=True)
class Schedule:
    """The change of the learning rate with the samples used."""

    name: Literal["constant", "step", "cosine"] = "constant"  # constant, in steps, or along half a cosine
    warmup_samples: Warmup = 0  # used samples over which the learning rate rises linearly from 0; larger: longer
    step_samples: Interval = None  # of step: used samples from one multiplication by gamma to the next; larger: rarer
    gamma: UpToOne = 0.1  # of step: the learning rate is multiplied by it; smaller: falls faster
    final: Part = 0.0  # of cosine: fraction of `lr` that is left when `train.samples` are used

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
    """The length of a run, its evaluations, and where it starts."""

    samples: Samples = 100_000  # samples used by the server; the run ends at the first version that reaches them
    # used samples from one evaluation to the next; larger: rarer. null: only at the end
    evaluate_every_samples: Every = None
    stop_at: str | None = None  # `accuracy>=0.9` or `loss<=0.1`: end as soon as an evaluation says so. null: no target
    # a gradient that is not finite. stop: exit 1; drop: try the next batch, at most 10 in a row
    on_nonfinite: Literal["stop", "drop"] = "stop"
    init: str | None = None  # a safetensors file of parameters to start from. null: those of the task
    # type in which workers compute, by torch.autocast; float16 is not supported. null: that of the model
    autocast: Literal["bfloat16", "float16"] | None = None

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
    """Saved states of a run, which this version does not write."""

    every_samples: Every = None  # used samples from one checkpoint to the next; only null (never) is supported
    # checkpoints that stay, the newest; no effect, since none are written
    keep: Annotated[int, Range("a number of checkpoints >= 1")] = 3


@dataclass(frozen=True)
class Survive:
    """The losses and silences that a run bears before it ends."""

    min_workers: Workers = 1  # live workers; with fewer the run ends with exit 5
    respawn: Annotated[int, Range("a number of workers >= 0")] = 0  # replacements for lost workers; only 0 is supported
    stall_warning_s: Duration = 30.0  # seconds without a push; then the server says who is awaited
    stall_deadline_s: Duration = 300.0  # seconds without a push; then the run ends with exit 4
    ask_again_s: Duration = 60.0  # seconds without a reply; then a worker sends a retry request

    def __post_init__(self) -> None:
        least = f"a number of seconds >= stall_warning_s = {show(self.stall_warning_s)}"
        expect(self.stall_deadline_s >= self.stall_warning_s, self, "stall_deadline_s", least)


@dataclass(frozen=True)
class Tracker:
    """The measurement of the discrepancy D, from a worker's copy of the model to the server's model at use."""

    # exact: D of every push used; bound: the cumulative step length instead, for which no version is kept; off: neither
    discrepancy: Literal["exact", "bound", "off"] = "exact"


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
    """The time that a worker takes for one push, in simulated seconds."""

    # compute-time distribution, or trace: recorded times
    name: Literal["constant", "exponential", "pareto", "trace"] = "constant"
    mean_s: Duration = 0.1  # mean seconds of one push, of a worker of speed 1; larger: slower
    shape: Exponent = 2.5  # of pareto: tail exponent; smaller: rarer and longer delays
    trace: str | None = None  # of trace: the folder of a run, or a file with one number of seconds a line
    speeds: Speeds = ()  # of workers 1, 2, ..., repeated: times are divided by it. Larger: faster; empty: 1
    # standard deviation of the logarithm of a further speed, drawn once a worker; larger: less alike
    spread: NotNegative = 0.0
    straggler_share: Share = 0.0  # fraction of the workers that is slow for the whole run, drawn by the seed
    straggler_chance: Share = 0.0  # probability that a push of any worker is slow
    straggler_factor: Annotated[float, Range("a number >= 1")] = 5.0  # times as long as usual that a slow push takes
    cores: Cores = None  # cores that all workers share, first come first served; fewer: slower. null: one each

    def __post_init__(self) -> None:
        drawn = {"constant": ("mean_s",), "exponential": ("mean_s",), "pareto": ("mean_s", "shape")}
        refuse_foreign(self, {**drawn, "trace": ("trace",)})
        if self.name == "trace" and self.trace is None:
            raise ConfigError("required with name=trace: a run folder, or a file of numbers", key="trace")


@dataclass(frozen=True)
class Network:
    """The time of a message between a worker and the server, in each direction, and the server's own time."""

    latency_s: Time = 1e-4  # seconds one way, whatever the size; larger: slower
    bandwidth_bytes_per_s: Bandwidth = None  # bytes a second of each worker's link; smaller: slower. null: no limit
    # bytes a second of the server's link, which all share. null: no limit
    server_bandwidth_bytes_per_s: Bandwidth = None
    service_s: Time = 0.0  # seconds of the server for each push, for which they queue; larger: slower


@dataclass(frozen=True)
class Norms:
    """The norms of pushes in a timing-only simulation (`--headers-only`).

    A push at n samples has norm (final + (initial - final) 2^(-n / half_life_samples)) e^(spread N(0, 1)).
    """

    initial: Positive = 1.0  # norm of a push at the start, in gradient units
    # norm that it comes to, in gradient units. null: as the initial one
    final: Annotated[float | None, Range("a number >= 0, or null")] = None
    # samples in which it comes half of the way; larger: slower. null: no decay
    half_life_samples: Annotated[int | None, Range("a number of samples > 0, or null")] = None
    spread: NotNegative = 0.0  # standard deviation of the logarithm; larger: norms differ more
    coherence: Share = 0.5  # fraction of the squared norm that all pushes have in common; larger: less noise

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
    """The machines and the network of `ps-elastic simulate`; other commands ignore it."""

    compute: Compute = Compute()
    network: Network = Network()
    norms: Norms = Norms()
    read_s: Time = 0.0  # seconds to read the model with `views: torn`; larger: reads are less consistent
    # simulated seconds; then the run ends with exit 4. null: 100 times what one worker would need
    deadline_s: Deadline = None
