"""A configuration, read: a file or a mapping, with `key=value` laid over it, becomes a `Config`, or every problem of
it.

Only `task` is required. Unknown keys are refused with the nearest known one; so are values of the wrong type, values
out of range, and values that this version cannot carry out. Code never reads the raw dictionary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any

from ps_elastic.config.compatibility import misfits, unsupported
from ps_elastic.config.faults import Faults
from ps_elastic.config.plugin import Plugin, resolve, state
from ps_elastic.config.schema import Config
from ps_elastic.config.sections import Compressor, Update
from ps_elastic.config.sources import NAMED, Source, Tree, gather
from ps_elastic.config.values import make, make_section
from ps_elastic.errors import ConfigError
from ps_elastic.plugins import find_module, init_types


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


def find_modules(config: Config) -> None:
    """Raises ConfigError for a plug-in whose module cannot be found; nothing is imported."""
    for key in PLUGINS:
        section = getattr(config, key)
        plugin = getattr(section, "plugin", section)
        if ":" in plugin.name:
            try:
                find_module(plugin.kind, plugin.name)
            except ConfigError as error:
                raise error.within(key) from None


def no_gpu(config: Config) -> str | None:
    """What to say where GPUs are asked for and this machine has none: the run may be meant for another."""
    if config.device != "cuda":
        return None
    import torch  # takes seconds, and is wanted for this alone

    found = torch.cuda.is_available()
    return None if found else "device: cuda, but torch finds no GPU on this machine; the machines of the run need one"


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


# section -> the kind of its plug-in
PLUGINS = {**{kind: kind for kind in ("task", "policy", "update", "compressor")}, "downlink": "compressor"}
HOLDERS: dict[str, type] = {"update": Update, "compressor": Compressor}  # sections with keys beside the plug-in's
_PLAIN: dict[str, Any] = {
    key: cls for key, cls in init_types(Config).items() if is_dataclass(cls) and key not in (*PLUGINS, "faults")
}


def _build(tree: Tree, plugins: bool) -> tuple[Config | None, list[ConfigError]]:
    values = dict(tree)
    problems: list[ConfigError] = []
    for key, kind in PLUGINS.items():
        section = tree.get(key, {})
        values[key], found = _plugin(key, kind, section, plugins or kind == "policy")
        problems += [problem.within(key) for problem in found]
    for key, cls in _PLAIN.items():
        values[key], found = make_section(cls, tree.get(key))
        problems += [problem.within(key) for problem in found]
    values["faults"], found = make_section(Faults, tree.get("faults") or {}, "such as `lost_push`")
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
    if key not in HOLDERS:
        return plugin, problems
    common = {name: section[name] for name in shared if name in section}
    holder, _, found = make(HOLDERS[key], {"plugin": plugin, **common})
    return holder, problems + found
