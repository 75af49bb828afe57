"""What pages say of the code is what the code says of itself: written by `launch/pages`, and checked here."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from prose import LONGEST, MEAN, measure

from ps_elastic import errors
from ps_elastic.plugins import settings
from ps_elastic.policies import policies

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"
MADE = {
    "config": {"config"},
    "cli": {"commands", "exit_codes"},
    "run_folder": {"files", "comparison"},
    "metrics": {"numbers"},
}


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    yield importlib.import_module("pages_from_code")
    sys.modules.pop("pages_from_code", None)


def test_every_page_is_as_the_code_has_it(pages: ModuleType) -> None:
    assert sorted(str(path) for path in pages.stale()) == [], "launch/pages writes them anew"


@pytest.mark.parametrize(("page", "kinds"), MADE.items())
def test_a_reference_page_has_its_parts_in_short_sentences(page: str, kinds: set[str]) -> None:
    text = (REFERENCE / f"{page}.md").read_text()
    assert set(re.findall(r"<!-- generated: (\w+) -->", text)) == kinds
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []
    mean, long = measure(text)
    assert mean <= MEAN and long == [], f"sentences of {mean:.1f} words, {long} of more than {LONGEST}"


def test_a_stale_page_is_named_by_the_check_and_then_written(
    pages: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "README.md").write_text("None here.\n")
    page = tmp_path / "docs" / "deep" / "policies.md"
    before = "# Rows\n\n<!-- generated: policies -->\nout of date\n<!-- end -->\n\nrest, <!-- generated: updates -->\n"
    before += "<!-- end -->"
    page.write_text(before)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert pages.main(["--check"]) == 1
    assert "docs/deep/policies.md" in capsys.readouterr().out and page.read_text() == before
    assert pages.main([]) == 0 and pages.main(["--check"]) == 0
    text = page.read_text()
    assert text.startswith("# Rows\n\n<!-- generated: policies -->\n| policy |") and "out of date" not in text
    assert text.endswith("<!-- end -->") and "\n<!-- end -->\n\nrest, <!-- generated: updates -->\n| update |" in text
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*)\|", text.split("rest")[0], re.MULTILINE))
    assert {name: bool(cell) for name, cell in rows.items()} == {n: bool(settings(cls)) for n, cls in policies.items()}
    assert pages.main(["--chek"]) == 2


def test_a_cell_keeps_its_bar_and_an_empty_column_goes(pages: ModuleType) -> None:
    rows = [("a|b", "", "1"), ("c", "", "")]
    assert list(pages.table(("x", "y", "z"), rows)) == ["| x | z |", "|---|---|", r"| a\|b | 1 |", "| c |  |", ""]


def test_every_exit_code_has_its_meaning() -> None:
    raised = {
        cls.exit_code
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, errors.PsElasticError)
    }
    assert raised | {errors.OK, errors.CHECK_FAILED} == set(errors.EXIT_CODES)


def test_the_script_can_be_run() -> None:
    assert os.access(ROOT / "launch" / "pages", os.X_OK)
