"""`ps-elastic config show | validate | schema`: what a configuration is, what is wrong with it, what it may hold."""

from __future__ import annotations

import json

import click

from ps_elastic.cli import _options
from ps_elastic.config.json_schema import json_schema
from ps_elastic.config.load import check, load, no_gpu
from ps_elastic.errors import OK, USAGE


@click.group("config")
def command() -> None:
    """Show or validate a configuration file, or describe all that it may hold."""


@command.command("show")
@_options.configuration
@_options.as_json
def show(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print CONFIG in full, every default stated."""
    resolved = load(config, overrides)
    click.echo(json.dumps(resolved.to_dict(), indent=2) if as_json else resolved.to_yaml(), nl=as_json)


@command.command("validate")
@_options.configuration
@_options.as_json
def validate(config: str, overrides: tuple[str, ...], as_json: bool) -> int:
    """Name every problem of CONFIG; exit 2 if there is one."""
    errors = check(config, overrides)
    note = None if errors else no_gpu(load(config, overrides, plugins=False))
    if as_json:
        found = [{"key": error.key, "message": error.message, "source": error.source} for error in errors]
        click.echo(json.dumps({"valid": not errors, "errors": found, "notes": [note] if note else []}, indent=2))
    else:
        for error in errors:
            click.echo(f"ps-elastic: {error}", err=True)
        if not errors:
            click.echo(f"{config}: valid")
        if note:
            click.echo(f"ps-elastic: {note}", err=True)
    return USAGE if errors else OK


@command.command("schema")
@click.option("--task", metavar="NAME", help="The one task that a file may name: a registered one, or module:Class.")
def schema(task: str | None) -> None:
    """Print the JSON Schema of a configuration, for editors that complete and check it."""
    click.echo(json.dumps(json_schema(task), indent=2))
