"""The files that README and docs/ show are run here as a reader would; and what they say of the program is true."""

from __future__ import annotations

import importlib
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import PAGES, REPOSITORY, USER_PAGES, Page, shown
from reading import Reader

from ps_elastic import train
from ps_elastic.compressors import compressors
from ps_elastic.plugins import Registry, settings
from ps_elastic.policies import policies

CLASSES = re.compile(r"^class (\w+)\((Policy|Compressor|Task)\):", re.MULTILINE)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    one = Reader(tmp_path, monkeypatch)
    yield one
    one.forget()


# ---- the files that they show


def shown_classes() -> list[tuple[Page, str, str]]:
    """(page, kind, `module:Class`) of every plug-in shown."""
    return [
        (page, kind, f"{Path(name).stem}:{cls}")
        for page in USER_PAGES
        for name, text in page.files.items()
        for cls, kind in CLASSES.findall(text)
    ]


def test_every_plug_in_shown_is_used_on_its_page() -> None:
    assert {kind for _, kind, _ in shown_classes()} == {"Policy", "Compressor", "Task"}
    for page, _, name in shown_classes():
        yamls = [text for file, text in page.files.items() if file.endswith(".yaml")]
        assert any(name in text for text in [*(line.text for line in page.lines), *yamls]), f"{page}: {name}"


@pytest.mark.parametrize(("page", "kind", "name"), shown_classes(), ids=str)
def test_every_plug_in_shown_trains(page: Page, kind: str, name: str, reader: Reader) -> None:
    home = reader.opens(page)
    if kind == "Task":
        (config,) = [file for file, text in page.files.items() if file.endswith(".yaml") and name in text]
        summary = train(home / config, workers=3)
        assert summary is not None and summary["metrics"]["accuracy"] > 0.9
    else:
        summary = train("configs/digits.yaml", [f"{kind.lower()}={name}", "train.samples=3000"], workers=3)
    assert summary is not None
    assert summary["exit"] == 0 and summary["used"] > 0


def alone(page: Page) -> list[str]:
    """The Python files of the page that no line, no configuration and no other file names."""
    others = "\n".join([*(line.text for line in page.lines), *page.files.values()])
    return [
        name
        for name in page.files
        if name.endswith(".py")
        and not re.search(rf"(?<!# file: )\b{re.escape(name)}\b", others)
        and not re.search(rf"\b{Path(name).stem}:\w|^\s*(?:from|import) {Path(name).stem}\b", others, re.MULTILINE)
    ]


@pytest.mark.parametrize("page", [page for page in USER_PAGES if alone(page)], ids=str)
def test_a_python_file_that_no_line_runs_runs(page: Page, reader: Reader) -> None:
    reader.opens(page)
    for name in alone(page):
        runpy.run_path(name, run_name="__main__")


def test_the_python_example_of_the_readme_prints_an_accuracy(
    reader: Reader, capsys: pytest.CaptureFixture[str]
) -> None:
    reader.opens(shown("example.py"))
    runpy.run_path("example.py", run_name="__main__")
    assert float(capsys.readouterr().out.split()[0]) > 0.8
    assert len(list(Path("runs").iterdir())) == 1


