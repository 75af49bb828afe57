"""Pages with lines that start jobs or take minutes: all is typed in order, and nothing is left running."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Job
from pages import USER_PAGES, Line, Page, prepare

from ps_elastic.cluster import launcher
from ps_elastic.cluster.environment import Mpi

pytestmark = [pytest.mark.mpi, pytest.mark.slow, pytest.mark.timeout(1800)]
LINE_S = 400.0  # the longest that a line may take


@pytest.mark.parametrize("page", [page for page in USER_PAGES if any(line.slow for line in page.lines)], ids=str)
def test_all_lines_of_a_page_run_as_printed(page: Page, start: Callable[..., Job], mpi: Mpi, tmp_path: Path) -> None:
    home = tmp_path / "home"
    prepare(page, home)
    paths = [str(command(tmp_path)), str(Path(sys.executable).parent), os.environ["PATH"]]
    variables = {"PATH": os.pathsep.join(paths), **launcher.mpi_environment(mpi)}
    ran = 0
    for line in page.lines:
        if line.words[0] == "cd":
            home = home / line.words[1]
        elif not line.activates and line.script is None and possible(line):
            ended = start(["bash", "-c", f'cd "{home}" && {line.text}'], **variables).wait(LINE_S)
            assert ended.code == line.code, f"{line}: ended with {ended.code}\n{ended.stdout}\n{ended.stderr}"
            ran += 1
    if ran == 0:
        pytest.skip("this machine lacks what its lines need")


def command(folder: Path) -> Path:
    """A folder with a `ps-elastic` that is the code under test."""
    file = folder / "bin" / "ps-elastic"
    file.parent.mkdir()
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ps_elastic "$@"\n')
    file.chmod(0o755)
    return file.parent


def possible(line: Line) -> bool:
    """Whether this machine has what the line needs besides MPI: a SLURM, or a data set that is fetched otherwise."""
    if line.submits and shutil.which("sbatch") is None:
        return False
    return "fashion_mnist" not in line.text or "PS_ELASTIC_DATA" in os.environ
