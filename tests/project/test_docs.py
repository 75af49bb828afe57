"""What README, docs/ and configs/ show is run here as a reader would: copied out, in a folder of its own."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from ps_elastic import cli
from ps_elastic.analysis.compare.plan import split
from ps_elastic.compressors import compressors
from ps_elastic.config.load import check
from ps_elastic.plugins import Registry, settings
from ps_elastic.policies import policies

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "docs/evidence/README.md"]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def shown_files() -> dict[str, str]:
    """Name -> text of every block that begins with `# file: NAME`."""
    found: dict[str, str] = {}
    for page in PAGES:
        for _, block in FENCE.findall(text_of(page)):
            if match := re.match(r"# file: (\S+)\n", block):
                assert match[1] not in found, f"{match[1]} is shown twice"
                found[match[1]] = block
    return found


class Line(NamedTuple):
    """A command line that a page shows, from `ps-elastic` on."""

    page: str
    arguments: list[str]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.arguments)}"


def shown_lines() -> Iterator[Line]:
    """Every line of a shell block, and every inline code, that has `ps-elastic` in it; comments cut off."""
    for page in PAGES:
        text = text_of(page)
        blocks = [line for language, block in FENCE.findall(text) if language == "sh" for line in block.splitlines()]
        inline = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
        for shown in [*blocks, *inline]:
            words = shlex.split(shown, comments=True)
            if "ps-elastic" in words:
                yield Line(page.name, words[words.index("ps-elastic") + 1 :])
    for config in CONFIGS:
        words = shlex.split(text_of(config).split("\n", 1)[0].removeprefix("#"))
        yield Line(config.name, words[words.index("ps-elastic") + 1 :])


LINES = list(shown_lines())


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with configs/ and every file that the pages show, and nothing else; we are in it."""
    (tmp_path / "configs").mkdir()
    for config in CONFIGS:
        (tmp_path / "configs" / config.name).write_text(text_of(config))
    files = shown_files()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    yield tmp_path
    for name in files:
        sys.modules.pop(Path(name).stem, None)


def parse(arguments: list[str]) -> click.Context | None:
    """What click makes of a command line, nothing run; None where it asks for a help text or only names a command."""
    command: click.Command = cli.group
    context = command.make_context("ps-elastic", list(arguments[:1]))
    rest = arguments
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command = found
        if not rest:
            return None
        context = command.make_context(name, list(rest[:1] if isinstance(command, click.Group) else rest), context)
    return context


@pytest.mark.parametrize("line", LINES, ids=str)
def test_a_command_line_shown_parses_and_its_configuration_is_valid(line: Line, reader: Path) -> None:
    context = parse(line.arguments)
    if context is None or "config" not in context.params:
        return
    given = context.params
    variants = [
        [f"policy={policy}", f"compressor={compressor}"]
        for policy in split("--policies", given.get("policies") or "synchronous")
        for compressor in split("--compressors", given.get("compressors") or "identity")
    ]
    for variant in variants if context.info_name == "compare" else [[]]:
        assert check(given["config"], [*given["overrides"], *variant]) == []


def test_a_line_that_does_not_parse_is_noticed(reader: Path) -> None:
    with pytest.raises(click.UsageError):
        parse(["launch", "--ranks-of-mine", "4", "configs/digits.yaml"])
    with pytest.raises(click.UsageError):
        parse(["lunch"])


def in_process_lines() -> list[Line]:
    return [line for line in LINES if "--in-process" in line.arguments]


@pytest.mark.parametrize("line", in_process_lines(), ids=str)
def test_an_in_process_line_trains(line: Line, reader: Path, capfd: pytest.CaptureFixture[str]) -> None:
    budget = ["train.samples=1500", "train.evaluate_every_samples=1500", "--json"]
    assert cli.main([*line.arguments, *budget]) == 0
    assert '"exit": 0' in capfd.readouterr().out


