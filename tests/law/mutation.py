"""Break one line of a module for a while, in place: the functions keep their names and get other code."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, ModuleType
from typing import Any


@contextmanager
def mutated(module: ModuleType, old: str, new: str) -> Iterator[None]:
    """Within the block `module` does what its source says with `old`, which must occur once, replaced by `new`.

    Only what functions and methods do can be changed; a method that the new source lacks is gone from its class.
    """
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__name__}"
    codes = dict(_codes(compile(source.replace(old, new), module.__file__ or "", "exec")))
    undo: list[tuple[Any, str, Any]] = []
    for owner, name, path, function in _functions(module):
        if path not in codes:
            undo.append((owner, name, vars(owner)[name]))
            delattr(owner, name)
        elif codes[path] != function.__code__:
            undo.append((function, "__code__", function.__code__))
            function.__code__ = codes[path]
    assert undo, f"replacing {old!r} changes no function"
    try:
        yield
    finally:
        for owner, name, value in undo:
            setattr(owner, name, value)


def _codes(code: CodeType, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], CodeType]]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            here = (*path, constant.co_name)
            yield here, constant
            yield from _codes(constant, here)


def _functions(module: ModuleType) -> Iterator[tuple[Any, str, tuple[str, ...], FunctionType]]:
    """(owner, attribute, path of names, function) of every function and method written in the module."""
    for name, value in tuple(vars(module).items()):
        if isinstance(value, FunctionType) and value.__module__ == module.__name__:
            yield module, name, (name,), value
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for attribute, member in tuple(vars(value).items()):
                function = getattr(member, "fget", None) or getattr(member, "__func__", member)
                if isinstance(function, FunctionType) and function.__code__.co_filename == module.__file__:
                    yield value, attribute, (name, attribute), function
