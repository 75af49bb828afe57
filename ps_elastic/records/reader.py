"""A finished record, opened: the run's settings, and the lines of its events read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ps_elastic import __version__
from ps_elastic.errors import ConfigError
from ps_elastic.policies.events import Applied, Event, Measured, PushId, event_of
from ps_elastic.records.run_dir import SUMMARY, read_summary

Answer = Applied | Measured


class RecordedEvent(NamedTuple):
    """A line of events.jsonl, read back: an event at `t_s` seconds, and the answers among its actions."""

    event: Event
    t_s: float
    answers: tuple[Answer, ...]
    actions: int  # how many, answers left out
    ignored: bool  # it changed nothing: a duplicate, or of a worker that was gone
    bucket: int | None = None  # of a layerwise policy
    buckets: int | None = None  # how many there are, in the first line of each


def read_line(text: str, where: str, *, first: bool) -> RecordedEvent:
    """A line of events.jsonl; `first`: it is the run's first. Raises ConfigError with `where` if it cannot be one."""
    try:
        record = json.loads(text)
        for key in ("worker", "step", "base", "version", "bucket", "buckets"):
            if not isinstance(record.get(key, 0), int):
                raise ValueError(f"{key} is {record[key]!r}, expected a whole number")
        event, now, answers = event_of(record), float(record["t_s"]), tuple(_answers_in(record["actions"]))
    except KeyError as missing:
        raise ConfigError(f"the line lacks {missing}", source=where) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"cut or malformed: {error}", source=where) from None
    opens = isinstance(event, Applied) and (first or "buckets" in record)  # the ledger of each bucket is opened once
    if not opens and (first or isinstance(event, Applied | Measured)):
        expected = "the run's first, version 0 applied" if first else "an event of its own"
        raise ConfigError(f"got '{record['event']}', expected {expected}", source=where)
    actions, buckets = len(record["actions"]) - len(answers), (record.get("bucket"), record.get("buckets"))
    return RecordedEvent(event, now, answers, actions, "ignored" in record, *buckets)


def _answers_in(actions: list[Any]) -> Iterator[Answer]:
    for name, *fields in actions:
        if name == "applied":
            yield Applied(*fields)
        elif name == "measured":
            worker, step, distance = fields
            yield Measured(PushId(worker, step), distance)


class RunReader(NamedTuple):
    """The folder of a run; `summary` is None for a run that was killed before it could write one."""

    directory: Path
    workers: int  # at the start
    env: dict[str, Any]
    summary: dict[str, Any] | None

    @property
    def config(self) -> str:
        return str(self.directory / "config.yaml")

    @property
    def events(self) -> str:
        return str(self.directory / "events.jsonl")

    @property
    def parameters_sha256(self) -> str | None:
        """Of the final model; None where the run did not come to one."""
        return None if self.summary is None else self.summary.get("parameters_sha256")

    def lines(self) -> Iterator[str]:
        """The lines of events.jsonl; of a run that was killed, all but a last one that is not whole."""
        with open(self.events, encoding="utf-8") as file:
            for line in file:
                if self.summary is not None or line.endswith("\n"):
                    yield line.rstrip("\n")


def open_run(run: str, *, unfinished: bool = False) -> RunReader:
    """The record in the folder `run`. Raises ConfigError for one that cannot be trusted to be whole and ours.

    unfinished: a run without summary.json, which was killed, is opened too; nothing tells whether its record is whole.
    """
    directory = Path(run)
    for name in ("env.json", "config.yaml", "events.jsonl"):
        if not (directory / name).is_file():
            raise ConfigError(f"no {name} here; expected the folder of a run", source=run)
    env = _read_env(directory / "env.json")
    version = env["versions"].get("ps_elastic")
    if version != __version__:
        raise ConfigError(
            f"recorded by ps_elastic {version}, and this is {__version__}; only the version that made a record "
            f"replays it: pip install ps_elastic=={version}",
            source=run,
        )
    summary = read_summary(directory)
    if summary is not None:
        _check_seal(directory, summary)
    elif not unfinished:
        raise ConfigError(
            f"no {SUMMARY} that can be read: the run was killed, or goes on, and nothing tells whether its record is "
            "whole; --unfinished replays what is there",
            source=run,
        )
    return RunReader(directory, env["workers"], env, summary)


def _read_env(path: Path) -> dict[str, Any]:
    try:
        env = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"cut or edited: {error}", source=str(path)) from None
    match env:
        case {"workers": int(), "versions": dict()}:
            return dict(env)
    raise ConfigError("cut or edited: it lacks `workers` or `versions`", source=str(path))


def _check_seal(directory: Path, summary: dict[str, Any]) -> None:
    match summary.get("record"):
        case {"config_sha256": str(config), "events": int(count), "events_sha256": str(events)}:
            pass
        case _:
            raise ConfigError("edited: it lacks the seal of the record, `record`", source=str(directory / SUMMARY))
    found, whole, digest = _measure(directory / "events.jsonl")
    if found < count or not whole:
        raise ConfigError(
            f"cut: {found} whole lines, expected the {count} that {SUMMARY} tells of",
            source=str(directory / "events.jsonl"),
        )
    for name, got, expected in (
        ("events.jsonl", digest, events),
        ("config.yaml", _measure(directory / "config.yaml")[2], config),
    ):
        if got != expected:
            raise ConfigError(
                f"edited since it was written: its SHA-256 is {got}, expected {expected} as {SUMMARY} says",
                source=str(directory / name),
            )


def _measure(path: Path) -> tuple[int, bool, str]:
    """(whole lines, whether there is nothing behind the last of them, SHA-256) of a file of any length."""
    lines, end, digest = 0, b"\n", hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            lines, end = lines + block.count(b"\n"), block[-1:]
            digest.update(block)
    return lines, end == b"\n", digest.hexdigest()
