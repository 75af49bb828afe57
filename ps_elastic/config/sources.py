"""What the user wrote, as one tree of plain values: default names < file < command line.

A section that has a name may be written as a mapping with `name`, or in one line: `stale_synchronous:bound=4`. A
layer that gives such a section another name takes away the settings that were written below for the former one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Union

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from ps_elastic.errors import ConfigError
from ps_elastic.plugins import parse_one_line, search_beside, show

COMMAND_LINE = "command line"

Tree = dict[str, Any]
Source = Union[str, "PathLike[str]", Mapping[str, Any], None]  # a file, or what it would hold


@dataclass(frozen=True)
class Named:
    """A section whose `name` decides what its other keys mean; `shared` ones mean the same under every name."""

    default: str | None
    shared: tuple[str, ...] = ()


NAMED = {
    "task": Named(None),
    "policy": Named("synchronous"),
    "update": Named("sgd", ("accumulate", "pipeline")),
    "compressor": Named("identity", ("error_feedback",)),
    "downlink": Named("identity"),
    "optimizer": Named("sgd", ("lr", "weight_decay", "decay_norm_and_bias", "clip_norm")),
    "schedule": Named("constant", ("warmup_samples",)),
}


@dataclass(frozen=True)
class Written:
    """The merged tree, and where each part of it comes from."""

    tree: Tree
    file: str
    command: Tree

    def blame(self, error: ConfigError) -> ConfigError:
        """The same error with the file or command line that its key was written in."""
        return ConfigError(error.message, key=error.key, source=self._source_of(error.key))

    def _source_of(self, key: str) -> str:
        node: Any = self.command
        for part in key.split("."):
            if not isinstance(node, dict):
                return COMMAND_LINE
            if part not in node:
                return self.file
            node = node[part]
        if isinstance(node, dict) and self.file:
            return f"{self.file} and {COMMAND_LINE}"
        return COMMAND_LINE


def gather(source: Source, overrides: Sequence[str]) -> Written:
    """Read a file (or a mapping, or nothing) and lay `key=value` overrides over it. Raises ConfigError."""
    file = str(Path(source)) if isinstance(source, (str, PathLike)) else ""
    try:
        lower = _expand(read_file(Path(source)) if isinstance(source, (str, PathLike)) else _copy(source or {}))
    except ConfigError as error:
        raise ConfigError(error.message, key=error.key, source=file) from error
    if file:
        _search_beside(Path(file))
    command: Tree = {}
    for text in overrides:
        try:
            command = _merge(command, _expand(_parse_override(text)))
        except ConfigError as error:
            raise ConfigError(error.message, key=error.key, source=COMMAND_LINE) from error
    tree = _merge(_merge(_names(NAMED), lower), command)
    nulls = [key for key in NAMED if tree.get(key, ...) is None]
    return Written({**tree, **_names(nulls)}, file, command)


def _search_beside(file: Path) -> None:
    """Plug-ins may lie beside the file; those of a run's own config.yaml are where the run found them."""
    try:
        of_run = json.loads((file.parent / "env.json").read_text(encoding="utf-8"))["searched"]
    except (OSError, ValueError, LookupError, TypeError):  # no run's folder
        of_run = []
    for folder in (*reversed(of_run), file.parent):
        search_beside(folder)


def _names(sections: Iterable[str]) -> Tree:
    return {key: {"name": NAMED[key].default} if NAMED[key].default else {} for key in sections}


def read_file(path: Path) -> Tree:
    """The mapping in a YAML file; an empty file is an empty one. Raises ConfigError."""
    try:
        value = read_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"not text in UTF-8: {error.reason} at byte {error.start}") from error
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"got {show(value)}, expected a mapping of keys, such as `task: digits`")
    return value or {}


class _Constructor(SafeConstructor):
    """Builds numbers, text, booleans, null, lists and mappings: nothing else is a setting."""


# A date is text here, and so are a lone `=` and `<<`, which YAML 1.1 gave a meaning of their own.
for _tag in ("timestamp", "value", "merge"):
    _Constructor.add_constructor(f"tag:yaml.org,2002:{_tag}", lambda self, node: node.value)


def read_yaml(text: str) -> Any:
    """The value of one YAML 1.2 document without tags. Raises ConfigError with the line."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        for event in yaml.parse(text) if "!" in text else ():
            if tag := getattr(event, "tag", None):
                short = str(tag).replace("tag:yaml.org,2002:", "!!")
                raise ConfigError(f"line {event.start_mark.line + 1}: got tag '{short}', expected a plain value")
        return _copy(yaml.load(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{line}not YAML: {error.problem or error.context}") from error
    except YAMLError as error:
        raise ConfigError(f"not YAML: {str(error).splitlines()[0]}") from error
    except ValueError as error:  # `._` has the form of a float, and is none
        raise ConfigError(f"not YAML: {error}") from error
    except RecursionError:
        raise ConfigError("nested too deeply, or an alias stands inside its own anchor") from None


def _copy(value: Any, key: str = "") -> Any:
    """A copy that shares nothing between aliases; every key must be text."""
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ConfigError(f"got the key {show(name)}, expected text", key=key)
        return {name: _copy(item, f"{key}.{name}" if key else name) for name, item in value.items()}
    return [_copy(item, key) for item in value] if isinstance(value, list) else value


def _parse_override(text: str) -> Tree:
    path, equals, value = text.partition("=")
    parts = path.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"got '{text}', expected key=value, such as policy.bound=4")
    try:
        tree = read_yaml(value)
    except ConfigError as error:
        raise error.within(path) from error
    for part in reversed(parts):
        tree = {part: tree}
    return tree  # type: ignore[no-any-return]


def _expand(tree: Tree) -> Tree:
    """The tree with every one-line form written out."""
    return {key: _expand_section(key, value) if key in NAMED else value for key, value in tree.items()}


def _expand_section(key: str, value: Any) -> Tree | None:
    if value is None:
        return None
    section = {"name": value} if isinstance(value, str) else value
    if not isinstance(section, dict):
        raise ConfigError(f"got {show(value)}, expected a name, such as '{NAMED[key].default or 'digits'}'", key=key)
    name = section.get("name")
    if not isinstance(name, str) or ":" not in name:
        return section
    try:
        name, options = parse_one_line(name)
    except ConfigError as error:
        raise error.within(key) from error
    stated = {}
    for option, text in options.items():
        if option in section:
            raise ConfigError("stated twice: in the one-line form and as a key", key=f"{key}.{option}")
        try:
            stated[option] = read_yaml(text)
        except ConfigError as error:
            raise error.within(f"{key}.{option}") from error
    return {**section, **stated, "name": name}


def _merge(lower: Tree, upper: Tree) -> Tree:
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        if key in NAMED and below and value and below.get("name") not in (None, value.get("name", below.get("name"))):
            below = {name: item for name, item in below.items() if name in NAMED[key].shared}
        merged[key] = _overlay(below, value)
    return merged


def _overlay(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _overlay(below.get(key), value) for key, value in above.items()}}
