"""`ps-elastic compare`: the same training under several policies and compressors, and one table of it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ps_elastic import __version__
from ps_elastic.analysis.compare import plan
from ps_elastic.analysis.compare.session import Session, reason
from ps_elastic.analysis.compare.statistics import figure, require_scipy
from ps_elastic.cli import _options
from ps_elastic.cluster import launcher
from ps_elastic.config.load import load
from ps_elastic.errors import INTERRUPTED, OK, PREEMPTED, ConfigError
from ps_elastic.records.run_dir import new_run_dir

PLAIN_WIDTH = 160  # columns of a table that goes to a file
MARK = "* D is to the server model including late gradients, not to the server model"


@click.command("compare")
@_options.configuration
@click.option("--workers", type=click.IntRange(min=1), default=3, show_default=True, help="Workers of each run.")
@click.option("--policies", help="Comma-separated, as in synchronous,stale_synchronous:bound=4. [default: CONFIG's]")
@click.option("--compressors", help="Comma-separated, as in identity,top_k:ratio=0.01. [default: CONFIG's]")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of each pair.")
@click.option("--out", metavar="DIR", help="Folder, new or of a comparison to continue. [default: runs/...]")
@click.option("--json", "as_json", is_flag=True, help="Write the document to stdout, all else to stderr.")
def command(
    config: str,
    overrides: tuple[str, ...],
    workers: int,
    policies: str | None,
    compressors: str | None,
    seeds: int,
    out: str | None,
    as_json: bool,
) -> int:
    """Run CONFIG under each policy, compressor and seed, one after another, and print one table.

    A comma separates two names, so no setting in --policies or --compressors can hold one. A setting left out is as
    CONFIG says for the same name, else the default. The first policy with the first compressor is the baseline.
    With the same --out the finished runs of an interrupted comparison are kept and the others run.
    """

    def resolve(own_overrides: Sequence[str]) -> dict[str, Any]:
        resolved = load(config, own_overrides)
        if (needed := resolved.policy.build().workers_needed()) > workers:
            raise ConfigError(f"{resolved.policy.text()} needs {needed} workers, got {workers}", source="--workers")
        return resolved.to_dict()

    base = load(config, overrides)
    comparison = plan.plan(
        config,
        base.to_dict(),
        overrides,
        resolve,
        workers=workers,
        policies=(base.policy.text(),) if policies is None else plan.split("--policies", policies),
        compressors=(base.compressor.text(),) if compressors is None else plan.split("--compressors", compressors),
        seeds=seeds,
    )
    if seeds > 1:
        require_scipy()
    launcher.refuse_unfit(workers + 1)
    machine = launcher.describe(workers + 1, base.most_threads)
    folder = Path(out) if out else new_run_dir(f"compare-{base.name}", None)
    click.echo(f"ps-elastic: {machine}\nps-elastic: folder {folder}", err=True)
    return perform(Session(comparison, folder, resolve, launcher.run_job, versions()), as_json)


def perform(session: Session, as_json: bool) -> int:
    """Run what is missing, show it, print the table or the document, and return the exit code."""
    session.open()
    code = run_cells(session, Console(stderr=True, soft_wrap=True))
    document = session.document()
    console = Console(stderr=as_json)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    if document["rows"]:
        console.print(table(document))
        if any(map(_is_marked, document["rows"])):
            console.print(MARK, markup=False, highlight=False)
        console.print(document["recommendation"]["text"], markup=False, highlight=False)
    else:
        console.print("No run finished.")
    console.print(f"{session.out}/comparison.json", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        click.echo(json.dumps(document))
    return code


def run_cells(session: Session, screen: Console) -> int:
    """Run the cells that are not finished, one after another; 0, or the code of the first that failed.

    A failed cell is named and the next one runs; an interrupted one ends the comparison with its code.
    """
    failed = OK
    cells = session.comparison.cells
    try:
        for number, cell in enumerate(cells, 1):
            label = f"[{number}/{len(cells)}] {cell}"
            if cell in session.entries:
                screen.print(f"{label}: finished before, kept", markup=False, highlight=False)
                continue
            with working(screen, label):
                entry = session.execute(cell)
            screen.print(f"{label}: {outcome(entry, session.out)}", markup=False, highlight=False)
            if entry["exit"] in (INTERRUPTED, PREEMPTED):
                return int(entry["exit"])
            failed = failed or entry["exit"]
    except KeyboardInterrupt:
        return INTERRUPTED
    return failed


@contextmanager
def working(screen: Console, label: str) -> Iterator[None]:
    """Show that `label` is at work: a line with the time elapsed on a terminal, else one plain line."""
    if not screen.is_terminal:
        screen.print(f"{label} ...", markup=False, highlight=False)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as progress:
        progress.add_task(escape(label), total=None)
        yield


def outcome(entry: dict[str, Any], out: Path) -> str:
    """How one cell went, in a line: its accuracy and time, or its exit code, reason and log file."""
    if entry["status"] == "done":
        accuracy = figure(entry["summary"], "metrics.accuracy")
        return f"done in {entry['elapsed_s']:.1f} s" + ("" if accuracy is None else f", accuracy {accuracy:.2%}")
    log = out / entry["log"]
    if entry["exit"] in (INTERRUPTED, PREEMPTED):
        return f"interrupted with exit {entry['exit']} (see {log})"
    words = reason(entry, out)
    return f"failed with exit {entry['exit']}" + (f": {words}" if words else "") + f" (see {log})"


def table(document: dict[str, Any]) -> Table:
    """The rows of a comparison for a person to read."""
    several = len(document["seeds"]) > 1
    made = Table(title=f"{document['config_file']}: workers {document['workers']}, seeds {len(document['seeds'])}")
    for name in ("policy", "compressor"):
        made.add_column(name, overflow="fold")
    if several:
        made.add_column("seeds", justify="right")
    accuracy = "accuracy (sd)" if several else "accuracy"
    figures = (accuracy, "time", "bytes up + down", "staleness mean / max", "D rms / max", "discarded", "wait time")
    for name in figures:
        made.add_column(name, justify="right")
    for row in document["rows"]:
        done = [f"{len(row['seeds'])}/{len(document['seeds'])}"] if several else []
        made.add_row(row["policy"], row["compressor"], *done, *shown(row))
    return made


def _is_marked(row: dict[str, Any]) -> bool:
    """Whether the D of this row is not the same quantity as that of the others."""
    return bool(row["discrepancy_of"] == "ideal" and row["discrepancy"]["rms"] is not None)


def shown(row: dict[str, Any]) -> Iterator[str]:
    """The figures of a row as text, in the order of the table; `-` for what there is not."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    def size(value: float | None) -> str:
        return "-" if value is None else decimal(round(value))

    sd = row["accuracy"]["sd"]
    yield number(row["accuracy"]["mean"], ".2%") + ("" if sd is None else f" ({sd:.2%})")
    yield "-" if row["wall_s"] is None else f"{row['wall_s']:.1f} s"
    yield f"{size(row['bytes_up'])} + {size(row['bytes_down'])}"
    yield f"{number(row['staleness']['mean'], '.2f')} / {number(row['staleness']['max'], '.0f')}"
    mark = "*" if _is_marked(row) else ""
    yield f"{mark}{number(row['discrepancy']['rms'], '.3g')} / {number(row['discrepancy']['max'], '.3g')}"
    yield number(row["dropped"], "g")
    yield number(row["wait_share"], ".0%")


def versions() -> dict[str, str | None]:
    """The installed versions that a result depends on; null for what is not installed."""
    found: dict[str, str | None] = {"ps_elastic": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "mpi4py"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
