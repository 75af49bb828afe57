"""Somebody who reads a page and types what stands there."""

from __future__ import annotations

import importlib
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import REPOSITORY, Line, Page, prepare

from ps_elastic import cli


class Reader:
    """Somebody in a folder with configs/ and the files of one page, and nothing else."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, monkeypatch
        self._modules: set[str] = set()

    def opens(self, page: Page) -> Path:
        home = self.folder / "home"
        if home.exists():
            shutil.rmtree(home)
        prepare(page, home)
        self._patch.chdir(home)
        self._patch.setattr(sys, "path", [str(home), *sys.path])
        self.forget()
        self._modules = {Path(name).stem for name in page.files if name.endswith(".py")}
        importlib.invalidate_caches()
        return home

    def forget(self) -> None:
        for name in self._modules:
            sys.modules.pop(name, None)

    def types(self, line: Line) -> int:
        """What the line ends with; ps-elastic and Python files run in this process, which spares the start of torch."""
        if line.plain and line.words[0] == "ps-elastic":
            return cli.main(line.words[1:])
        if line.plain and line.words[0] in ("python", "python3") and line.words[1].endswith(".py"):
            return self._python(line.words[1:])
        run = subprocess.run(["bash", "-c", line.text], env=self._environment(), timeout=120, stdin=subprocess.DEVNULL)
        return run.returncode

    def _python(self, arguments: list[str]) -> int:
        with self._patch.context() as patch:
            patch.setattr(sys, "argv", arguments)
            try:
                runpy.run_path(arguments[0], run_name="__main__")
            except SystemExit as ended:
                return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        return 0

    def _environment(self) -> dict[str, str]:
        command = self.folder / "bin" / "ps-elastic"
        if not command.exists():
            command.parent.mkdir()
            command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ps_elastic "$@"\n')
            command.chmod(0o755)
        paths = [str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
        return {**os.environ, "PATH": os.pathsep.join(paths), "PYTHONPATH": str(REPOSITORY)}
