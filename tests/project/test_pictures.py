"""docs/pictures: what `launch/pictures` writes, to be read on light and on dark pages."""

from __future__ import annotations

import importlib
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PICTURES = REPOSITORY / "docs" / "pictures"
FILES = sorted(PICTURES.glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def drawings(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(REPOSITORY / "launch"))
    yield importlib.import_module("drawings.__main__")
    for name in [name for name in sys.modules if name.partition(".")[0] == "drawings"]:
        del sys.modules[name]


def test_the_files_are_what_the_script_writes(drawings: ModuleType) -> None:
    assert drawings.pictures() == {path.name: path.read_text(encoding="utf-8") for path in FILES}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_figures_are_those_of_the_comparison(drawings: ModuleType) -> None:
    stored = json.loads(drawings.FIGURES.read_text())
    measured = drawings.time_to_accuracy.measure()
    assert list(measured) == list(stored)
    for policy, points in measured.items():
        assert [time for time, _ in points] == pytest.approx([time for time, _ in stored[policy]], rel=1e-3)
        # another processor rounds otherwise, which momentum makes larger: only where runs end is the same
        late = [[accuracy for _, accuracy in found[-10:]] for found in (points, stored[policy])]
        assert sum(late[0]) / 10 == pytest.approx(sum(late[1]) / 10, abs=0.03)


def test_the_bars_say_who_waits(drawings: ModuleType) -> None:
    waits = {}
    for policy in drawings.waiting.POLICIES:
        spells, used = drawings.waiting.spells(policy)
        for worker in (1, 2, 3):  # no gap, no overlap
            own = sorted(spell for spell in spells if spell.worker == worker)
            assert own[0].begin == 0 and own[-1].end == drawings.waiting.END_S
            assert [spell.end for spell in own[:-1]] == [spell.begin for spell in own[1:]]
        waits[policy] = (used, sum(spell.end - spell.begin for spell in spells if not spell.computes))
    assert waits["synchronous"] == (12, 4 * 2 * 2.0)
    assert waits["asynchronous"] == (28, 0)
    assert waits["stale_synchronous:bound=1"] == (14, 2 * (1.0 + 3 * 2.0))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_picture_is_described_has_no_background_and_fits_its_frame(path: Path) -> None:
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    named = {element.get("id"): element for element in root if element.tag in (f"{SVG}title", f"{SVG}desc")}
    assert root.get("role") == "img" and root.get("aria-labelledby") == " ".join(map(str, named))
    assert all(len((element.text or "").split()) > 2 for element in named.values())
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for box in root.iter(f"{SVG}rect"):
        assert float(box.get("width", 0)) < width and float(box.get("height", 0)) < height
    for text in root.iter(f"{SVG}text"):
        size = {"small": 12, "code": 13}.get((text.get("class") or "").split(" ")[0], 14)
        wide = 0.65 * size * len(text.text or "")  # more than most fonts take
        left = float(text.get("x", 0)) - {"start": 0, "middle": wide / 2, "end": wide}[text.get("text-anchor", "start")]
        assert left >= 0 and left + wide <= width, text.text
        assert size < float(text.get("y", 0)) < height, text.text


def test_text_and_lines_stand_out_on_both_grounds(drawings: ModuleType) -> None:
    svg = importlib.import_module("drawings.svg")
    for text, ground in (svg.LIGHT, svg.DARK):
        assert contrast(text, ground) >= 7  # WCAG 2, 1.4.6
    for colour in (svg.BLUE, svg.GREEN, svg.GREY, svg.ORANGE):
        for ground in (svg.LIGHT[1], svg.DARK[1], "#1e2129", "#0d1117"):  # of the site and of code hosts, too
            assert contrast(colour, ground) >= 3, (colour, ground)  # WCAG 2, 1.4.11
    used = {colour for path in FILES for colour in re.findall(r"#[0-9a-f]{6}", path.read_text())}
    assert used <= {svg.BLUE, svg.GREEN, svg.GREY, svg.ORANGE, *svg.LIGHT, *svg.DARK}


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2 of two colours #rrggbb: 1 to 21."""
    darker, lighter = sorted((brightness(one), brightness(other)))
    return (lighter + 0.05) / (darker + 0.05)


def brightness(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_wrong_picture_would_be_noticed(drawings: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawings.waiting, "TIMES_S", (1.0, 1.0, 2.0))
    assert drawings.waiting.draw() != (PICTURES / "waiting.svg").read_text()
