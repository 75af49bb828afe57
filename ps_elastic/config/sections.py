"""The sections of a configuration, each a frozen dataclass that checks its own values."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, NamedTuple

from ps_elastic.config.plugin import Plugin, one_line
from ps_elastic.errors import ConfigError, unknown
from ps_elastic.values import expect, plain, show


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
