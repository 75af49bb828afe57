"""A comparison: the same training under each policy x compressor x seed, one run after another, and one table of it.

A comparison is a folder: `cells/POLICY/COMPRESSOR/seed-K/` is the run directory of one cell, and `comparison.json` is
written anew after every cell. So it can be interrupted at any moment and taken up again with the same command.
"""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ps_elastic.analysis.compare.plan import Cell, Comparison, Resolve, digest
from ps_elastic.analysis.compare.statistics import flat, recommend, rows
from ps_elastic.errors import INTERRUPTED, OK, USER_CODE, ConfigError, Interrupted
from ps_elastic.records.run_dir import read_json, write_json, write_whole

OURS = "ps-elastic: "  # begins every message of ours on stderr


@dataclass
class Session:
    """A comparison at work in its folder `out`; `run` is `launcher.run_job`, and `entries` is what is known so far."""

    comparison: Comparison
    out: Path
    resolve: Resolve
    run: Callable[..., int]
    versions: dict[str, str | None]
    entries: dict[Cell, dict[str, Any]] = field(default_factory=dict)

    def open(self) -> None:
        """Take up what an earlier session finished. Raises ConfigError if `out` holds anything else."""
        path = self.out / "comparison.json"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._take_up(_read(path))
            elif any(self.out.iterdir()):
                raise ConfigError("this folder is not empty and holds no comparison.json", source=str(self.out))
            self.write()
        except OSError as error:
            raise ConfigError(f"cannot write there: {error}", source=str(self.out)) from error

    def _take_up(self, earlier: Any) -> None:
        if not isinstance(earlier, dict):
            raise ConfigError("comparison.json is not a JSON document", source=str(self.out))
        if differences := list(_differences(earlier, self.comparison.identity())):
            text = "; ".join(differences[:4]) + ("; ..." if len(differences) > 4 else "")
            raise ConfigError(f"this folder holds another comparison: {text}", source=str(self.out))
        known = {entry["run_dir"]: entry for entry in earlier["cells"]}
        for cell in self.comparison.cells:
            entry = known.get(cell.folder)
            if entry and self._is_finished(cell, entry):
                self.entries[cell] = entry

    def _is_finished(self, cell: Cell, entry: dict[str, Any]) -> bool:
        summary = _read(self.out / cell.folder / "summary.json") or {}
        return entry["status"] == "done" and entry["digest"] == cell.digest and summary.get("exit") == OK

    def execute(self, cell: Cell) -> dict[str, Any]:
        """Run one cell in a clean folder, note how it went, and return its entry of the document.

        What an earlier session left there is moved aside, not lost. An interruption is an entry with exit 130.
        """
        if digest(self.resolve(cell.overrides)) != cell.digest:
            raise ConfigError("the configuration changed while its comparison runs", source=self.comparison.config_file)
        folder = self.out / cell.folder
        _move_aside(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        try:
            with open(_log_beside(folder), "wb") as log:
                ranks = self.comparison.workers + 1
                code = self.run(self.comparison.config_file, ranks, cell.overrides, folder, stdout=log, stderr=log)
        except (KeyboardInterrupt, Interrupted) as error:
            code = getattr(error, "exit_code", INTERRUPTED)
        finally:
            _take_in_log(folder)
        self.entries[cell] = self._entry(cell, code, time.monotonic() - started)
        self.write()
        return self.entries[cell]

    def _entry(self, cell: Cell, code: int, elapsed_s: float) -> dict[str, Any]:
        summary = _read(self.out / cell.folder / "summary.json")
        if code == OK:  # a launcher may end with 0 though its run did not
            code = USER_CODE if summary is None else summary.get("exit", USER_CODE)
        return {
            "policy": cell.policy,
            "compressor": cell.compressor,
            "seed": cell.seed,
            "run_dir": cell.folder,
            "status": "done" if code == OK else "failed",
            "exit": code,
            "log": f"{cell.folder}/output.log",
            "elapsed_s": elapsed_s,
            "digest": cell.digest,
            "summary": summary,
        }

    def document(self) -> dict[str, Any]:
        """comparison.json: the cells run so far, their rows, and what to take."""
        asked = self.comparison
        cells = [self.entries[cell] for cell in asked.cells if cell in self.entries]
        baseline = {"policy": asked.policies[0], "compressor": asked.compressors[0]}
        of = asked.discrepancy_of
        table = [{**row, "discrepancy_of": of[row["policy"]]} for row in rows(cells, baseline)]
        return {
            **asked.identity(),
            "config_file": asked.config_file,
            "versions": self.versions,
            "baseline": baseline,
            "cells": cells,
            "rows": table,
            "recommendation": recommend(table, len(asked.policies) * len(asked.compressors), asked.seeds),
        }

    def write(self) -> None:
        """Write comparison.json and comparison.csv, each at once or not at all."""
        document = self.document()
        write_json(self.out / "comparison.json", document, indent=1)
        table = io.StringIO()
        lines = [flat(row) for row in document["rows"]]
        if lines:
            writer = csv.DictWriter(table, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
        write_whole(self.out / "comparison.csv", table.getvalue())


def reason(entry: dict[str, Any], out: Path) -> str:
    """Why a cell failed, in one line: its summary's error, else its log's last message of ours, else its last words.

    A traceback is told by the exception at its end; what mpirun has to say of a failed rank comes last and is noise.
    """
    if error := (entry["summary"] or {}).get("error"):
        return _gist(str(error).splitlines())
    log = out / entry["log"]
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    for index in reversed(range(len(lines))):
        if lines[index].startswith(OURS):
            return _gist([lines[index].removeprefix(OURS), *lines[index + 1 :]])
    return next((line.strip() for line in reversed(lines) if any(map(str.isalnum, line))), "")


def _gist(lines: list[str]) -> str:
    who, traceback, _ = lines[0].partition("Traceback (most recent call last):")
    if not traceback:
        return lines[0]
    return who + next((line for line in lines[1:] if line and not line[0].isspace()), traceback)


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in here:
        name, old, new = f"{prefix}{key}", there.get(key), here[key]
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new | {gone: None for gone in old if gone not in new}, f"{name}.")
        elif old != new:
            yield f"{name}: {json.dumps(old)} there, {json.dumps(new)} here"


def _log_beside(folder: Path) -> Path:
    # A run refuses a folder with anything in it, so its output waits beside it until it ends.
    return folder.with_name(folder.name + ".log")


def _take_in_log(folder: Path) -> None:
    if _log_beside(folder).exists():
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(_log_beside(folder), folder / "output.log")


def _move_aside(folder: Path) -> None:
    _take_in_log(folder)
    if folder.exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.aside-{number}")).exists():
            number += 1
        folder.rename(aside)


def _read(path: Path) -> Any:
    return read_json(path, parse_constant=lambda _: None)  # NaN and Infinity, which JSON does not know, are null
