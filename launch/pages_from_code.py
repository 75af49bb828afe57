"""The parts of pages that are made from the code: dataclasses, click's commands, `records.fields`.

A page says what goes where: `<!-- generated: KIND -->`, and `<!-- end -->` behind it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from textwrap import fill
from typing import Any, get_args

import click

from ps_elastic import cli
from ps_elastic.analysis.compare import fields as compared
from ps_elastic.cli.list import plugins
from ps_elastic.config.describe import Key, keys
from ps_elastic.config.faults import Faults
from ps_elastic.config.load import HOLDERS, PLUGINS
from ps_elastic.config.plugin import registry
from ps_elastic.config.schema import Config
from ps_elastic.config.sources import NAMED
from ps_elastic.errors import EXIT_CODES
from ps_elastic.plugins import init_types, plain, summary
from ps_elastic.records.fields import ACTIONS, FILES, Field, File

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PLUGGED = {  # kind -> what one of it is called
    "policies": "policy", "compressors": "compressor", "updates": "update", "tasks": "task", "benchmarks": "benchmark"
}  # fmt: skip
TYPES = {
    "int": "whole number", "number": "number", "text": "text", "bool": "true or false", "list": "list", "map": "mapping"
}  # fmt: skip
Lines = Iterator[str]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Lines:
    """The table without columns that are empty in every row."""
    kept = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    used = [any(row[i] for row in kept) for i in range(len(head))]
    yield f"| {' | '.join(compress(head, used))} |"
    yield f"|{'---|' * sum(used)}"
    for cells in kept:
        yield f"| {' | '.join(compress(cells, used))} |"
    yield ""


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def written(value: Any) -> str:
    """A default, as a file or a command line states it."""
    return value if isinstance(value, str) else json.dumps(plain(value))


def plugin_table(kind: str) -> Lines:
    head = f"| {PLUGGED[kind]} | settings | what it does |"
    yield from (head, "|---|---|---|")
    for row in plugins(kind):
        stated = ", ".join(f"`{key}={written(value)}`" for key, value in row["settings"].items())
        yield f"| `{row['name']}` |{f' {stated} ' if stated else ' '}| {row['summary']} |"


# ---- configuration

HEAD = ("key", "default", "values", "meaning")


def config() -> Lines:
    types, own = init_types(Config), {key.name: key for key in keys(Config)}
    inner = {name for name, hint in types.items() if name in NAMED or is_dataclass(hint)}
    yield from ("## The file", "", "Sections have tables of their own below.", "")
    own["name"] = own["name"]._replace(default="null")
    yield from table(HEAD, [_key(key) for key in own.values() if key.name not in inner])
    for name, hint in types.items():
        if name == "downlink":
            yield from (f"## {name}", "", f"{sentence(own[name].meaning)} Default: `identity`.", "")
        elif name in PLUGINS:
            yield from _plugins(name, own[name])
        elif hint is Faults:
            yield from _faults()
        elif name in inner:
            yield from _section(name, hint)


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def _key(key: Key) -> tuple[str, ...]:
    default = "required" if key.default is MISSING else code(written(key.default))
    return code(key.name), default, key.expected, key.meaning


def _section(path: str, cls: Any) -> Lines:
    inner = {name: hint for name, hint in init_types(cls).items() if is_dataclass(hint)}
    yield from (f"## {path}", "", summary(cls), "")
    yield from table(HEAD, [_key(key) for key in keys(cls) if key.name not in inner])
    for name, hint in inner.items():
        yield from _section(f"{path}.{name}", hint)


def _plugins(name: str, own: Key) -> Lines:
    """A section that names a plug-in: the keys that all have in common, and the settings of each."""
    default, holder = NAMED[name].default, HOLDERS.get(name)
    yield from (f"## {name}", "")
    yield sentence(own.meaning) if own.meaning else summary(holder or object)
    rest = f"Default: `{default}`." if default else "It is required."
    yield f"`name` is a name of these tables, or `module:Class`. {rest}"
    yield ""
    if holder is not None:
        yield from ("Keys of the section, whatever the name:", "")
        yield from table(HEAD, [_key(key) for key in keys(holder) if key.name != "plugin"])
    found = [(known, keys(cls)) for known, cls in registry(PLUGINS[name]).items()]
    rows = [(code(known), *_key(key)) for known, settings in found for key in settings]
    yield from ("Settings of each:", "")
    yield from table(("name", *HEAD), rows)
    if bare := [code(known) for known, settings in found if not settings]:
        yield from (f"Without settings: {', '.join(bare)}.", "")


def _faults() -> Lines:
    kinds = {kind: get_args(hint)[0] for kind, hint in init_types(Faults).items()}
    yield from ("## faults", "", f"{summary(Faults)[:-1]}. Each key holds one entry or a list of entries.", "")
    yield from table(("key", "what happens"), [(code(kind), summary(cls)) for kind, cls in kinds.items()])
    common = [field.name for field in fields(kinds["lost_push"])]
    yield from ("Keys of an entry of `slow`, `delay`, `lost_push`, `lost_reply` and `duplicate`:", "")
    yield from table(HEAD, map(_key, keys(kinds["lost_push"])))
    moment = keys(kinds["leave"])
    yield from ("Keys of an entry of `pause`, `crash`, `join` and `leave`:", "", *table(HEAD, map(_key, moment)))
    known = {*common, *(key.name for key in moment)}
    rows = [(code(kind), *_key(key)) for kind, cls in kinds.items() for key in keys(cls) if key.name not in known]
    yield from ("Further keys:", "", *table(("of", *HEAD), rows))


# ---- commands


def commands() -> Lines:
    with click.Context(cli.group, info_name="ps-elastic") as context:
        for name in cli.group.list_commands(context):
            command = cli.group.get_command(context, name)
            assert command is not None
            yield from _command(f"ps-elastic {name}", command)


def exit_codes() -> Lines:
    return table(("code", "meaning"), [(str(code), text) for code, text in EXIT_CODES.items()])


def _command(path: str, command: click.Command) -> Lines:
    yield from (f"## {path}", "")
    for paragraph in (command.help or "").split("\n\n"):
        yield from (fill(" ".join(paragraph.split()), 118), "")
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from _command(f"{path} {name}", inner)
        return
    pieces = command.collect_usage_pieces(click.Context(command, info_name=path))
    yield from ("```text", f"{path} {' '.join(pieces)}", "```", "")
    options = [param for param in command.params if isinstance(param, click.Option)]
    yield from table(("option", "default", "meaning"), [_option(option) for option in options])


def _option(option: click.Option) -> tuple[str, ...]:
    number = isinstance(option.type, click.types.IntParamType)
    value = "" if option.is_flag else f" {option.metavar or ('N' if number else 'TEXT')}"
    default = option.default if option.show_default else "required" if option.required else ""
    return code(f"{', '.join(option.opts)}{value}"), str(default), option.help or ""


# ---- the folder of a run


def files() -> Lines:
    yield from table(("file", "what it holds"), [(code(file.name), file.what) for file in FILES])
    for file in FILES:
        if not file.fields:
            continue
        yield from (f"## {file.name}", "", file.what, "")
        if file.lines:
            yield from ("Every line has these fields:", "")
        yield from field_table(file.fields)
        for event, more in file.lines.items():
            yield from (f"### `{event}`", "", *(field_table(more) if more else ("No further fields.", "")))
        if file.name == "events.jsonl":
            yield from _actions()


def _actions() -> Lines:
    yield from ("### Actions", "", "An action is a list: its name, then its values in this order.", "")
    rows = [(code(name), *_field(field)) for name, values in ACTIONS.items() for field in values]
    yield from table(("action", "value", "type", "unit", "meaning", "only in"), rows)


def field_table(described: Iterable[Field]) -> Lines:
    return table(("field", "type", "unit", "meaning", "only in"), map(_field, described))


def _field(field: Field) -> tuple[str, ...]:
    null = " or null" if field.type.endswith("?") else ""
    return code(field.name), TYPES[field.type.rstrip("?")] + null, field.unit, field.meaning, field.when


def comparison() -> Lines:
    yield from field_table(compared.DOCUMENT)
    yield from ("### An item of `cells`", "", *field_table(compared.CELL))
    yield from ("### An item of `rows`", "", *field_table(compared.ROW))


def numbers() -> Lines:
    head = ("number", "unit", "formula", "clock", "reference model", "meaning")
    comparison = File("comparison.json", "", lines={"cells": compared.CELL, "rows": compared.ROW})
    for file in (*FILES, comparison):
        for event, described in {"": file.fields, **file.lines}.items():
            rows = [
                (code(f.name), f.unit, f.formula, f.clock, f.model, f.meaning)
                for f in described
                if f.formula or f.clock
            ]
            if rows:
                yield from (f"## {file.name}" + (f": `{event}`" if event else ""), "", *table(head, rows))


# ---- pages

KINDS: dict[str, Callable[[], Lines]] = {
    "config": config, "commands": commands, "exit_codes": exit_codes, "files": files, "comparison": comparison,
    "numbers": numbers,
    **{kind: partial(plugin_table, kind) for kind in PLUGGED},
}  # fmt: skip


def filled(text: str) -> str:
    """A page, with what is between its markers as the code has it."""
    return MARKED.sub(lambda found: found[1] + "\n".join(KINDS[found[2]]()).rstrip() + "\n" + found[3], text)


def stale() -> dict[Path, str]:
    """The pages that are not as the code has them -> what they should be."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    return {path: made for path, text in texts.items() if (made := filled(text)) != text}


def main(arguments: Sequence[str]) -> int:
    if arguments not in ([], ["--check"]):
        print("usage: launch/pages [--check]", file=sys.stderr)
        return 2
    check, old = bool(arguments), stale()
    for path, text in old.items():
        print(f"{path.relative_to(ROOT)}{': not as the code has it; launch/pages writes it' if check else ''}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
