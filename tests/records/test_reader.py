"""A record that was cut, edited, damaged or made by another version is refused by name, before anything is replayed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import fit

from ps_elastic import __version__
from ps_elastic.errors import ConfigError
from ps_elastic.records.reader import open_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fit(tmp_path, "helpers:Blobs", "policy=asynchronous", samples=60).directory


def refusal(run: Path, **flags: bool) -> str:
    with pytest.raises(ConfigError) as error:
        open_run(str(run), **flags)
    assert error.value.exit_code == 2
    return str(error.value)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_record_that_is_whole_is_opened(run: Path) -> None:
    record = open_run(str(run))
    assert (record.workers, record.directory) == (3, run)
    assert list(record.lines()) == (run / "events.jsonl").read_text().splitlines()
    assert record.parameters_sha256 == json.loads((run / "summary.json").read_text())["parameters_sha256"]


def test_a_record_that_was_cut_is_refused(run: Path) -> None:
    events = run / "events.jsonl"
    lines = events.read_text().splitlines(keepends=True)
    for kept, found in ((lines[:-1], len(lines) - 1), ([*lines[:-1], lines[-1][:-9]], len(lines) - 1), ([], 0)):
        events.write_text("".join(kept))
        assert refusal(run) == (
            f"{events}: cut: {found} whole lines, expected the {len(lines)} that summary.json tells of"
        )
    events.write_text("".join(lines) + '{"event": ')
    assert "events.jsonl: cut: " in refusal(run)


def test_a_record_that_was_edited_is_refused(run: Path) -> None:
    events = run / "events.jsonl"
    text = events.read_text()
    events.write_text(text.replace('"step": 2', '"step": 3', 1))
    assert re.fullmatch(
        rf"{events}: edited since it was written: its SHA-256 is \w{{64}}, expected \w{{64}} as summary.json says",
        refusal(run),
    )
    events.write_text(text + text.splitlines()[-1] + "\n")
    assert "events.jsonl: edited since it was written" in refusal(run)


def test_a_configuration_that_was_edited_is_refused(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 1"))
    assert f"{config}: edited since it was written" in refusal(run)


def test_a_record_of_another_version_is_refused(run: Path) -> None:
    edit(run / "env.json", lambda env: env["versions"].update(ps_elastic="0.0.7"))
    assert refusal(run) == (
        f"{run}: recorded by ps_elastic 0.0.7, and this is {__version__}; only the version that made a record "
        "replays it: pip install ps_elastic==0.0.7"
    )


def test_a_summary_without_its_seal_is_refused(run: Path) -> None:
    edit(run / "summary.json", lambda summary: summary.pop("record"))
    assert refusal(run) == f"{run / 'summary.json'}: edited: it lacks the seal of the record, `record`"


def test_an_environment_that_cannot_be_read_is_refused(run: Path) -> None:
    env = run / "env.json"
    edit(env, lambda env: env.pop("workers"))
    assert refusal(run) == f"{env}: cut or edited: it lacks `workers` or `versions`"
    env.write_text("{")
    assert refusal(run).startswith(f"{env}: cut or edited: Expecting")


@pytest.mark.parametrize("name", ["env.json", "config.yaml", "events.jsonl"])
def test_a_folder_that_is_no_run_is_refused(run: Path, name: str) -> None:
    (run / name).unlink()
    assert refusal(run) == f"{run}: no {name} here; expected the folder of a run"


def test_a_run_that_was_killed_is_opened_where_that_is_asked_for(run: Path) -> None:
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(lines[:9]) + lines[9][:30])
    (run / "summary.json").unlink()
    assert "the run was killed, or goes on" in refusal(run) and "--unfinished replays" in refusal(run)
    record = open_run(str(run), unfinished=True)
    assert list(record.lines()) == [line.rstrip("\n") for line in lines[:9]]
    assert (record.summary, record.parameters_sha256) == (None, None)


def test_a_run_that_was_not_killed_is_checked_all_the_same(run: Path) -> None:
    (run / "events.jsonl").write_text("")
    assert "cut: 0 whole lines" in refusal(run, unfinished=True)
