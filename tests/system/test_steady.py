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

EXPERIMENTS = Path(__file__).resolve().parents[2] / "launch" / "experiments"
FLAKY = """
import os, tempfile, time
from pathlib import Path
import pytest
here = Path({here!r})
def test_sound(tmp_path):
    time.sleep(1.5)  # so that the next round begins meanwhile
    (here / f"{{os.getpid()}}.ran").write_text(f"{{tmp_path}} {{tempfile.gettempdir()}}")
def test_flaky():
    try:
        (here / "came first").mkdir()
    except FileExistsError:
        return
    raise AssertionError("nobody came before")
@pytest.mark.slow
def test_slow(): raise AssertionError
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The experiment, for three rounds, two at once, of a file in which a test fails in whichever comes to it first."""
    tests = tmp_path / "test_made_up.py"
    tests.write_text(FLAKY.format(here=str(tmp_path)))
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    module = importlib.import_module("steady")
    monkeypatch.setattr(module, "OUT", tmp_path / "rounds")
    monkeypatch.setattr(module, "ROUNDS", 3)
    monkeypatch.setattr(module, "TOGETHER", 2)
    monkeypatch.setattr(module, "TESTS", [str(tests)])
    monkeypatch.setattr(module, "publish", lambda evidence: sys.modules["_page"].publish(evidence, tmp_path))
    yield module
    for name in ("steady", "_page"):
        sys.modules.pop(name, None)


def facts(folder: Path) -> list[dict]:
    return json.loads((folder / "steady.json").read_text())["data"]["rounds"]


def test_a_test_that_fails_in_one_round_is_told_with_its_text_and_rounds_made_are_not_made_again(
    steady: ModuleType, tmp_path: Path
) -> None:
    assert steady.main() == 6
    page = (tmp_path / "steady.md").read_text()
    [failed] = [each["failed"] for each in facts(tmp_path) if each["failed"]]
    assert list(failed) == ["test_made_up::test_flaky"]
    assert "AssertionError: nobody came before" in failed["test_made_up::test_flaky"]
    assert "test_made_up::test_flaky` failed in 1 rounds." in page
    assert "| 2 | 0 | 3 | 2 | 1 |" in page and "- FAILS: no test failed in 3 rounds under load" in page
    assert len(list(tmp_path.glob("*.ran"))) == 3
    steady.ROUNDS = 4
    next(path for path in steady.OUT.glob("*.json") if "nobody" not in path.read_text()).unlink()
    assert steady.main() == 6
    assert len(list(tmp_path.glob("*.ran"))) == 5


def children() -> set[psutil.Process]:
    """All that these tests started and that runs: other tests keep some."""
    return set(psutil.Process().children(recursive=True))


def test_rounds_run_together_and_write_nothing_in_common(
    steady: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "came first").mkdir()
    running, before = [], children()

    class Seen(steady.Round):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            running.append([p.cmdline() for p in psutil.Process().children() if "pytest" in p.cmdline()])

    monkeypatch.setattr(steady, "Round", Seen)
    assert steady.main() == 0
    assert [len(commands) for commands in running][:2] == [1, 2]
    used = [path.read_text().split() for path in tmp_path.glob("*.ran")]
    assert len({temporary for _, temporary in used}) == 3
    assert all(Path(basetemp).is_relative_to(temporary) for basetemp, temporary in used)
    assert not [temporary for _, temporary in used if Path(temporary).exists()]
    assert children() <= before


def test_rounds_of_other_tests_or_in_other_company_do_not_count(steady: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "came first").mkdir()
    steady.ROUNDS = 1
    assert steady.main() == 0
    steady.TESTS = [*steady.TESTS, "-k", "sound"]
    assert steady.main() == 0
    assert [each["tests"] for each in facts(tmp_path)] == [1]
    steady.TOGETHER = 1
    assert steady.main() == 0
    assert [each["together"] for each in facts(tmp_path)] == [1]
    assert len(list(tmp_path.glob("*.ran"))) == 3


def test_where_nothing_can_be_counted_it_ends_and_leaves_nothing(steady: ModuleType, tmp_path: Path) -> None:
    steady.TESTS, before = [str(tmp_path / "missing.py")], children()
    with pytest.raises(SystemExit, match=r"pytest ended with 4 after .* it said: .*/00[12]\.log"):
        steady.main()
    assert children() <= before
    assert not list((tmp_path / "rounds").glob("*.json"))