def test_every_plug_in_shown_is_trained_by_a_line_shown() -> None:
    shown = {
        f"{Path(name).stem}:{match[1]}"
        for name, text in shown_files().items()
        for match in re.finditer(r"^class (\w+)\((?:Policy|Compressor|Task)\):", text, re.MULTILINE)
    }
    assert len(shown) >= 4
    used = " ".join(str(line) for line in LINES) + "".join(t for n, t in shown_files().items() if n.endswith(".yaml"))
    assert {name for name in shown if name not in used} == set()


def test_the_rule_of_the_readme_trains(reader: Path) -> None:
    from ps_elastic import train

    summary = train("configs/digits.yaml", ["policy=damped:Damped:power=1", "train.samples=3000"], workers=3)
    assert summary is not None
    assert summary["exit"] == 0 and summary["used"] >= 3000 / 32


def test_the_python_example_prints_what_it_says(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path("example.py", run_name="__main__")
    assert float(capsys.readouterr().out.split()[0]) > 0.8
    assert len(list(Path("runs").iterdir())) == 1


def test_the_test_shown_passes(reader: Path) -> None:
    module = importlib.import_module("test_groups")
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_the_compressor_shown_keeps_its_bound_and_decodes_what_it_encodes(reader: Path) -> None:
    import torch

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


def test_the_task_shown_learns(reader: Path) -> None:
    from ps_elastic import train

    summary = train("disc.yaml", workers=3)
    assert summary is not None
    assert summary["time_to_target_s"] is not None and summary["samples"] < 100_000


def test_the_header_reader_shown_reads_what_is_written(reader: Path) -> None:
    import numpy as np

    from ps_elastic.transport.messages import PushMessage
    from ps_elastic.transport.wire import HEADER_BYTES, pack

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


def test_the_times_shown_are_those_of_every_worker(reader: Path) -> None:
    from ps_elastic import train

    summary = train("configs/digits.yaml", ["train.samples=1500"], workers=2)
    assert summary is not None
    times = importlib.import_module("where_time_goes").medians_ms(summary["run_dir"])
    assert list(times) == ["rank-001", "rank-002"]
    assert all(set(parts) == {"compute", "encode", "send", "wait"} and parts["compute"] > 0 for parts in times.values())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_a_config_is_valid_and_begins_with_its_command(config: Path) -> None:
    assert check(config) == []
    first = text_of(config).split("\n", 1)[0]
    assert re.fullmatch(rf"# ps-elastic \w+ .*configs/{re.escape(config.name)}\b.*", first)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text_of(target), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], link


@pytest.mark.parametrize(
    ("page", "registry"), [("policies.md", policies), ("compressors.md", compressors)], ids=["policies", "compressors"]
)
def test_every_plug_in_has_its_row_with_its_settings(page: str, registry: Registry[Any]) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*)\|", text_of(REPOSITORY / "docs" / page), re.MULTILINE))
    expected = {
        name: [f"{key}={written(value)}" for key, value in settings(cls).items()] for name, cls in registry.items()
    }
    assert {name: re.findall(r"`([^`]*)`", cell) for name, cell in rows.items()} == expected


def written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def test_the_stops_of_a_gradient_are_functions_of_those_files() -> None:
    stops = re.findall(r"\(\.\./(ps_elastic/[\w/]+\.py)\), `(\w+)`", text_of(REPOSITORY / "docs" / "index.md"))
    assert len(stops) >= 5
    for file, name in stops:
        assert re.search(rf"def {name}\(", text_of(REPOSITORY / file)), f"{file} has no {name}"


def test_the_map_shows_every_room_in_the_order_of_the_table() -> None:
    rooms = re.findall(
        r"^\| `(\w+)(?:\.py)?` \|", text_of(REPOSITORY / "docs" / "index.md").split("## The rooms")[1], re.MULTILINE
    )
    package = REPOSITORY / "ps_elastic"
    there = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(rooms[:16]) == there - {"__init__", "__main__"}


def test_the_bytes_of_a_header_are_those_stated() -> None:
    from ps_elastic.transport.wire import HEADER_BYTES

    stated = [number for page in PAGES for number in re.findall(r"header of (\d+) bytes", text_of(page))]
    assert stated and set(stated) == {str(HEADER_BYTES)}
