"""The sections of a configuration, each a frozen dataclass that checks its own values."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, NamedTuple

from ps_elastic.config.plugin import Plugin, one_line
from ps_elastic.errors import ConfigError, unknown
from ps_elastic.plugins import expect, plain, show


@dataclass(frozen=True)
class Update:
    """What a worker does between pull and push."""

    plugin: Plugin
    accumulate: int = 1  # batches whose mean gradient makes one push; larger: fewer, larger pushes
    pipeline: int = 0  # pushes that may be unanswered while the worker goes on; larger: less waiting, staler

    def __post_init__(self) -> None:
        expect(self.accumulate >= 1, self, "accumulate", "a number of batches >= 1")
        expect(0 <= self.pipeline <= 255, self, "pipeline", "a number of pushes >= 0 and <= 255")

    def text(self) -> str:
        """The one-line form, stating only what differs from the defaults."""
        return _text(self)


@dataclass(frozen=True)
class Compressor:
    """How a gradient travels from worker to server."""

    plugin: Plugin
    error_feedback: bool | Literal["auto"] = "auto"  # what was left out is added to the next; auto: where biased

    def text(self) -> str:
        """The one-line form, stating only what differs from the defaults."""
        return _text(self)


def _text(section: Any) -> str:
    common = {field.name: field.default for field in fields(section) if field.name != "plugin"}
    changed = {key: value for key, default in common.items() if (value := getattr(section, key)) != default}
    return f"{section.plugin.text()}{one_line('', changed)}"


@dataclass(frozen=True)
class Optimizer:
    """What the server does with a combined gradient; the meaning of each key is that of torch.optim."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.0  # sgd
    nesterov: bool = False  # sgd
    betas: tuple[float, float] = (0.9, 0.999)  # adam, adamw
    eps: float = 1e-8  # adam, adamw
    weight_decay: float = 0.0
    decay_norm_and_bias: bool = True  # false: no decay on normalisation weights and on biases
    clip_norm: float | None = None  # of each worker's own gradient, before it is encoded

    def __post_init__(self) -> None:
        expect(self.lr > 0, self, "lr", "a number > 0")
        expect(0 <= self.momentum < 1, self, "momentum", "a number >= 0 and < 1")
        expect(all(0 <= beta < 1 for beta in self.betas), self, "betas", "two numbers >= 0 and < 1")
        expect(self.eps > 0, self, "eps", "a number > 0")
        expect(self.weight_decay >= 0, self, "weight_decay", "a number >= 0")
        expect(self.clip_norm is None or self.clip_norm > 0, self, "clip_norm", "a number > 0, or null")
        refuse_foreign(self, {"sgd": ("momentum", "nesterov"), "adam": ("betas", "eps"), "adamw": ("betas", "eps")})
        expect(self.momentum > 0 or not self.nesterov, self, "nesterov", "false: there is no momentum")


@dataclass(frozen=True)
class Schedule:
    """How the learning rate changes with the samples used."""

    name: Literal["constant", "step", "cosine"] = "constant"
    warmup_samples: int = 0  # the rate rises linearly from 0 over so many samples
    step_samples: int | None = None  # step: the rate is multiplied by gamma after each so many samples
    gamma: float = 0.1  # step
    final: float = 0.0  # cosine: the part of `lr` that is left when `train.samples` are used

    def __post_init__(self) -> None:
        expect(self.warmup_samples >= 0, self, "warmup_samples", "a number of samples >= 0")
        expect(self.step_samples is None or self.step_samples > 0, self, "step_samples", "a number of samples > 0")
        expect(0 < self.gamma <= 1, self, "gamma", "a number > 0 and <= 1")
        expect(0 <= self.final <= 1, self, "final", "a number >= 0 and <= 1")
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

    samples: int = 100_000  # used by the server; the run ends at the first version that reaches them
    evaluate_every_samples: int | None = None  # null: only at the end
    stop_at: str | None = None  # `accuracy>=0.9` or `loss<=0.1`: end as soon as an evaluation says so
    on_nonfinite: Literal["stop", "drop"] = "stop"  # drop: try the next batch, at most 10 in a row
    init: str | None = None  # a file of parameters to start from
    autocast: Literal["bfloat16", "float16"] | None = None  # the type that workers compute in

    def __post_init__(self) -> None:
        every = self.evaluate_every_samples
        expect(self.samples >= 1, self, "samples", "a number of samples >= 1")
        expect(every is None or every >= 1, self, "evaluate_every_samples", "a number of samples >= 1, or null")
        if self.target and every is None:
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

    every_samples: int | None = None  # null: never
    keep: int = 3  # the newest so many stay

    def __post_init__(self) -> None:
        every = self.every_samples
        expect(every is None or every >= 1, self, "every_samples", "a number of samples >= 1, or null")
        expect(self.keep >= 1, self, "keep", "a number of checkpoints >= 1")


