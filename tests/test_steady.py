"""The experiment that repeats the quick tests, on a few tests made up here."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest

EXPERIMENTS = Path(__file__).resolve().parent.parent / "launch" / "experiments"
FLAKY = """
from pathlib import Path
import pytest
count = Path({count!r})
def test_sound(): pass
def test_flaky():
    count.write_text(str(int(count.read_text()) + 1))
    assert count.read_text() != "2"
@pytest.mark.slow
def test_slow(): raise AssertionError
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The experiment, for three rounds of a file in which one test fails the second time."""
    count, tests = tmp_path / "count", tmp_path / "test_made_up.py"
    count.write_text("0")
    tests.write_text(FLAKY.format(count=str(count)))
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    module = importlib.import_module("steady")
    monkeypatch.setattr(module, "OUT", tmp_path / "rounds")
    monkeypatch.setattr(module, "ROUNDS", 3)
    monkeypatch.setattr(module, "TESTS", [str(tests), "-p", "no:cacheprovider"])
    monkeypatch.setattr(sys.modules["_page"], "EVIDENCE", tmp_path)
    monkeypatch.setattr(module, "publish", lambda evidence: sys.modules["_page"].publish(evidence, tmp_path))
    yield module
    for name in ("steady", "_page"):
        sys.modules.pop(name, None)


def test_a_test_that_fails_in_one_round_is_named_and_rounds_made_are_not_made_again(
    steady: ModuleType, tmp_path: Path
) -> None:
    assert steady.main() == 6
    page, facts = (tmp_path / "steady.md").read_text(), json.loads((tmp_path / "steady.json").read_text())
    assert [len(each["failed"]) for each in facts["data"]["rounds"]] == [0, 1, 0]
    assert "test_made_up::test_flaky` failed in 1 rounds." in page
    assert "| 2 | 0 | 3 | 1 |" in page and "- FAILS: no test failed in 3 rounds under load" in page
    assert (tmp_path / "count").read_text() == "3"
    steady.ROUNDS = 4
    assert steady.main() == 6
    assert (tmp_path / "count").read_text() == "4"
    assert not [p for p in psutil.Process().children(recursive=True) if steady._BUSY in p.cmdline()]


def test_rounds_of_other_tests_do_not_count(steady: ModuleType, tmp_path: Path) -> None:
    steady.ROUNDS = 1
    assert steady.main() == 0
    steady.TESTS = [*steady.TESTS, "-k", "sound"]
    assert steady.main() == 0
    assert json.loads((tmp_path / "steady.json").read_text())["data"]["rounds"][0]["tests"] == 1
    steady.TESTS = [str(tmp_path / "missing.py")]
    with pytest.raises(SystemExit, match="pytest ended with 4"):
        steady.main()
