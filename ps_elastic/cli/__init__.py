"""`ps-elastic`: finds the command, runs it, and turns errors into one message and an exit code.

A command is a file in `ps_elastic/cli` with a click command called `command`; only the one that is named is
imported (`--help` imports them all, so they import what is heavy inside their functions). A command returns nothing,
or its exit code.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Sequence

import click

from ps_elastic import __version__
from ps_elastic.errors import INTERRUPTED, OK, PsElasticError, unknown

package = sys.modules[__name__]  # that commands are files of


class _Commands(click.Group):
    """The files of `ps_elastic.cli`, imported when they are asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(module.name for module in pkgutil.iter_modules(package.__path__))

    def get_command(self, context: click.Context, name: str) -> click.Command:
        known = self.list_commands(context)
        if name not in known:
            raise click.UsageError(unknown("command", name, known), context)
        command: click.Command = importlib.import_module(f"{package.__name__}.{name}").command
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="ps-elastic")
def group() -> None:
    """Train PyTorch models over MPI with a parameter server, and measure what consistency costs."""


def main(arguments: Sequence[str] | None = None, prog_name: str = "ps-elastic") -> int:
    """Run one command line (that of the process unless given) and return the exit code."""
    try:
        result = group.main(arguments, prog_name, standalone_mode=False)
    except PsElasticError as error:
        click.echo(f"ps-elastic: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # click takes any for an unanswered question; we ask none
            raise abort.__cause__ from None
        click.echo("ps-elastic: interrupted", err=True)
        return INTERRUPTED
    return result if isinstance(result, int) else OK
