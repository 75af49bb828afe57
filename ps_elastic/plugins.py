"""Names of plug-ins and how a name becomes a class; and what an author of one needs to refuse a setting.

A kind of plug-in (policies, compressors, ...) is a package in which every module registers its class; looking a name up
imports them all, so that adding a plug-in is adding a file. Outside the package a plug-in is named `module:Class`, and
its module may lie in the current folder or beside the configuration. Settings are the init fields of a dataclass;
`config.values` reads them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import operator
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Generic, TypeVar, cast, get_args, get_type_hints

from ps_elastic.errors import ConfigError, unknown

T = TypeVar("T")
_MOVED = {"ps_elastic.bench.tasks": "ps_elastic.analysis.bench.tasks"}  # records of earlier versions name it


class Registry(Generic[T]):
    """The plug-ins of one kind: a name for each class."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package = kind, package
        self._classes: dict[str, type[T]] = {}
        self._complete = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: `@policies.register("first_k")`; a second class of that name is refused."""

        def add(cls: type[T]) -> type[T]:
            if name in self._classes:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._classes[name] = cls
            return cls

        return add

    def load(self, name: str) -> type[T]:
        """Return the class called `name`, or `module:Class`. Raises ConfigError naming the nearest known name."""
        if ":" in name:
            return self._load_outside(name)
        self._discover()
        if name not in self._classes:
            raise ConfigError(unknown(self.kind, name, self._classes), key="name")
        return self._classes[name]

    def items(self) -> Iterator[tuple[str, type[T]]]:
        """Every registered name and class, in alphabetical order."""
        self._discover()
        yield from sorted(self._classes.items())

    def _discover(self) -> None:
        if self._complete:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        self._complete = True

    def _load_outside(self, name: str) -> type[T]:
        module_name, _, class_name = name.partition(":")
        module_name = _MOVED.get(module_name, module_name)
        find_module(self.kind, name)
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if missing != module_name and not module_name.startswith(missing + "."):
                raise  # the module is there, and what it imports is not: its author's error
            raise _missing(module_name, self.kind, name) from error
        cls: Any = getattr(module, class_name, None)
        if not isinstance(cls, type):
            raise ConfigError(f"module '{module_name}' has no class '{class_name}'", key="name")
        if not dataclasses.is_dataclass(cls):
            raise ConfigError(f"{self.kind} '{name}' is not a dataclass: its fields are its settings", key="name")
        return cast("type[T]", cls)


_beside: list[str] = []  # folders of the configurations that were read, the last first
_ever: set[str] = set()  # folders that were searched


def search_beside(folder: str | Path) -> None:
    """Look for `module:Class` in this folder too, after the current one and before those of earlier calls."""
    found = os.path.abspath(folder)
    _beside[:] = [found, *(other for other in _beside if other != found)]


def searched() -> list[str]:
    """The folders where `module:Class` is looked for before Python's own."""
    return list(dict.fromkeys([os.getcwd(), *_beside]))


def find_module(kind: str, name: str) -> None:
    """Make the module of `module:Class` the one to be imported. Raises ConfigError if there is none.

    One that an earlier configuration found elsewhere makes room for it; one that somebody else imported is an error.
    """
    folders, top = searched(), re.split(r"[.:]", name, maxsplit=1)[0]
    sys.path[:] = [*folders, *(path for path in sys.path if path not in folders)]
    _ever.update(os.path.join(os.path.realpath(folder), "") for folder in folders)
    importlib.invalidate_caches()  # its file may have been written a moment ago
    here, loaded = PathFinder.find_spec(top, folders), getattr(sys.modules.get(top), "__file__", None)
    here_is = here and here.origin and os.path.realpath(here.origin)
    if here is None and top not in sys.modules and importlib.util.find_spec(top) is None:
        raise _missing(top, kind, name)
    if top != "ps_elastic" and here_is and loaded and os.path.realpath(loaded) != here_is:
        if not os.path.realpath(loaded).startswith(tuple(_ever)):
            used = f"module '{top}' of {kind} '{name}' is {here_is}, but {loaded} is in use: rename yours"
            raise ConfigError(used, key="name")
        for module in [module for module in sys.modules if module == top or module.startswith(f"{top}.")]:
            del sys.modules[module]


def _missing(module: str, kind: str, name: str) -> ConfigError:
    return ConfigError(
        f"no module '{module}' for {kind} '{name}' in {' or '.join(searched())}, nor installed", key="name"
    )


def settings(cls: type) -> dict[str, Any]:
    """The settings of a plug-in with their defaults: its init fields; required ones map to dataclasses.MISSING."""
    found = {}
    for field in dataclasses.fields(cls):
        if field.init:
            make = field.default_factory
            found[field.name] = field.default if make is dataclasses.MISSING else make()
    return found


def summary(cls: type) -> str:
    """The first sentence of a plug-in's docstring."""
    return (cls.__doc__ or "").strip().split("\n", 1)[0]


def parse_one_line(text: str) -> tuple[str, dict[str, str]]:
    """Split `top_k:ratio=0.01` or `my.rules:Mine:bound=3` into a name and its settings, still as text.

    A segment without `=` after the first is the class of a `module:Class` name. Raises ConfigError.
    """
    name, *segments = text.split(":")
    options: dict[str, str] = {}
    for position, segment in enumerate(segments):
        key, equals, value = segment.partition("=")
        if equals:
            options[key] = value
        elif position == 0 and segment:
            name = f"{name}:{segment}"
        else:
            raise ConfigError(f"expected key=value, got '{segment}' in '{text}'")
    return name, options


