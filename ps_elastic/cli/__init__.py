"""`ps-elastic`: finds the command, runs it, and turns errors into one message and an exit code.

A command is a file in `ps_elastic/cli` with a click command called `command`; only the one that is named is imported,
and none for `--help`: what that says of each stands here. A command imports neither torch nor numpy before it runs. It
returns nothing, or its exit code.
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
# What `--help` says of each: the first sentence of its help, cut where that is too long, or a short help as it stands.
_HELP = {
    "compare": "Run CONFIG under each policy, compressor and seed, one after another, and print one table.",
    "config": "Show or validate a configuration file, or describe all that it may hold.",
    "doctor": "Look at MPI, launcher, cores, shared memory and SLURM; "
    "exit 3 if something would keep a job from running.",
    "launch": "Train CONFIG on one server and RANKS - 1 workers.",
    "list": "List all of a KIND (policies, compressors, tasks, updates, benchmarks) with settings and defaults.",
    "submit": "Submit the training of CONFIG to SLURM: one server and NODES x TASKS_PER_NODE - 1 workers.",
}
_SHORT = {
    "bench": "Measure, beside a baseline.",
    "replay": "Check a recorded run against its policy, train it again bit for bit, or ask another policy.",
    "simulate": "Run in simulated time, with as many workers as you like.",
    "train": "Train under mpirun (this process is one rank), or in one process.",
    "verify": "Compare policies with their own bounds, over many seeds.",
}
STAND_INS = [
    click.Command(name, help=_HELP.get(name), short_help=_SHORT.get(name)) for name in sorted([*_HELP, *_SHORT])
]


class _Commands(click.Group):
    """The files of `ps_elastic.cli`, imported when they are asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(name for _, name, _ in pkgutil.iter_modules(package.__path__) if not name.startswith("_"))

    def get_command(self, context: click.Context, name: str) -> click.Command:
        known = self.list_commands(context)
        if name not in known:
            raise click.UsageError(unknown("command", name, known), context)
        command: click.Command = importlib.import_module(f"{package.__name__}.{name}").command
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        click.Group(commands=STAND_INS).format_commands(context, formatter)


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
