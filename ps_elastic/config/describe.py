"""What each key of a section is: its default, the values that it may have, and its meaning.

The meaning of a key is the comment beside its field, or above it where there is no room.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from contextlib import suppress
from functools import cache
from textwrap import dedent
from typing import Any, NamedTuple

from ps_elastic.config.values import describe_type
from ps_elastic.plugins import init_types, ranges, settings


class Key(NamedTuple):
    """A key of a section, or a setting of a plug-in. default: dataclasses.MISSING if it must be given."""

    name: str
    default: Any
    expected: str
    meaning: str  # "" where the source cannot be read


def keys(cls: type) -> list[Key]:
    """The keys of a dataclass, in its order."""
    types, bounds, told = init_types(cls), ranges(cls), meanings(cls)
    return [
        Key(name, default, bounds[name].expected if name in bounds else describe_type(types[name]), told.get(name, ""))
        for name, default in settings(cls).items()
    ]


def meanings(cls: type) -> dict[str, str]:
    """Key -> what stands behind `#`, of each key that has a comment, where the source can be read."""
    told = {key: text for base in reversed(cls.__mro__) for key, text in _comments_in(base).items()}
    return {key: told[key] for key in settings(cls) if key in told}


@cache
def _comments_in(cls: type) -> dict[str, str]:
    found: dict[str, str] = {}
    with suppress(OSError, TypeError, SyntaxError, tokenize.TokenError):
        source = dedent(inspect.getsource(cls))
        (made,) = ast.parse(source).body
        comments, alone = dict[int, str](), set[int]()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and not re.match(r"# *(fmt:|noqa|type: ignore)", token.string):
                comments[token.start[0]] = token.string.lstrip("# ")
                if not token.line[: token.start[1]].strip():
                    alone.add(token.start[0])
        for field in made.body if isinstance(made, ast.ClassDef) else ():
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                first = field.lineno
                while first - 1 in alone:
                    first -= 1
                texts = [comments[line] for line in range(first, (field.end_lineno or 0) + 1) if line in comments]
                if texts:
                    found[field.target.id] = " ".join(texts)
    return found
