"""Plain values become the typed settings of a dataclass, or every problem of them.

Read strictly: an unknown key is refused with the nearest known one, and so is a value of another type than the field's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from ps_elastic.errors import ConfigError, unknown
from ps_elastic.plugins import check_ranges, init_types, settings, show

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "null",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
    Any: "anything",
}


class Misfit(ValueError):
    """A value is not of the type asked for."""


def make(
    cls: type, given: Mapping[str, Any], shared: Sequence[str] = (), noun: str = "key"
) -> tuple[Any, dict[str, Any], list[ConfigError]]:
    """Return (an instance of the dataclass `cls`, its settings with defaults filled in, every problem found).

    shared: names of further keys of the section, which `cls` does not hold but may be meant by a misspelt one; noun:
    what the complaint about such a one calls it. Where a value is refused its default stands in, so that one mistake
    does not hide the next; the instance is None where that is impossible, and where a wrong `name` leaves open what
    the other keys mean. Defaults must be of the stated type too, or the resolved file could not be read again.
    """
    defaults, types = settings(cls), init_types(cls)
    problems = [ConfigError(unknown(noun, key, [*shared, *defaults]), key=key) for key in given if key not in defaults]
    values: dict[str, Any] = {}
    for key, default in defaults.items():
        value = given.get(key, default)
        if value is MISSING:
            problems.append(ConfigError(f"required: {describe_type(types[key])}", key=key))
            continue
        try:
            value, found = _made(value, types[key])
            problems += [problem.within(key) for problem in found]
            values[key] = convert(value, types[key])
        except Misfit:
            problems.append(ConfigError(complaint(value, types[key]), key=key))
            if default is not MISSING:
                values[key] = default
        except ConfigError as error:
            problems.append(error.within(key))
    if values.keys() != defaults.keys() or any(problem.key == "name" for problem in problems):
        return None, values, problems
    return _construct(cls, values, defaults, problems)


def _construct(
    cls: type, values: dict[str, Any], defaults: Mapping[str, Any], problems: list[ConfigError]
) -> tuple[Any, dict[str, Any], list[ConfigError]]:
    refused: set[str] = set()
    while True:
        try:
            check_ranges(cls, values)
            return cls(**values), values, problems
        except ConfigError as error:
            if error.key in refused:
                return None, values, problems
            problems.append(error)
            if defaults.get(error.key, MISSING) is MISSING:
                return None, values, problems
            refused.add(error.key)
            values = {**values, error.key: defaults[error.key]}
        except ValueError as error:
            problems.append(ConfigError(str(error) or f"refused by {cls.__qualname__}"))
            return None, values, problems


def make_section(cls: type, written: Any, *like: str) -> tuple[Any, list[ConfigError]]:
    """Return (the instance of the dataclass `cls` that is written, with defaults for what is not; every problem)."""
    if isinstance(written, cls):
        return written, []
    if written is not None and not isinstance(written, Mapping):
        text = ", ".join([f"got {show(written)}", "expected a mapping of keys", *like])
        return cls(), [ConfigError(text)]
    section, _, problems = make(cls, written or {})
    return section or cls(), problems


def _made(value: Any, hint: Any) -> tuple[Any, list[ConfigError]]:
    """`value` with the sections made that `hint` asks for: one, or several of which one may be stated by itself."""
    cls = (*get_args(hint), None)[0]
    if is_dataclass(hint):
        return make_section(hint, value)  # type: ignore[arg-type]
    if not is_dataclass(cls) or isinstance(value, tuple):
        return value, []
    alone = isinstance(value, Mapping)
    if not alone and not isinstance(value, list | None):
        return [], [ConfigError(f"got {show(value)}, expected a mapping of keys, or a list of them")]
    sections, problems = [], []
    for i, entry in enumerate([value] if alone else value or ()):
        section, found = None, [ConfigError(f"got {show(entry)}, expected a mapping of keys")]
        if isinstance(entry, Mapping):
            section, _, found = make(cls, entry)  # type: ignore[arg-type]
        sections += [section] if section else []
        problems += found if alone else [problem.within(str(i)) for problem in found]
    return sections, problems


def convert(value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`: an int for a float that is whole, a float for an int, a tuple for a list.

    Raises Misfit. A hint that is some other class is met by its instances alone.
    """
    origin, members = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return value
    if origin in (Union, UnionType):
        return _convert_union(value, members)
    if origin is Literal:
        if any(value == member and type(value) is type(member) for member in members):
            return value
        raise Misfit
    if hint is bool or hint is str:
        return _instance(value, hint)
    if hint is int or hint is float:
        return _convert_number(value, hint)
    if hint is Path:
        return Path(_instance(value, (str, Path)))
    return _convert_container(value, origin or hint, members)


def _convert_union(value: Any, members: Iterable[Any]) -> Any:
    for member in sorted(members, key=lambda member: type(value) is not member):  # 3 stays an int in `float | int`
        try:
            return convert(value, member)
        except Misfit:
            continue
    raise Misfit


def _convert_number(value: Any, hint: type) -> int | float:
    if type(value) is int and hint is int:
        return value
    if type(value) not in (int, float):
        raise Misfit
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        raise Misfit from None
    if not math.isfinite(number) or (hint is int and not number.is_integer()):
        raise Misfit
    return int(number) if hint is int else number


def _convert_container(value: Any, container: Any, members: tuple[Any, ...]) -> Any:
    if not isinstance(container, type):
        raise ConfigError(f"settings of type {container!r} are not supported")
    if container is tuple or issubclass(list, container):
        items = _instance(value, (list, tuple))
        if container is tuple and members and Ellipsis not in members:
            if len(items) != len(members):
                raise Misfit
            return tuple(convert(item, member) for item, member in zip(items, members, strict=True))
        made = [convert(item, members[0]) if members else item for item in items]
        return tuple(made) if container is tuple else made
    if issubclass(dict, container):
        key_type, value_type = members or (Any, Any)
        return {convert(k, key_type): convert(v, value_type) for k, v in _instance(value, Mapping).items()}
    return _instance(value, container)


def _instance(value: Any, types: Any) -> Any:
    if not isinstance(value, types):
        raise Misfit
    return value


def complaint(value: Any, hint: Any) -> str:
    """What to say of a value that is not of the type `hint`."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    if isinstance(value, str) and all(get_origin(member) is Literal or member is NoneType for member in members):
        return unknown("value", value, words)
    return f"got {show(value)}, expected {describe_type(hint)}"


def describe_type(hint: Any) -> str:
    """The type `hint` in words for whoever writes the file."""
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(describe_type(member) for member in members)
    if origin is Literal:
        return " or ".join(show(member) for member in members)
    if origin in (list, tuple, Sequence) and members:
        return f"[{', '.join('...' if member is Ellipsis else describe_type(member) for member in members)}]"
    if isinstance(origin, type) and issubclass(dict, origin):
        return f"a mapping to {describe_type(members[1])}"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))
