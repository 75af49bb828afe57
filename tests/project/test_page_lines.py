"""The lines that README, docs/ and configs/ show are typed here as a reader would, in a folder of the page's own.

Those that start jobs or take minutes are typed in test_pages_run.py, in the slow tests; here they must parse at least.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import click
import pytest
from pages import CONFIGS, PAGES, REPOSITORY, USER_PAGES, Line, Page
from reading import Reader

from ps_elastic import cli
from ps_elastic.analysis.compare.plan import split
from ps_elastic.cluster import environment
from ps_elastic.config.load import check, load
from ps_elastic.errors import ConfigError, PlatformError


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    one = Reader(tmp_path, monkeypatch)
    yield one
    one.forget()


# ---- the lines to type


def follow(page: Page, reader: Reader) -> int:
    """Type the quick lines of a page in order, save those that need what a slow one makes; return how many ran."""
    home = reader.opens(page)
    missing: set[str] = set()
    ran = 0
    for line in page.lines:
        if line.activates:
            continue
        if line.script is not None:
            assert os.access(line.script, os.X_OK), f"{line}: there is no such script"
        elif line.words[0] == "cd":
            os.chdir(line.words[1])
        elif line.slow or needs(line, missing, home) or not possible(line):
            missing |= line.makes
        else:
            ended = reader.types(line)
            assert ended == line.code, f"{line}: ended with {ended}"
            ran += 1
    return ran


def needs(line: Line, missing: set[str], home: Path) -> bool:
    """Whether the line, or a file of the page that it runs, names one of these folders."""
    files = [home / word for word in line.words if word.endswith(".py") and (home / word).is_file()]
    return any(folder in text for folder in missing for text in [line.text, *(file.read_text() for file in files)])


def possible(line: Line) -> bool:
    """A batch script names the mpirun of this machine, which may have none."""
    if "submit" in line.words:
        try:
            environment.find_mpi()
        except PlatformError:
            return False
    return True


@pytest.mark.parametrize("page", [page for page in USER_PAGES if page.lines], ids=str)
def test_the_quick_lines_of_a_page_run_as_printed(page: Page, reader: Reader) -> None:
    if follow(page, reader) == 0:
        pytest.skip("none of its lines is quick, or all need what slow ones make")


@pytest.mark.parametrize("page", [page for page in USER_PAGES if any(line.quick for line in page.lines)], ids=str)
def test_a_page_with_lines_says_from_where_to_type_them(page: Page) -> None:
    assert re.search(r"\bfolder\s+of\s+(the|your)\s+clone\b|\bempty\s+folder\b|\bfresh\s+clone\b", page.text)


IN_PROCESS = [(page, line) for page in PAGES for line in page.inline if {"--in-process", "--workers"} <= {*line.words}]


@pytest.mark.parametrize(("page", "line"), IN_PROCESS, ids=str)
def test_a_line_in_the_text_that_trains_in_this_process_does(page: Page, line: Line, reader: Reader) -> None:
    reader.opens(page)
    assert line.arguments is not None
    budget = ["train.samples=1500", "train.evaluate_every_samples=1500"]
    assert cli.main([*line.arguments, *budget]) == 0


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("ps-elastic config validate nothing.yaml", "ended with 2"),
        ("ps-elastic config validate configs/digits.yaml  # exit 2", "ended with 0"),
        ("launch/nothing", "no such script"),
        ("python a.py\nfalse", "false: ended with 1"),
        ("python a.py > out.txt && grep -q that out.txt", "ended with 1"),
        ("python a.py 7  # exit 7\npython a.py 6", "a.py 6: ended with 6"),
        ("for code in 0 1; do\n  python a.py $code\ndone\nls", "done: ended with 1"),
        (
            "for code in 0; do python a.py $code; done\ncat <<END > b.txt\nfor\nEND\ngrep -q which b.txt",
            "b.txt: ended with 1",
        ),
    ],
)
def test_a_line_that_does_not_end_as_said_is_noticed(tmp_path: Path, reader: Reader, lines: str, says: str) -> None:
    program = (
        "```python\n# file: a.py\nimport sys\n\nprint('this')\nsys.exit(int(sys.argv[-1]) if sys.argv[1:] else 0)\n```"
    )
    page = made(tmp_path, f"{program}\n\n```sh\n{lines}\n```\n")
    with pytest.raises(AssertionError, match=says):
        follow(page, reader)


def test_a_line_after_a_slow_one_that_made_its_folder_is_left_to_the_slow_tests(tmp_path: Path, reader: Reader) -> None:
    page = made(
        tmp_path,
        "```python\n# file: a.py\nopen('runs/x/summary.json')\n```\n\n```sh\nsource .venv/bin/activate\n"
        "ps-elastic launch -n 4 configs/digits.yaml --run-dir runs/x\nls runs/x\npython a.py\nmkdir sub\ncd sub\n"
        "ls ../configs/digits.yaml\n```\n",
    )
    assert follow(page, reader) == 2
    assert [line.slow for line in page.lines] == [False, True, *[False] * 5]


def made(folder: Path, text: str) -> Page:
    """A page that was made up; pages know their place in the repository, so it pretends to one."""
    (folder / "page.md").write_text(text)
    page = Page(REPOSITORY / "docs" / "page.md")
    page.__dict__["text"] = text
    return page


@pytest.mark.parametrize(
    ("text", "arguments", "plain"),
    [
        ("ps-elastic list policies", ["list", "policies"], True),
        ("ps-elastic list 'a | b' > out.txt", ["list", "a | b"], False),
        ("ps-elastic list tasks 2>&1 | head -3", ["list", "tasks"], False),
        ("A=1 mpirun -n 4 ps-elastic train a.yaml && ls", ["train", "a.yaml"], False),
        ("ps-elastic list tasks  # all of them", ["list", "tasks"], True),
        ("ls 'a b'", None, True),
    ],
)
def test_a_line_is_read_as_the_shell_reads_it(text: str, arguments: list[str] | None, plain: bool) -> None:
    line = Line("page", 1, text)
    assert (line.arguments, line.plain) == (arguments, plain)


@pytest.mark.parametrize(
    ("text", "slow"),
    [
        ("ps-elastic launch -n 4 a.yaml", True),
        ("ps-elastic launch --help", False),
        ("mpirun -n 4 ps-elastic train a.yaml", True),
        ("ps-elastic submit a.yaml --nodes 2", True),
        ("ps-elastic submit a.yaml --nodes 2 --dry-run", False),
        ("ps-elastic simulate a.yaml --workers 4096", True),
        ("ps-elastic simulate a.yaml --workers 8", False),
        ("ps-elastic verify", True),
        ("ps-elastic replay runs/a --recompute", False),
        ("sbatch job.sh", True),
    ],
)
def test_lines_that_start_jobs_or_take_minutes_are_slow(text: str, slow: bool) -> None:
    assert Line("page", 1, text).slow == slow


# ---- what stands on them is right


def parse(arguments: list[str]) -> click.Context | None:
    """What click makes of a command line, nothing run; None where it asks for a help text or only names a command."""
    command: click.Command = cli.group
    if arguments[:1] == ["--version"]:
        return None
    context = command.make_context("ps-elastic", list(arguments[:1]))
    rest = arguments
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command = found
        if not rest or {"-h", "--help"} & set(rest):
            return None
        context = command.make_context(name, list(rest[:1] if isinstance(command, click.Group) else rest), context)
    return context


def faults(line: Line, *, whole: bool, made: Collection[str] = ()) -> list[str]:
    """What is wrong with a line of ps-elastic: it does not parse, or its configuration is not valid.

    whole: the line can be typed as it stands; else it may leave something out, or name a file that is not there.
    made: what other lines make, for which this one may ask.
    """
    assert line.arguments is not None
    if any("$" in word for word in line.arguments):
        return []  # it is known when the line runs
    try:
        context = parse(line.arguments)
    except click.MissingParameter as error:
        return [str(error)] if whole else []
    except click.UsageError as error:
        return [error.format_message()]
    if context is None or "config" not in context.params:
        return []
    given = context.params
    config = given["config"]
    absent = not Path(config).exists()
    if absent and (any(config.startswith(one) for one in made) or not (whole or config.startswith("configs/"))):
        return []
    variants = [
        [f"policy={policy}", f"compressor={compressor}"]
        for policy in split("--policies", given.get("policies") or "synchronous")
        for compressor in split("--compressors", given.get("compressors") or "identity")
    ]
    chosen = variants if context.info_name == "compare" else [[]]
    accepts = accepted_in_simulation if context.info_name == "simulate" else check
    return [str(fault) for own in chosen for fault in accepts(config, [*given["overrides"], *own])]


def accepted_in_simulation(config: str, overrides: list[str]) -> list[ConfigError]:
    try:
        load(config, overrides, simulated=True)
    except ConfigError as error:
        return [error]
    return []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_command_lines_of_a_page_parse_and_their_configurations_are_valid(page: Page, reader: Reader) -> None:
    reader.opens(page)
    found = {}
    makes = {one for line in [*page.lines, *page.console] for one in line.makes}
    for lines, whole in ((page.lines, True), (page.console, False), (page.inline, False)):
        for line in lines:
            if line.arguments is not None and line.code == 0:
                found[str(line)] = faults(line, whole=whole, made=makes)
    assert {line: wrong for line, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    ("text", "whole", "wrong"),
    [
        ("ps-elastic launch --ranks-of-mine 4 configs/digits.yaml", False, True),
        ("ps-elastic lunch", False, True),
        ("ps-elastic launch -n 4", True, True),
        ("ps-elastic launch -n 4", False, False),
        ("ps-elastic launch -n 4 configs/digit.yaml", False, True),
        ("ps-elastic launch -n 4 mine.yaml", False, False),
        ("ps-elastic launch -n 4 configs/digits.yaml optimiser.lr=1", False, True),
        ("ps-elastic compare configs/digits.yaml --policies synchronous,synchron", True, True),
    ],
)
def test_a_line_that_is_wrong_is_noticed(tmp_path: Path, reader: Reader, text: str, whole: bool, wrong: bool) -> None:
    reader.opens(made(tmp_path, ""))
    assert bool(faults(Line("page", 1, text), whole=whole)) == wrong


def test_a_configuration_that_an_earlier_line_makes_is_not_missing(tmp_path: Path, reader: Reader) -> None:
    reader.opens(made(tmp_path, ""))
    first, second = Line("page", 1, "ps-elastic list tasks --out runs/a"), "ps-elastic train runs/a/config.yaml"
    assert faults(Line("page", 2, second), whole=True) != []
    assert faults(Line("page", 2, second), whole=True, made=first.makes) == []
    assert Line("page", 3, "ps-elastic config show a.yaml > b.yaml").makes == {"b.yaml"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_a_config_is_valid_and_begins_with_its_command(config: Path, tmp_path: Path, reader: Reader) -> None:
    assert check(config) == []
    first = config.read_text(encoding="utf-8").split("\n", 1)[0]
    assert re.fullmatch(rf"# ps-elastic \w+ .*configs/{re.escape(config.name)}\b.*", first)
    reader.opens(made(tmp_path, ""))
    assert faults(Line(config.name, 1, first.removeprefix("# ")), whole=True) == []
