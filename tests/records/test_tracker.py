from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ps_elastic.records import tracker
from ps_elastic.records.tracker import Lines, Tracker, finite


def test_a_line_has_event_time_and_rank_first() -> None:
    lines: list[str] = []
    Tracker(2, lines.append).note("reply", 1.5, step=3, outcome="used")
    assert json.loads(lines[0]) == {"event": "reply", "t_s": 1.5, "rank": 2, "step": 3, "outcome": "used"}
    assert list(json.loads(lines[0]))[:3] == ["event", "t_s", "rank"]


def test_numbers_read_back_the_same_and_what_is_not_finite_is_null() -> None:
    lines: list[str] = []
    values = {"a": 0.1 + 0.2, "b": 5e-324, "c": 1.7976931348623157e308, "d": math.nan, "e": math.inf, "f": -math.inf}
    Tracker(0, lines.append).note("used", 1 / 3, **values)
    read = json.loads(lines[0], parse_constant=pytest.fail)
    assert [read[key] for key in "abc"] == [values[key] for key in "abc"]
    assert [read[key] for key in "def"] == [None] * 3
    assert read["t_s"] == 1 / 3


def test_lines_told_later_are_made_by_the_batch_in_their_order_and_before_any_other() -> None:
    lines: list[str] = []
    tracker = Tracker(0, lines.append, batch=3)
    for i in range(4):
        tracker.later("line {}".format, i)
        assert lines == ([] if i < 2 else ["line 0\nline 1\nline 2"])
    tracker.note("dropped", 1.0)
    assert lines[1] == "line 3" and json.loads(lines[2])["event"] == "dropped"
    tracker.later("line {}".format, 5)
    tracker.tell()
    tracker.tell()
    assert lines[3:] == ["line 5"]


def test_lines_that_the_disk_refused_are_not_written_twice() -> None:
    lines: list[str] = []

    def write(line: str) -> None:
        lines.append(line)
        if "two" in line:
            raise OSError("full")

    tracker = Tracker(0, write, batch=2)
    tracker.later(lambda: "one")
    with pytest.raises(OSError, match="full"):
        tracker.later(lambda: "two")
    tracker.tell()
    assert lines == ["one\ntwo"]


def test_finite_leaves_everything_else_alone() -> None:
    assert [finite(value) for value in (1, 2.5, "nan", None, True)] == [1, 2.5, "nan", None, True]


def test_lines_are_written_in_batches_and_all_of_them_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(tracker, "monotonic", lambda: clock[0])
    path = tmp_path / "rank-000.jsonl"
    lines = Lines(path)
    lines.write("one")
    assert path.read_text() == ""
    clock[0] = 1.1
    lines.write("two")
    assert path.read_text() == "one\ntwo\n"
    lines.write("x" * 70_000)
    assert len(path.read_text()) == 70_009
    lines.write("last")
    lines.flush()
    lines.write("very last")
    lines.close()
    assert path.read_text().endswith("x\nlast\nvery last\n")


def test_a_full_disk_is_told() -> None:
    lines = Lines(Path("/dev/full"))
    lines.write("something")
    with pytest.raises(OSError, match="No space left"):
        lines.flush()
