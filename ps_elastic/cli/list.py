"""`ps-elastic list KIND`: what can be named in a configuration."""

from __future__ import annotations

import importlib
import json
from dataclasses import MISSING
from importlib.util import find_spec
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ps_elastic.cli import _options
from ps_elastic.config.describe import meanings
from ps_elastic.plugins import plain, settings, summary

# Each kind has a package, and in it a registry called like the kind.
_PACKAGES = {
    "policies": "ps_elastic.policies",
    "compressors": "ps_elastic.compressors",
    "tasks": "ps_elastic.tasks",
    "updates": "ps_elastic.worker.updates",
    "benchmarks": "ps_elastic.analysis.bench",
}


@click.command("list")
@click.argument("kind", type=click.Choice(list(_PACKAGES)), metavar="KIND")
@_options.as_json
def command(kind: str, as_json: bool) -> None:
    """List all of a KIND (policies, compressors, tasks, updates, benchmarks) with settings and defaults."""
    rows = plugins(kind)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        _print(kind, rows)


def plugins(kind: str) -> list[dict[str, Any]]:
    """Return {name, summary, settings, required, meanings} of every registered plug-in, by name.

    settings: name -> default; null for one that must be given, which `required` names. meanings: name -> its unit, and
    what larger values do.
    """
    spec = find_spec(_PACKAGES[kind])
    if spec is None or spec.origin is None:  # a kind of which there is none, since it has no package
        return []
    rows = []
    for name, cls in getattr(importlib.import_module(_PACKAGES[kind]), kind).items():
        defaults = settings(cls)
        required = [key for key, default in defaults.items() if default is MISSING]
        stated = {key: None if key in required else plain(default) for key, default in defaults.items()}
        told = {"settings": stated, "required": required, "meanings": meanings(cls)}
        rows.append({"name": name, "summary": summary(cls), **told})
    return rows


def _print(kind: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        click.echo(f"no {kind}")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "settings", "summary"):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        stated = (
            f"{key} (required)" if key in row["required"] else f"{key}={json.dumps(value)}"
            for key, value in row["settings"].items()
        )
        table.add_row(Text(row["name"]), Text(" ".join(stated)), Text(row["summary"]))
    console = Console()
    if not console.is_terminal:
        console.width = 10_000  # no line is cut for a file or a pipe
    console.print(table)
