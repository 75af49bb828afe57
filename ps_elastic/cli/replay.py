"""`ps-elastic replay RUN`: the decisions of a recorded run made again, or all of it, or those of another policy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import click

from ps_elastic.analysis.replay.decisions import Replay, replay_decisions
from ps_elastic.analysis.replay.hindsight import Hindsight, Motion, PolicyTotals
from ps_elastic.cli import _options
from ps_elastic.cluster.threads import set_threads
from ps_elastic.config.load import load
from ps_elastic.config.schema import Config
from ps_elastic.errors import CHECK_FAILED, OK, ConfigError
from ps_elastic.records.reader import RunReader, open_run, read_line


@click.command("replay")
@click.argument("run")
@click.option("--recompute", is_flag=True, help="Train it again in the recorded order, to the same parameters.")
@click.option(
    "--policy", "policies", multiple=True, metavar="ONE_LINE", help="Ask this policy about the same arrivals."
)
@click.option("--unfinished", is_flag=True, help="Accept a run that was killed: its log may not be whole.")
@_options.as_json
def command(run: str, recompute: bool, policies: tuple[str, ...], unfinished: bool, as_json: bool) -> int:
    """Check that the policy of RUN/config.yaml orders what RUN/events.jsonl says, byte for byte; exit 6 if not.

    With --recompute, server and workers compute everything again. With --policy, tell what other policies would
    have ordered on the recorded arrivals. A run log that was cut or edited is refused; so is one of another ps_elastic.
    """
    if recompute and policies:
        raise click.UsageError("--recompute repeats the run and --policy asks about another policy: use one of them")
    record = open_run(run, unfinished=unfinished)
    document = _recompute(record) if recompute else _replay(record, policies)
    if as_json:
        click.echo(json.dumps(document))
    else:
        for line in _told(document):
            click.echo(line)
    return OK if document["match"] else CHECK_FAILED


def _replay(record: RunReader, policies: Sequence[str]) -> dict[str, Any]:
    config, tally = _load(record), PolicyTotals()
    others = [_load(record, [f"policy={policy}", "update.pipeline=0"]) for policy in policies]
    for asked in [config, *others] if policies else []:
        if asked.policy.build().layerwise:
            raise ConfigError(
                f"{asked.policy.text()} takes layers, and what a worker has ready depends on when each was released: "
                "no other policy can be asked about its arrivals, nor it about those of others",
                key="--policy",
            )
    replay = replay_decisions(
        config.policy.build(), record.lines(), range(1, record.workers + 1), record.events, tally.note,
        pipeline=config.update.pipeline,
    )  # fmt: skip
    document = _document(record, replay, None)
    if policies:
        recorded = {"policy": config.policy.text(), "recorded": True, **tally.figures(), "unsent": 0}
        document["rows"] = [recorded] if replay.match else []
        for other in others:
            motion = Motion(config.optimizer.momentum, config.optimizer.nesterov)
            told = (
                read_line(line, f"{record.events}:{number}", first=number == 1)
                for number, line in enumerate(record.lines(), 1)
            )
            figures = Hindsight(other.policy.build(), record.workers, motion).run(told)
            document["rows"].append({"policy": other.policy.text(), "recorded": False, **figures})
    return document


def _recompute(record: RunReader) -> dict[str, Any]:
    if record.env.get("headers_only"):
        raise ConfigError("this was a timing-only simulation: there are no parameters to compute", source=record.events)
    config = _load(record)
    if config.views == "torn":
        raise ConfigError(
            "views: torn: what the workers read while the model was written is in no record, so that their gradients "
            "cannot be computed again; without --recompute the decisions are replayed",
            source=record.events,
        )
    server_threads = record.env.get("torch_threads", config.most_threads)
    set_threads(max(config.threads, server_threads), 1)
    from ps_elastic.analysis.replay.recompute import recompute, warnings

    for warning in warnings(record.env):
        click.echo(f"ps-elastic: {warning}", err=True)
    replay, parameters = recompute(
        _load(record, plugins=True), record.lines(), record.workers, server_threads=server_threads,
        source=record.events, whole=record.summary is not None,
    )  # fmt: skip
    return _document(record, replay, parameters)


def _load(record: RunReader, overrides: Sequence[str] = (), *, plugins: bool = False) -> Config:
    """The run's configuration. Raises ConfigError also where its policy needs more workers than there were."""
    config = load(record.config, overrides, plugins=plugins, simulated=True)
    if (needed := config.policy.build().workers_needed()) > record.workers:
        raise ConfigError(f"{config.policy.text()} needs {needed} workers, and the run had {record.workers}")
    return config


def _document(record: RunReader, replay: Replay, parameters: str | None) -> dict[str, Any]:
    """The contract of `replay --json`; `first_mismatch` is null, or {line, recorded, replayed, error, text}."""
    recorded, mismatch = record.parameters_sha256, replay.first_mismatch
    told = None if mismatch is None else {**mismatch._asdict(), "text": str(mismatch)}
    if parameters is not None and recorded is not None and parameters != recorded:
        text = f"every event is the same, but the parameters are {parameters}, recorded {recorded}"
        told = {"line": None, "recorded": recorded, "replayed": parameters, "error": None, "text": text}
    return {
        "events": replay.events,
        "actions": replay.actions,
        "match": told is None,
        "first_mismatch": told,
        "parameters_sha256": parameters,
        "recorded_sha256": recorded,
    }


def _told(document: dict[str, Any]) -> Iterator[str]:
    """The document for a person to read."""
    counts = f"{document['events']} events, {document['actions']} actions"
    if document["match"]:
        yield f"{counts}: the same as recorded"
        if (sha256 := document["parameters_sha256"]) is not None:
            known = document["recorded_sha256"] is not None
            yield f"parameters {sha256}: " + ("the same as recorded" if known else "the record has none to compare")
    else:
        yield f"{counts} until the first difference: {document['first_mismatch']['text']}"
    if rows := document.get("rows"):
        yield ""
        yield from _table(rows)


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    heads = ("policy", "used", "discarded", "kept", "unsent", "steps", "releases", "staleness mean / max", "wait time")
    cells = [heads, *(tuple(_cells(row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield f"{row['policy']} (recorded)" if row["recorded"] else row["policy"]
    yield from (str(row[name]) for name in ("used", "dropped", "held", "unsent", "versions", "releases"))
    mean, most = row["staleness"]["mean"], row["staleness"]["max"]
    yield "-" if mean is None else f"{mean:.2f} / {most}"
    yield "-" if row["wait_share"] is None else f"{row['wait_share']:.1%}"
