"""What the user sees while a run goes on."""

from __future__ import annotations

import io
import math
import re
import sys
from typing import Any

import pytest
from helpers import Desk

from ps_elastic.config.load import load
from ps_elastic.policies.rules.asynchronous import Asynchronous
from ps_elastic.runtime import live
from ps_elastic.runtime.live import Live


@pytest.fixture
def desk() -> Desk:
    """A server with two pushes used, the second one step stale."""
    desk = Desk(Asynchronous(), 2)
    desk.push(1, 1.0, loss=0.5)
    desk.push(2, 1.0, loss=0.25)
    return desk


@pytest.fixture
def shown(desk, monkeypatch, capsys) -> Any:
    """What a Live on that server writes while `what` is done to it."""

    def show(what: Any, *, terminal: bool = False, quiet: bool = False) -> str:
        monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
        monkeypatch.setenv("COLUMNS", "200")
        config = load({"task": "quadratic", "policy": "asynchronous", "train": {"samples": 10}}, plugins=False)
        what(Live(desk.server, config, quiet=quiet))
        said = capsys.readouterr()
        assert said.out == ""
        return said.err

    return show


def test_without_a_terminal_it_writes_plain_lines(shown):
    line = shown(Live.show)
    assert re.fullmatch(
        r"samples 2/10  loss 0.25  accuracy -  samples/s \d+  staleness 0.5  D rms [\d.]+  workers waiting -\n", line
    )


def test_where_no_push_told_a_loss_there_is_none(shown, desk):
    desk.server.totals.loss = math.nan
    assert "loss -  accuracy" in shown(Live.show)
    desk.server.totals.metrics["loss"] = math.nan  # of an evaluation: that is the model's
    assert "loss nan  accuracy" in shown(Live.show)


def test_on_a_terminal_it_draws_a_table(shown):
    def draw(live: Live) -> None:
        with live:
            live.update()

    drawn = shown(draw, terminal=True)
    assert "quadratic: asynchronous, identity" in drawn
    assert "D rms" in drawn and "2/10" in drawn and "\x1b[" in drawn


def test_lines_come_now_and_then_however_often_it_is_updated(shown, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])

    def update_for_12_s(live: Live) -> None:
        for _ in range(1200):
            now[0] += 0.01
            live.update()

    assert shown(update_for_12_s).count("samples 2/10") == 3  # at once, and every five seconds


def test_the_rate_is_of_the_time_since_the_last_line(shown, desk, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])

    def two_lines(live: Live) -> None:
        for more in (0, 3):
            for _ in range(more):
                desk.push(1)
            now[0] += 0.5
            live.show()

    assert re.findall(r"samples/s (\d+)", shown(two_lines)) == ["4", "6"]


def test_who_waits_is_named(shown, desk):
    desk.server.ledger.waiting[2] = None
    assert "waiting 2\n" in shown(Live.show)


def test_the_last_state_is_shown_at_the_end_and_lines_said_stay(shown):
    def run(live: Live) -> None:
        with live:
            live.say("[hello] this is not markup")

    assert shown(run).splitlines()[0] == "[hello] this is not markup"
    assert "samples 2/10" in shown(run)


def test_quiet_is_silent(shown):
    def run(live: Live) -> None:
        with live:
            live.update()
            live.say("hello")

    assert shown(run, quiet=True) == shown(run, quiet=True, terminal=True) == ""


def test_it_falls_silent_where_nobody_listens_any_more(desk, monkeypatch):
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    monkeypatch.setattr(sys, "stderr", Broken())
    shows = Live(desk.server, load({"task": "quadratic"}, plugins=False))
    shows.say("one")  # rich itself would end the process with SystemExit
    shows.show()