@dataclass(frozen=True)
class Survive:
    """What a run bears before it gives up."""

    min_workers: int = 1  # with fewer live workers the run ends with exit 5
    respawn: int = 0  # replacements that may be started for lost workers
    stall_warning_s: float = 30.0  # without a push: say who is awaited
    stall_deadline_s: float = 300.0  # without a push: end with exit 4
    ask_again_s: float = 60.0  # a worker without a reply asks again

    def __post_init__(self) -> None:
        expect(self.min_workers >= 1, self, "min_workers", "a number of workers >= 1")
        expect(self.respawn >= 0, self, "respawn", "a number of workers >= 0")
        for key in ("stall_warning_s", "stall_deadline_s", "ask_again_s"):
            expect(getattr(self, key) > 0, self, key, "a number of seconds > 0")
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
    mean_s: float = 0.1  # of a worker of speed 1
    shape: float = 2.5  # pareto: tail exponent, > 1; smaller: rarer and longer delays
    trace: str | None = None  # trace: a run folder, or a file with one number of seconds a line
    speeds: tuple[float, ...] = ()  # of workers 1, 2, ..., repeated; times are divided by it; empty: 1
    spread: float = 0.0  # standard deviation of the logarithm of a further speed, drawn once per worker
    straggler_share: float = 0.0  # part of the workers that is slow for the whole run, drawn by the seed
    straggler_chance: float = 0.0  # that a push of any worker is slow
    straggler_factor: float = 5.0  # a slow push takes so many times as long
    cores: int | None = None  # that all workers share, first come first served; null: one each

    def __post_init__(self) -> None:
        expect(self.mean_s > 0, self, "mean_s", "a number of seconds > 0")
        expect(self.shape > 1, self, "shape", "a number > 1: the mean is infinite else")
        expect(all(speed > 0 for speed in self.speeds), self, "speeds", "numbers > 0")
        expect(self.spread >= 0, self, "spread", "a number >= 0")
        expect(0 <= self.straggler_share <= 1, self, "straggler_share", "a number from 0 to 1")
        expect(0 <= self.straggler_chance <= 1, self, "straggler_chance", "a number from 0 to 1")
        expect(self.straggler_factor >= 1, self, "straggler_factor", "a number >= 1")
        expect(self.cores is None or self.cores >= 1, self, "cores", "a number of cores >= 1, or null")
        drawn = {"constant": ("mean_s",), "exponential": ("mean_s",), "pareto": ("mean_s", "shape")}
        refuse_foreign(self, {**drawn, "trace": ("trace",)})
        if self.name == "trace" and self.trace is None:
            raise ConfigError("required with name=trace: a run folder, or a file of numbers", key="trace")


@dataclass(frozen=True)
class Network:
    """How a message travels between a worker and the server, in each direction; and the server's own time."""

    latency_s: float = 1e-4  # one way
    bandwidth_bytes_per_s: float | None = None  # of each worker's link; null: no limit
    server_bandwidth_bytes_per_s: float | None = None  # of the server's link, which all share; null: no limit
    service_s: float = 0.0  # that the server takes for each push; they queue for it

    def __post_init__(self) -> None:
        expect(self.latency_s >= 0, self, "latency_s", "a number of seconds >= 0")
        expect(self.service_s >= 0, self, "service_s", "a number of seconds >= 0")
        for key in ("bandwidth_bytes_per_s", "server_bandwidth_bytes_per_s"):
            expect((value := getattr(self, key)) is None or value > 0, self, key, "a number of bytes > 0, or null")


@dataclass(frozen=True)
class Norms:
    """The norms that pushes have where nothing is computed (`--headers-only`).

    A push at n samples has norm (final + (initial - final) 2^(-n / half_life_samples)) e^(spread N(0, 1)).
    """

    initial: float = 1.0
    final: float | None = None  # null: as the initial one
    half_life_samples: int | None = None  # null: no decay
    spread: float = 0.0  # standard deviation of the logarithm
    coherence: float = 0.5  # part of the squared norm that all pushes have in common; the rest is noise of their own

    def __post_init__(self) -> None:
        expect(self.initial > 0, self, "initial", "a number > 0")
        expect(self.final is None or self.final >= 0, self, "final", "a number >= 0, or null")
        half_life = self.half_life_samples
        expect(half_life is None or half_life > 0, self, "half_life_samples", "a number of samples > 0, or null")
        expect(self.spread >= 0, self, "spread", "a number >= 0")
        expect(0 <= self.coherence <= 1, self, "coherence", "a number from 0 to 1")
        if (half_life is None) != (self.final is None):
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
    read_s: float = 0.0  # that a worker takes to read the model with `views: torn`; longer: views are more torn
    deadline_s: float | None = (
        None  # virtual; then the run ends with exit 4. null: 100 times what one worker would need
    )

    def __post_init__(self) -> None:
        expect(self.read_s >= 0, self, "read_s", "a number of seconds >= 0")
        expect(self.deadline_s is None or self.deadline_s > 0, self, "deadline_s", "a number of seconds > 0, or null")
