"""A plug-in as a configuration states it: a kind, a name and settings; and how that becomes an instance."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ps_elastic.config.sources import read_yaml
from ps_elastic.config.values import complaint, make
from ps_elastic.errors import ConfigError
from ps_elastic.plugins import Registry, parse_one_line, plain, settings

# kind -> the package of its registry, the registry's name there, and the class that all of the kind derive from
_KINDS = {
    "policy": ("ps_elastic.policies", "policies", "Policy"),
    "compressor": ("ps_elastic.compressors", "compressors", "Compressor"),
    "task": ("ps_elastic.tasks", "tasks", "Task"),
    "combiner": ("ps_elastic.server.combiners", "combiners", "Combiner"),
    "update": ("ps_elastic.worker.updates", "updates", "Update"),
}


@dataclass(frozen=True)
class Plugin:
    """A checked choice of one plug-in. `settings` holds all of its settings, defaults filled in."""

    kind: str  # "policy", "compressor", "task" or "update"
    name: str  # as registered, or `module:Class`
    settings: Mapping[str, Any]
    changed: tuple[str, ...] | None = field(default=None, compare=False, repr=False)  # None: not compared with defaults

    def build(self) -> Any:
        """A new instance with these settings; no two share a list."""
        return registry(self.kind).load(self.name)(**copy.deepcopy(dict(self.settings)))

    def text(self) -> str:
        """The one-line form, stating only what differs from the defaults: `top_k:ratio=0.1`."""
        names = self.settings if self.changed is None else self.changed
        return one_line(self.name, {name: self.settings[name] for name in names})

    def to_dict(self) -> dict[str, Any]:
        """The section as a file would state it in full."""
        return {"name": self.name, **plain(self.settings)}


def one_line(name: str, stated: Mapping[str, Any]) -> str:
    """`name:key=value:...`; reads back the same unless a text holds a colon."""
    return ":".join([name, *(f"{key}={_scalar(plain(value))}" for key, value in stated.items())])


def resolve(kind: str, section: Mapping[str, Any], shared: Sequence[str] = ()) -> tuple[Plugin, list[ConfigError]]:
    """Return the plug-in that `section` states, and every problem found; imports the plug-in's module.

    shared: keys of the section that are not settings of the plug-in. With problems, the plug-in cannot be built.
    """
    unresolved, problems = state(kind, section, shared)
    if problems:
        return unresolved, problems
    reserved = ("name", *shared)
    try:
        cls = load_class(kind, unresolved.name)
        defaults = settings(cls)
        if taken := [key for key in reserved if key in defaults]:
            raise ConfigError(
                f"class {cls.__qualname__} has a setting of that name, which every section has", key=taken[0]
            )
        _, values, problems = make(cls, unresolved.settings, reserved, f"key of {kind} {unresolved.name}")
    except ConfigError as error:
        return unresolved, [error]
    changed = tuple(key for key, value in values.items() if value != defaults[key])
    return Plugin(kind, unresolved.name, values, changed), problems


def from_line(kind: str, text: str) -> Any:
    """A new instance of what `name:key=value:...` names. Raises ConfigError for an unknown name or setting."""
    name, options = parse_one_line(text)
    return built(kind, {"name": name, **{key: read_yaml(value) for key, value in options.items()}})


def built(kind: str, section: Mapping[str, Any]) -> Any:
    """A new instance of what a section states. Raises ConfigError for the first problem."""
    plugin, problems = resolve(kind, section)
    if problems:
        raise problems[0]
    return plugin.build()


def state(kind: str, section: Mapping[str, Any], shared: Sequence[str] = ()) -> tuple[Plugin, list[ConfigError]]:
    """Return the plug-in as written, its class not looked up: `settings` holds what was stated, unchecked."""
    stated = {key: value for key, value in section.items() if key != "name" and key not in shared}
    name = section.get("name")
    problems = [] if isinstance(name, str) else [ConfigError(complaint(name, str), key="name")]
    return Plugin(kind, str(name), stated), problems


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) and _reads_back(value) else json.dumps(value)


def _reads_back(text: str) -> bool:
    try:
        return bool(read_yaml(text) == text)
    except ConfigError:
        return False


def registry(kind: str) -> Registry[Any]:
    """Where the plug-ins of `kind` are known by name; imports their package."""
    package, attribute, _ = _KINDS[kind]
    registry: Registry[Any] = getattr(importlib.import_module(package), attribute)
    return registry


def load_class(kind: str, name: str) -> type:
    """The class that `name` means, if it can serve as a plug-in of `kind`. Raises ConfigError."""
    cls = registry(kind).load(name)
    package, _, base = _KINDS[kind]
    expected = getattr(importlib.import_module(package), base)
    if not issubclass(cls, expected):
        raise ConfigError(f"got class {cls.__qualname__}, expected a subclass of {package}.{base}", key="name")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise ConfigError(f"class {cls.__qualname__} lacks {missing}", key="name")
    return cls
