"""The folder of one run: how it begins, and what it says of how the run ended.

`python -m ps_elastic.records.run_dir DIR CODE` ends with the exit code of the run in DIR, whose mpirun ended with CODE.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from ps_elastic import errors
from ps_elastic.errors import ConfigError

Given = str | os.PathLike[str] | None  # the folder that the user named, if any
SUMMARY = "summary.json"
INTERRUPT = "interrupt"  # holds the exit code that somebody wants the run to end with
SCRIPT = "job.sbatch"
_LEFT_BY_SUBMIT = (SCRIPT, "slurm-*.out")
_BARE_SIGNALS = (7, 8, 9, 11, 15)  # MPICH's mpiexec ends with the number of the signal that killed a rank
_KEPT = (1, 2, 3, 4, 5, 6, errors.PREEMPTED, errors.INTERRUPTED)


class Outcome(NamedTuple):
    """What a launcher ends with, and what to tell where the run itself did not."""

    exit: int
    message: str | None = None


def run_dir_for(name: str, given: Given) -> Path:
    """The absolute path of the run's folder, `given` or runs/<name>-<utc>; nothing is made."""
    if given is not None:
        return Path(given).absolute()
    stem = Path("runs").absolute() / f"{name}-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    return next(path for path in _numbered(stem) if not path.exists())


def new_run_dir(name: str, given: Given) -> Path:
    """Make the folder of a new run, `given` or runs/<name>-<utc>, and return its path.

    Raises ConfigError if `given` is no folder, is not writable or holds anything but what `submit` left for its job.
    """
    try:
        if given is None:
            return _make_unique(run_dir_for(name, None))
        folder = Path(given)
        folder.mkdir(parents=True, exist_ok=True)
        held = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise _refusal(f"cannot make this folder: {error.strerror}", error.filename or given) from error
    strange = [name for name in held if not any(fnmatch(name, pattern) for pattern in _LEFT_BY_SUBMIT)]
    if strange:
        more = ", ..." if len(strange) > 3 else ""
        raise _refusal(f"this folder is not empty (it holds {', '.join(strange[:3])}{more}): name a new one", folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _refusal("this folder is not writable", folder)
    return folder


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """summary.json of the run, or None if there is none that can be read whole."""
    summary = read_json(run_dir / SUMMARY)
    return summary if isinstance(summary, dict) and isinstance(summary.get("exit"), int) else None


def outcome(run_dir: Path, mpirun_code: int, interrupted: bool = False) -> Outcome:
    """What the run in `run_dir` ended with: its summary's `exit`, else what mpirun's code means.

    mpirun_code: as a shell gives it, or negative for a signal as subprocess does. mpirun ends with 0 though one of
    its daemons was lost, and with 1 when it was signalled, so its word counts only where the run left none.
    """
    summary = read_summary(run_dir)
    if summary is not None:
        return Outcome(summary["exit"])
    if interrupted:
        return Outcome(errors.INTERRUPTED, "interrupted before the run could write its summary")
    code = 128 - mpirun_code if mpirun_code < 0 else mpirun_code
    if code in _KEPT:
        return Outcome(code)
    if code == 0:
        return Outcome(errors.USER_CODE, f"mpirun ended with 0, but the run left no {SUMMARY} in {run_dir}")
    if code > 128 or code in _BARE_SIGNALS:
        return Outcome(errors.LOST, f"a rank was killed by {_signal_name(code % 128)}")
    return Outcome(errors.USER_CODE, f"mpirun ended with {code}, and the run left no {SUMMARY} in {run_dir}")


def read_json(path: Path, **how: Any) -> Any:
    """What is written there; None of no file, and of one cut short by a kill. how: as for json.loads."""
    try:
        return json.loads(path.read_text(), **how)
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def write_json(path: Path, value: Any, indent: int = 2) -> None:
    """Write `value`, as `write_whole` does."""
    write_whole(path, json.dumps(value, indent=indent) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write `text` whole or not at all: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def asked_by(directory: Path) -> str:
    """What asked the run in `directory` to stop, in words."""
    return "Ctrl-C or SIGTERM" if (directory / INTERRUPT).exists() else "SIGUSR1"


def _make_unique(stem: Path) -> Path:
    stem.parent.mkdir(parents=True, exist_ok=True)
    for path in _numbered(stem):
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError("there is always a next number")


def _numbered(stem: Path) -> Iterator[Path]:
    yield stem
    for number in count(2):
        yield stem.with_name(f"{stem.name}-{number}")


def _refusal(message: str, folder: Given) -> ConfigError:
    return ConfigError(message, key="--run-dir", source=str(folder))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


if __name__ == "__main__":
    ending = outcome(Path(sys.argv[1]), int(sys.argv[2]))
    if ending.message:
        print(f"ps-elastic: {ending.message}", file=sys.stderr)
    sys.exit(ending.exit)