def test_the_test_shown_passes(reader: Reader) -> None:
    reader.opens(shown("test_groups.py"))
    module = importlib.import_module("test_groups")
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_the_compressor_shown_keeps_its_bound_and_decodes_what_it_encodes(reader: Reader) -> None:
    import torch

    reader.opens(shown("half.py"))
    half: Any = importlib.import_module("half").Half()
    for seed, numel in ((0, 1), (1, 64), (2, 5000)):
        vector = torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * 10.0 ** torch.arange(numel).fmod(7)
        before = vector.clone()
        payload = half.encode(vector)
        half.check(payload, numel)
        assert torch.equal(vector, before)
        assert sum(-(-array.nbytes // 8) * 8 for array in payload) <= half.max_nbytes(numel) + 7
        error = (half.decode(payload, numel) - vector).double().square().sum()
        assert error <= half.gamma(numel) * vector.double().square().sum()
    assert torch.equal(half.decode(half.encode(torch.zeros(5)), 5), torch.zeros(5))


def test_the_header_reader_shown_reads_what_is_written(reader: Reader) -> None:
    import numpy as np

    from ps_elastic.transport.messages import PushMessage
    from ps_elastic.transport.wire import HEADER_BYTES, pack

    reader.opens(shown("read_header.py"))
    arrays = (np.arange(3, dtype=np.int32), np.array([0.5, -1.0, 2.0], np.float32))
    push = PushMessage(2, 7, 5, arrays, 1, 4, samples=32, loss=0.25, norm=1.5, payload_norm=1.25, residual_norm=0.75)
    frame = pack(push, bytes(range(32)), np.zeros(200, np.uint8)).head.tobytes()
    read = importlib.import_module("read_header").read_header(frame)
    assert read == {
        "kind": "push",
        "flags": 0,
        "worker": 2,
        "bucket": (1, 4),
        "step": 7,
        "version": 5,
        "numbers": (1.5, 1.25, 0.75, 0.0),
        "samples": 32,
        "loss": 0.25,
        "layout": bytes(range(8)),
        "arrays": [("int32", 3, 112), ("float32", 3, 128)],
    }
    assert frame[128:140] == arrays[1].tobytes()
    assert HEADER_BYTES == 112


def test_the_times_shown_are_those_of_every_worker(reader: Reader) -> None:
    reader.opens(shown("where_time_goes.py"))
    summary = train("configs/digits.yaml", ["train.samples=1500"], workers=2)
    assert summary is not None
    times = importlib.import_module("where_time_goes").medians_ms(summary["run_dir"])
    assert list(times) == ["rank-001", "rank-002"]
    assert all(set(parts) == {"compute", "encode", "send", "wait"} and parts["compute"] > 0 for parts in times.values())


# ---- what they say of the program


@pytest.mark.parametrize(
    ("page", "registry"), [("policies.md", policies), ("compressors.md", compressors)], ids=["policies", "compressors"]
)
def test_every_plug_in_has_its_row_with_its_settings(page: str, registry: Registry[Any]) -> None:
    text = (REPOSITORY / "docs" / "reference" / page).read_text(encoding="utf-8")
    table = next(part for part in text.split("\n\n") if "| settings |" in part)
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*)\|", table, re.MULTILINE))
    expected = {
        name: [f"{key}={written(value)}" for key, value in settings(cls).items()] for name, cls in registry.items()
    }
    assert {name: re.findall(r"`([^`]*)`", cell) for name, cell in rows.items()} == expected


def written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def internals() -> str:
    return (REPOSITORY / "docs" / "explanation" / "internals.md").read_text(encoding="utf-8")


def test_the_stops_of_a_gradient_are_functions_of_those_files() -> None:
    stops = re.findall(r"\(\.\./\.\./(ps_elastic/[\w/]+\.py)\), `(\w+)`", internals())
    assert len(stops) >= 5
    for file, name in stops:
        code = (REPOSITORY / file).read_text(encoding="utf-8")
        assert re.search(rf"def {name}\(", code), f"{file} has no {name}"


def test_the_map_shows_every_room() -> None:
    package = REPOSITORY / "ps_elastic"
    rooms = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    tables = [set(re.findall(r"^\| `(\w+)(?:\.py)?`", part, re.MULTILINE)) for part in internals().split("\n\n")]
    assert rooms - {"__init__", "__main__"} in tables


def test_the_bytes_of_a_header_are_those_stated() -> None:
    from ps_elastic.transport.wire import HEADER_BYTES

    stated = [number for page in PAGES for number in re.findall(r"header\s+of\s+(\d+)\s+bytes", page.text)]
    assert stated and set(stated) == {str(HEADER_BYTES)}
