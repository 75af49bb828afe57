"""One JSON line per observation, one file per rank; lines are written in batches."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any


class Lines:
    """A file of lines, written when 64 kB or one second have gathered, on `flush` and on `close`.

    Raises OSError where the disk refuses; nothing is retried silently.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._lines: list[str] = []
        self._size, self._due = 0, monotonic() + 1

    def write(self, line: str) -> None:
        self._lines.append(line)
        self._size += len(line)
        if self._size > 65536 or monotonic() > self._due:
            self.flush()

    def flush(self) -> None:
        if self._lines:
            self._put(("\n".join(self._lines) + "\n").encode())
            self._lines.clear()
        self._file.flush()
        self._size, self._due = 0, monotonic() + 1

    def close(self) -> None:
        self.flush()
        self._file.close()

    def _put(self, data: bytes) -> None:
        self._file.write(data)


class SealedLines(Lines):
    """Lines that can be told later from a cut or edited copy: `count` of them, with `sha256`, are in the file.

    batch: so many of those that `make` gives are made and written together.
    """

    def __init__(self, path: Path, make: Callable[[list[Any]], list[str]], batch: int) -> None:
        super().__init__(path)
        self.count, self._hash = 0, hashlib.sha256()
        self._make, self._batch, self._told = make, batch, list[Any]()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def note(self, told: Any) -> None:
        """Write the line that is made of `told`: when a batch of them is there, or on `flush`."""
        self._told.append(told)
        if len(self._told) >= self._batch:
            self._tell()

    def flush(self) -> None:
        if self._told:
            self._tell()
        super().flush()

    def _tell(self) -> None:
        waiting, self._told = self._told, []  # not made again if the disk refuses them
        self.write("\n".join(self._make(waiting)))

    def _put(self, data: bytes) -> None:
        super()._put(data)
        self.count += data.count(b"\n")
        self._hash.update(data)


class Tracker:
    """Observations of one rank; `write` receives each as a JSON line with `event`, `t_s` and `rank` first.

    batch: so many lines of `later` are made and written together, so that caches are warm for all but the first.
    """

    def __init__(self, rank: int, write: Callable[[str], None], batch: int = 1) -> None:
        self.rank, self._write, self._batch = rank, write, batch
        self._later: list[tuple[Callable[..., str], tuple[Any, ...]]] = []
        self._waiting = 0  # lines of these
        self._forms: dict[tuple[str, ...], str] = {}  # (event, names of fields) -> the line without its values

    def note(self, event: str, t_s: float, **fields: Any) -> None:
        """Log one observation; a float that is not finite becomes null."""
        self.tell()
        key = event, *fields
        form = self._forms.get(key) or self._forms.setdefault(key, self._form(*key))
        texts = [_TEXTS.get(type(value), _text)(value) for value in fields.values()]
        self._write(form % (number(t_s), *texts))

    def later(self, make: Callable[..., str], *values: Any, lines: int = 1) -> None:
        """Log so many `lines`, which `make(*values)` gives: when a batch is there, before any other, or by `tell`."""
        self._later.append((make, values))
        self._waiting += lines
        if self._waiting >= self._batch:
            self.tell()

    def tell(self) -> None:
        """Make the lines that wait."""
        if self._later:
            waiting, self._later, self._waiting = self._later, [], 0  # not made again if the disk refuses them
            text = "\n".join([make(*values) for make, values in waiting])
            for lines in [text] if self._batch > 1 else text.split("\n"):
                self._write(lines)

    def _form(self, event: str, *names: str) -> str:
        start = f'{{"event": {json.dumps(event)}, "t_s": %s, "rank": {self.rank}'
        return ", ".join([start, *(f"{json.dumps(name).replace('%', '%%')}: %s" for name in names)]) + "}"


def finite(value: Any) -> Any:
    """`value`, or None for a float that JSON has no number for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> str:
    return json.dumps(finite(value))


def number(value: float) -> str:
    """A number as JSON has it; null for one that is not finite."""
    return repr(value) if math.isfinite(value) else "null"


_TEXTS: dict[type, Callable[[Any], str]] = {float: number, int: repr}  # what json.dumps would write, sooner


class Pages:
    """A file of lines that is open only while it is written: there may be more of them than may be open at once."""

    def __init__(self, path: Path) -> None:
        self._path, self._lines, self._size = path, list[str](), 0
        path.touch()

    def write(self, line: str) -> None:
        self._lines.append(line)
        self._size += len(line)
        if self._size > 1 << 14:
            self.flush()

    def flush(self) -> None:
        if self._lines:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n".join(self._lines) + "\n")
            self._lines.clear()
            self._size = 0
