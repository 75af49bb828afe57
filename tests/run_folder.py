"""What runs wrote, held against `records.fields`, where every file and field of a run's folder is described."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ps_elastic.records.fields import ACTIONS, FILES, TYPES, Field, File


class Reader:
    """Reads run folders. seen: (file, event or action, field) of all that was written; wrong: what was found that is
    not described, or not as it is.
    """

    def __init__(self) -> None:
        self.seen: set[tuple[str, str, str]] = set()
        self.wrong: list[str] = []

    def read(self, folder: Path) -> None:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = str(path.relative_to(folder))
            file = described(name)
            if file is None:
                self.wrong.append(f"{name} is described nowhere")
                continue
            self.seen.add((file.name, "", ""))
            if name.endswith(".jsonl"):
                for line in path.read_text().splitlines():
                    self._line(file, json.loads(line))
            elif name.endswith(".json"):
                self.record(file.name, "", file.fields, json.loads(path.read_text()))

    def _line(self, file: File, line: dict[str, Any]) -> None:
        event = line["event"]
        if event not in file.lines:
            self.wrong.append(f"{file.name}: a line {event!r}")
            return
        self.seen.add((file.name, event, ""))
        self.record(file.name, event, (*file.fields, *file.lines[event]), line)
        for name, *values in line.get("actions", ()):
            fields = ACTIONS.get(name, ())
            if len(values) != len(fields):
                self.wrong.append(f"action {name} with {len(values)} values")
            for field, value in zip(fields, values, strict=False):
                self._value("actions", name, field, value)

    def record(self, file: str, event: str, fields: Sequence[Field], record: dict[str, Any]) -> None:
        known = {field.name: field for field in fields}
        for path, value in leaves(record, known):
            field = known.get(path) or known.get(f"{path.rpartition('.')[0]}.*".lstrip("."))
            if field is None:
                self.wrong.append(f"{file}: {event} {path}")
            else:
                self._value(file, event, field, value)
        for field in fields:
            if not field.when and field.name not in ("*", "B_residual") and (file, event, field.name) not in self.seen:
                self.wrong.append(f"{file}: {event} lacks {field.name}, which all runs have")

    def _value(self, file: str, event: str, field: Field, value: Any) -> None:
        self.seen.add((file, event, field.name))
        fits = value is None if field.type.endswith("?") else False
        types = TYPES[field.type.rstrip("?")]
        if not fits and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            self.wrong.append(f"{file}: {event} {field.name} is {value!r}, not {field.type}")


def described(name: str) -> File | None:
    """The entry of a file, by its path in the folder."""
    exact = [file for file in FILES if file.name == name]
    return next(iter(exact or (file for file in FILES if fnmatch(name, file.name.replace("NNN", "*")))), None)


def leaves(value: dict[str, Any], known: dict[str, Field], path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of all in a document, as deep as fields of such paths are described."""
    for key, item in value.items():
        here = f"{path}{key}"
        if isinstance(item, dict) and any(name.startswith(f"{here}.") for name in known):
            yield from leaves(item, known, f"{here}.")
        else:
            yield here, item


def unseen(seen: Collection[tuple[str, str, str]], but: str) -> list[tuple[str, str, str]]:
    """(file, event or action, field) of all that is described and not `seen`; but: a condition that does not count."""
    described = [("actions", name, field) for name, fields in ACTIONS.items() for field in fields]
    for file in FILES:
        described += [(file.name, "", field) for field in file.fields]
        described += [(file.name, event, field) for event, fields in file.lines.items() for field in fields]
    anywhere = {(file, name) for file, _, name in seen}
    return [
        (file, event, field.name)
        for file, event, field in described
        if field.when != but and (file, event, field.name) not in seen and (event or (file, field.name) not in anywhere)
    ]
