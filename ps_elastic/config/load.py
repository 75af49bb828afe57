"""A run, described: YAML and `key=value` become frozen, checked dataclasses, once, before anything starts.

Only `task` is required. Unknown keys are refused with the nearest known one; so are values of the wrong type, values
out of range, and values that this version cannot carry out. Code never reads the raw dictionary.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

from ruamel.yaml import YAML

from ps_elastic.config import faults
from ps_elastic.config.compatibility import misfits
from ps_elastic.config.faults import Faults
from ps_elastic.config.limits import unsupported
from ps_elastic.config.plugin import Plugin, resolve, state
from ps_elastic.config.sections import (
    Checkpoint,
    Compressor,
    Optimizer,
    Schedule,
    Survive,
    Target,
    Tracker,
    Train,
    Update,
    to_dict,
)
from ps_elastic.config.sources import NAMED, Source, Tree, gather
from ps_elastic.errors import ConfigError
from ps_elastic.simulation.costs import Simulation
from ps_elastic.values import expect, init_types, make, plain, show

__all__ = [
    "Checkpoint",
    "Compressor",
    "Config",
    "Faults",
    "Optimizer",
    "Plugin",
    "Schedule",
    "Simulation",
    "Survive",
    "Target",
    "Tracker",
    "Train",
    "Update",
    "check",
    "load",
]


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes; made by `load`."""

    name: str  # of the run's folder and job
    task: Plugin
    policy: Plugin
    update: Update
    compressor: Compressor
    downlink: Plugin  # server to worker
    optimizer: Optimizer
    schedule: Schedule
    train: Train
    checkpoint: Checkpoint
    survive: Survive
    faults: Faults
    simulation: Simulation
    tracker: Tracker
    transport: Literal["auto", "messages", "shared"] = "auto"
    views: Literal["exact", "torn"] = "exact"  # torn: workers of this host read the model while it is written
    writers: Literal["server", "workers"] = "server"  # workers, with torn views: each adds its own updates to the model
    writing: Literal["lock", "plain"] = "lock"  # plain: workers write at the same time, and some of it is lost
    buckets: Literal["whole", "layer", "auto"] | int = "whole"  # a number: bytes of a bucket; auto: measured
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 1  # of each worker
    server_threads: Literal["auto"] | int = 1  # auto: what the workers leave of the host
    seed: int = 0

    def __post_init__(self) -> None:
        named = "letters, digits, '.', '_' and '-', the first a letter, a digit or '_'"
        expect(bool(re.fullmatch(r"\w[\w.-]*", self.name)), self, "name", named)
        expect(isinstance(self.buckets, str) or self.buckets >= 4, self, "buckets", "a number of bytes >= 4, or a name")
        expect(self.threads >= 1, self, "threads", "a number of threads >= 1")
        server = self.server_threads
        expect(isinstance(server, str) or server >= 1, self, "server_threads", "a number of threads >= 1, or auto")
        expect(0 <= self.seed < 2**63, self, "seed", "a whole number >= 0 and < 2^63")

    @property
    def most_threads(self) -> int:
        """Threads of the rank that is given the most; `auto` takes only what is left."""
        return max(self.threads, 1 if isinstance(self.server_threads, str) else self.server_threads)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every default stated; `load` gives the same Config back."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    def to_yaml(self) -> str:
        """`to_dict` as YAML."""
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.width = 10_000
        text = io.StringIO()
        yaml.dump(self.to_dict(), text)
        return text.getvalue()

    def settled(self, buckets: str | int = "whole") -> Config:
        """This configuration, with `buckets: auto` as it was chosen; without ranks to measure on it is whole."""
        return replace(self, buckets=buckets) if self.buckets == "auto" else self  # type: ignore[arg-type]

    def digest(self) -> bytes:
        """The SHA-256 of `to_dict`, 32 bytes: equal on ranks that were given the same configuration."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":")).encode()).digest()


def _plain(value: Any) -> Any:
    if isinstance(value, Plugin | Faults):
        return value.to_dict()
    return to_dict(value) if hasattr(type(value), "__dataclass_fields__") else plain(value)


def load(source: Source, overrides: Sequence[str] = (), *, plugins: bool = True, simulated: bool = False) -> Config:
    """Return the configuration in `source` (a file, or a mapping) with `key=value` overrides laid over it.

    plugins=False: the task, the compressors and the update stay as written, their modules (and torch) not imported.
    simulated: what only a simulation can do is accepted too. Raises ConfigError for the first problem.
    """
    config, problems = _read(source, overrides, plugins, simulated)
    if problems:
        raise problems[0]
    assert config is not None
    return config


def check(source: Source, overrides: Sequence[str] = ()) -> list[ConfigError]:
    """Return every problem of the configuration, at most one of each value; the empty list: `load` will do."""
    return _read(source, overrides, plugins=True, simulated=False)[1]


def _read(
    source: Source, overrides: Sequence[str], plugins: bool, simulated: bool
) -> tuple[Config | None, list[ConfigError]]:
    try:
        written = gather(source, overrides)
    except ConfigError as error:
        return None, [error]
    config, problems = _build(written.tree, plugins)
    if config is not None:
        problems += unsupported(config, simulated)
    if config is not None and plugins and not problems:
        problems += misfits(config)
    return config, [written.blame(problem) for problem in problems]


_PLUGINS = {
    "task": "task",
    "policy": "policy",
    "update": "update",
    "compressor": "compressor",
    "downlink": "compressor",
}
_HOLDERS: dict[str, type] = {"update": Update, "compressor": Compressor}  # sections with keys beside the plug-in's
_PLAIN: dict[str, type] = {
    "optimizer": Optimizer,
    "schedule": Schedule,
    "train": Train,
    "checkpoint": Checkpoint,
    "survive": Survive,
    "simulation": Simulation,
    "tracker": Tracker,
}


def _build(tree: Tree, plugins: bool) -> tuple[Config | None, list[ConfigError]]:
    values = dict(tree)
    problems: list[ConfigError] = []
    for key, kind in _PLUGINS.items():
        section = tree.get(key, {})
        values[key], found = _plugin(key, kind, section, plugins or kind == "policy")
        problems += [problem.within(key) for problem in found]
    for key, cls in _PLAIN.items():
        values[key], found = _section(cls, tree.get(key))
        problems += [problem.within(key) for problem in found]
    values["faults"], found = faults.read(tree.get("faults") or {})
    problems += [problem.within("faults") for problem in found]
    if tree.get("name") is None:
        values["name"] = re.sub(r"[^\w.]+", "-", values["task"].name.rpartition(":")[2]).lstrip(".-") or "run"
    config, _, found = make(Config, values)
    return config, problems + found


def _plugin(key: str, kind: str, section: Tree, resolved: bool) -> tuple[Any, list[ConfigError]]:
    if key == "task" and "name" not in section:
        return Plugin(kind, "task", section), [ConfigError("required: what to train, such as `task: digits`")]
    shared = NAMED[key].shared
    plugin, problems = (resolve if resolved else state)(kind, section, shared)
    if key not in _HOLDERS:
        return plugin, problems
    common = {name: section[name] for name in shared if name in section}
    holder, _, found = make(_HOLDERS[key], {"plugin": plugin, **common})
    return holder, problems + found


def _section(cls: type, section: Any) -> tuple[Any, list[ConfigError]]:
    if section is not None and not isinstance(section, dict):
        return cls(), [ConfigError(f"got {show(section)}, expected a mapping of keys")]
    values, inner = dict(section or {}), []
    for key, hint in init_types(cls).items():
        if is_dataclass(hint):
            values[key], found = _section(hint, values.get(key))  # type: ignore[arg-type]
            inner += [problem.within(key) for problem in found]
    made, _, problems = make(cls, values)
    return made or cls(), inner + problems
