from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from ps_elastic import __version__, cli, errors
from ps_elastic.cli import main

ROOT = Path(__file__).resolve().parents[2]
TASK = """
from __future__ import annotations
from dataclasses import dataclass
from ps_elastic.tasks import Task

@dataclass
class Tiny(Task):
    batch_size: int = 4
    model = batches = loss = evaluate = None
"""
_NAMES = [stand_in.name or "" for stand_in in cli.STAND_INS]
COMMAND_HELPS = [[*line.split(), "--help"] for line in ("config show", "config validate", *_NAMES)]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration in the current folder, whose task is there too and needs no torch."""
    (tmp_path / "tiny_task.py").write_text(TASK)
    (tmp_path / "run.yaml").write_text("task: tiny_task:Tiny\npolicy: stale_synchronous:bound=2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return Path("run.yaml")


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write commands into a folder of their own: commands(name=source)."""
    folder = tmp_path / "some_commands"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)

    def write(**sources: str) -> None:
        for name, body in sources.items():
            text = f"import click\n@click.command()\ndef command():\n    {body}\n"
            (folder / f"{name}.py").write_text(text if body else "raise RuntimeError('imported')\n")
        monkeypatch.setattr(cli, "package", __import__("some_commands"))

    yield write
    for name in [name for name in sys.modules if name.startswith("some_commands")]:
        del sys.modules[name]


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ps_elastic", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, text=True, timeout=60, env=environment, capture_output=True, check=False, **options)


def modules_after(*arguments: str) -> set[str]:
    code = (
        "import sys\nfrom ps_elastic.cli import main\n"
        f"code = main({list(arguments)!r})\nprint(code, *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], text=True, timeout=60, cwd=ROOT, capture_output=True, check=False
    )
    code_text, *modules = done.stderr.split()
    assert code_text == "0", done.stderr
    return set(modules)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["list", "policies"], ["list", "policies", "--json"], *COMMAND_HELPS]
)
def test_looking_around_imports_nothing_heavy(arguments: list[str]) -> None:
    assert not {"torch", "numpy", "mpi4py", "sklearn"} & modules_after(*arguments)


def test_only_the_command_that_is_named_is_imported() -> None:
    modules = modules_after("list", "policies")
    commands = {module for module in modules if module.startswith("ps_elastic.cli.") and "._" not in module}
    assert commands == {"ps_elastic.cli.list"}


def test_help_names_every_command_and_so_does_python_m() -> None:
    done = process("--help")
    assert done.returncode == 0
    for module in (ROOT / "ps_elastic" / "cli").glob("[a-z]*.py"):
        assert f"\n  {module.stem} " in done.stdout
    assert done.stdout.startswith("Usage: ps-elastic ")


def test_help_says_of_each_command_what_the_command_says() -> None:
    context = click.Context(cli.group)
    assert [stand_in.name for stand_in in cli.STAND_INS] == cli.group.list_commands(context)
    for stand_in in cli.STAND_INS:
        command = cli.group.get_command(context, stand_in.name or "")
        assert command is not None and command.help is not None
        if stand_in.short_help is None:
            assert " ".join(command.help.split("\n\n")[0].split()) == stand_in.help