def show(value: Any) -> str:
    """`value` as the user wrote it, shortened; text in quotes, so that '3' and 3 differ."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(plain(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def plain(value: Any) -> Any:
    """`value` in the types that YAML and JSON know: a tuple as a list, a path as text."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


class Range:
    """The numbers that a setting may be: `Annotated[float, Range("a number > 0 and <= 1")]`.

    The words are what a value outside is refused with, and `>`, `>=`, `<`, `<=`, `A < name` or `from A to B` in them is
    the check. Of a list every number is checked, and that there is one where there is to be `at least one`; text and
    null are none.
    """

    def __init__(self, expected: str) -> None:
        self.expected = expected
        text = re.sub(r"\bfrom (\S+) to (\S+)", r">= \1 <= \2", re.sub(r"(\S+) < (?=[a-z])", r"> \1 of ", expected))
        found = re.findall(r"(>=|<=|>|<) (-?\d+(?:\.\d+)?)(?:\^(\d+))?", text)
        self.bounds = {
            sign: (float(number) if "." in number else int(number)) ** int(power or 1) for sign, number, power in found
        }
        if not found:
            raise ValueError(f"no bound is stated in {expected!r}")

    def holds(self, value: Any) -> bool:
        """Whether every number in `value` is within."""
        if isinstance(value, (list, tuple)):
            return all(map(self.holds, value)) and (bool(value) or "at least one" not in self.expected)
        numbers = isinstance(value, (int, float))
        return not numbers or all(_HOLDS[sign](value, bound) for sign, bound in self.bounds.items())


class OneOf(Range):
    """The words that a setting may be: `Annotated[str, OneOf("pure, random or shuffled")]`."""

    def __init__(self, expected: str) -> None:
        self.expected, self.bounds, self.words = expected, {}, re.split(", | or ", expected)

    def holds(self, value: Any) -> bool:
        return value in self.words


_HOLDS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le
}  # fmt: skip


@cache
def init_types(cls: type, annotated: bool = False) -> Mapping[str, Any]:
    """The type of each init field of the dataclass `cls`, from annotations that may be text.

    Each is read by itself: a field that is no setting may name a type imported for the type checker alone.
    annotated: with what `Annotated` adds to it.
    """
    notes = {}
    for base in reversed(cls.__mro__):
        for name, note in inspect.get_annotations(base).items():
            notes[name] = note, vars(sys.modules[base.__module__])
    types = {}
    for name in settings(cls):
        note, scope = notes[name]
        try:
            types[name] = get_type_hints(SimpleNamespace(__annotations__={name: note}), scope, None, annotated)[name]
        except (NameError, AttributeError, SyntaxError) as error:
            raise ConfigError(f"the type of this setting cannot be read: {note!r}: {error}", key=name) from error
    return types


@cache
def ranges(cls: type) -> Mapping[str, Range]:
    """The range of each init field of the dataclass `cls` that states one."""
    found = {name: next(_ranges_in(hint), None) for name, hint in init_types(cls, annotated=True).items()}
    return {name: allowed for name, allowed in found.items() if allowed is not None}


def _ranges_in(hint: Any) -> Iterator[Range]:
    yield from (note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Range))
    for member in get_args(hint):
        yield from _ranges_in(member)


def check_ranges(cls: type, values: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first of the values that is not within the range that `cls` states for it."""
    for key, allowed in ranges(cls).items():
        if not allowed.holds(values[key]):
            raise ConfigError(f"got {show(values[key])}, expected {allowed.expected}", key=key)


class Checked:
    """A dataclass with ranges: what is made otherwise than from a configuration is within them too."""

    def __post_init__(self) -> None:
        cls: type = type(self)
        check_ranges(cls, {key: getattr(self, key) for key in ranges(cls)})


def expect(ok: bool, section: Any, key: str, expected: str) -> None:
    """Refuse `section`'s value of `key` unless `ok`: `got -1, expected a number > 0`."""
    if not ok:
        raise ConfigError(f"got {show(getattr(section, key))}, expected {expected}", key=key)


# Ranges of settings, in the words that another value is refused with
Positive = Annotated[float, Range("a number > 0")]
NotNegative = Annotated[float, Range("a number >= 0")]
BelowOne = Annotated[float, Range("a number >= 0 and < 1")]
UpToOne = Annotated[float, Range("a number > 0 and <= 1")]
Quorum = Annotated[float, Range("0 < quorum <= 1")]
Beta = Annotated[float, Range("0 < beta <= 1")]
Decay = Annotated[float | None, Range("a number >= 0 and < 1, or null")]
Ratio = Annotated[float, Range("0 < ratio <= 1")]
Duration = Annotated[float, Range("a number of seconds > 0")]
Time = Annotated[float, Range("a number of seconds >= 0")]
Whole = Annotated[int, Range("a whole number >= 1")]
Gradients = Annotated[int, Range("a number of gradients >= 1")]
Pushes = Annotated[int, Range("a number of pushes >= 1")]
Rounds = Annotated[int, Range("a number of rounds >= 1")]
Steps = Annotated[int, Range("a number of steps >= 1")]
Threads = Annotated[int, Range("a number of threads >= 1")]
Versions = Annotated[int, Range("a number of versions >= 1")]
Workers = Annotated[int, Range("a number of workers >= 1")]
Lead = Annotated[int, Range("a number of steps >= 0")]
Staleness = Annotated[int, Range("a number of versions >= 0")]