def test_help_imports_no_command() -> None:
    assert {module for module in modules_after("--help") if module.startswith("ps_elastic.cli.")} == set()


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ps-elastic, version {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "unknown command 'lst'; nearest 'list'; known: "),
        (["list", "rules"], "'rules' is not one of 'policies', 'compressors', 'tasks', 'updates', 'benchmarks'"),
        (["list"], "Missing argument 'KIND'"),
        (["list", "policies", "--jso"], "No such option"),
        (["config", "show"], "Missing argument 'CONFIG'"),
    ],
)
def test_a_wrong_command_line_ends_with_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        ("ConfigError('wrong', key='seed', source='run.yaml')", 2),
        ("PlatformError('wrong')", 3),
        ("TaskError('wrong')", 1),
        ("Stalled('wrong')", 4),
        ("WorkersLost('wrong')", 5),
        ("Interrupted('wrong')", 130),
    ],
)
def test_each_error_is_one_message_and_its_exit_code(
    raised: str, code: int, commands: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    commands(fail=f"from ps_elastic import errors; raise errors.{raised}")
    assert main(["fail"]) == code
    assert capsys.readouterr() == ("", f"ps-elastic: {'run.yaml: seed: ' if code == 2 else ''}wrong\n")


def test_a_command_returns_its_exit_code_or_nothing(commands: Any) -> None:
    commands(
        six="return 6",
        none="return None",
        leaves="import sys; sys.exit(75)",
        context="click.get_current_context().exit(4)",
    )
    assert main(["six"]) == 6
    assert main(["none"]) == errors.OK
    assert main(["context"]) == 4
    with pytest.raises(SystemExit) as caught:
        main(["leaves"])
    assert caught.value.code == 75


def test_ctrl_c_ends_with_exit_130(commands: Any, capsys: pytest.CaptureFixture[str]) -> None:
    commands(wait="raise KeyboardInterrupt")
    assert main(["wait"]) == 130
    assert capsys.readouterr().err.strip() == "ps-elastic: interrupted"


@pytest.mark.parametrize("error", ["EOFError", "ZeroDivisionError", "OSError"])
def test_an_error_of_ours_looks_like_one(error: str, commands: Any) -> None:
    commands(broken=f"raise {error}('a bug')")
    with pytest.raises(getattr(__import__("builtins"), error), match="a bug"):
        main(["broken"])


def test_a_command_that_cannot_be_imported_hinders_no_other(commands: Any) -> None:
    commands(broken="", six="return 6")
    assert main(["six"]) == 6
    with pytest.raises(RuntimeError, match="imported"):
        main(["broken"])


@pytest.mark.parametrize("arguments", [["list", "policies"], ["list", "policies", "--json"]])
def test_a_reader_that_goes_away_is_no_traceback(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ps_elastic", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, timeout=60, check=False)
    os.close(writer)
    assert done.stderr == b""


def test_list_gives_names_summaries_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "policies", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    bounded = next(row for row in rows if row["name"] == "stale_synchronous")
    assert bounded["settings"] == {"bound": 4}
    assert bounded["required"] == []
    assert bounded["meanings"]["bound"].startswith("worker steps ahead of the slowest")
    assert bounded["summary"].startswith("Use every gradient at once")


def test_list_prints_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "policies", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert main(["list", "policies"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["name", "settings", "summary"]
    assert [line.split()[0] for line in lines] == [row["name"] for row in rows]
    assert "bound=4" in next(line for line in lines if line.startswith("stale_synchronous"))
    assert all(row["summary"] in line for row, line in zip(rows, lines, strict=True))


def test_a_setting_without_a_default_is_listed_as_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dataclasses

    from ps_elastic import policies as package

    rule = dataclasses.make_dataclass("Rule", [("bound", int), ("size", tuple, (1, 2))])
    rule.__doc__ = "A rule.\n\nMore."
    monkeypatch.setattr(package.policies, "items", lambda: iter([("mine", rule)]))
    assert main(["list", "policies", "--json"]) == 0
    row = {"name": "mine", "summary": "A rule.", "settings": {"bound": None, "size": [1, 2]}, "required": ["bound"]}
    row["meanings"] = {}
    assert json.loads(capsys.readouterr().out) == [row]
    assert main(["list", "policies"]) == 0
    assert "bound (required) size=[1, 2]" in capsys.readouterr().out


def test_a_kind_of_which_there_is_none_is_an_empty_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ps_elastic.cli import list as listing

    monkeypatch.setitem(listing._PACKAGES, "benchmarks", "ps_elastic.no_such_package")
    assert main(["list", "benchmarks", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["list", "benchmarks"]) == 0
    assert capsys.readouterr().out == "no benchmarks\n"


def test_config_show_prints_what_loads_to_the_same(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ps_elastic.config.load import load

    expected = load(config, ["seed=3"])
    assert main(["config", "show", str(config), "seed=3"]) == 0
    shown = capsys.readouterr().out
    Path("again.yaml").write_text(shown)
    assert load("again.yaml") == expected
    assert main(["config", "show", str(config), "seed=3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected.to_dict()


def test_config_show_of_a_wrong_file_ends_with_exit_2(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", str(config), "policy.bond=3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ps-elastic: command line: policy.bond: unknown key of policy stale_synchronous")
    assert main(["config", "show", "no.yaml"]) == 2
    assert capsys.readouterr().err == "ps-elastic: no.yaml: cannot read it: No such file or directory\n"


def test_config_validate_names_every_problem(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "validate", str(config), "seed=-1", "polcy=x", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["valid"] is False
    assert {error["key"]: error["source"] for error in document["errors"]} == dict.fromkeys(
        ("seed", "polcy"), "command line"
    )
    assert next(error["message"] for error in document["errors"] if error["key"] == "seed").startswith(
        "got -1, expected"
    )
    assert main(["config", "validate", str(config), "seed=-1", "polcy=x"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_config_validate_of_a_good_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "validate", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"valid": True, "errors": [], "notes": []}
    assert main(["config", "validate", str(config)]) == 0
    assert capsys.readouterr().out == "run.yaml: valid\n"


def test_a_gpu_that_this_machine_lacks_is_said_and_no_error(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["config", "validate", str(config), "device=cuda"]) == 0
    said = capsys.readouterr()
    assert said.out == "run.yaml: valid\n" and "device: cuda, but torch finds no GPU on this machine" in said.err
    assert main(["config", "validate", str(config), "device=cuda", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["notes"]) == 1


@pytest.mark.parametrize(
    "command", [["launch", "-n", "2"], ["submit", *["--nodes", "1", "--tasks-per-node", "2", "--time", "9"]]]
)
def test_a_task_whose_module_the_job_would_not_find_is_refused_before_it(
    command: list[str], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry = ["--dry-run"] if command[0] == "submit" else []
    assert main([command[0], str(config), *command[1:], "task=nowhere_at_all:Task", *dry]) == 2
    assert "task.name: no module 'nowhere_at_all' for task 'nowhere_at_all:Task' in " in capsys.readouterr().err
    assert not Path("runs").exists()


def test_every_command_is_a_click_command_with_a_first_line_of_help() -> None:
    context = click.Context(cli.group)
    for name in cli.group.list_commands(context):
        command = cli.group.get_command(context, name)
        assert isinstance(command, click.Command)
        assert command.get_short_help_str()
