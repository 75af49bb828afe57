"""The quick tests again and again, several copies at once: a test that fails now and then, or in company, shows here.

PS_ELASTIC_ROUNDS: how often, 20 by default. PS_ELASTIC_TOGETHER: how many at once, twice as many as cores by default.
PS_ELASTIC_TESTS: which, as pytest's arguments, all quick ones by default.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

from _page import REPOSITORY, Claim, Evidence, publish

from ps_elastic.cluster.environment import find_mpi, usable_cores
from ps_elastic.records.writer import environment, write_json

NAME, TITLE = "steady", "The quick tests, again and again on cores that are taken"
OUT = REPOSITORY / "runs" / "evidence" / NAME
ROUNDS = int(os.environ.get("PS_ELASTIC_ROUNDS", 20))
TOGETHER = int(os.environ.get("PS_ELASTIC_TOGETHER", 2 * usable_cores()))
ALL = ["tests"]
TESTS = shlex.split(os.environ.get("PS_ELASTIC_TESTS", shlex.join(ALL)))
LIMIT_S = 3600.0  # of a round
POLL_S = 1.0
_BUSY = "while True: pass"


class Round:
    """The tests once, in a process that writes nowhere where another round reads; at its end a file tells of it."""

    def __init__(self, path: Path) -> None:
        self.path, self._report, self._started = path, path.with_suffix(".xml"), time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._report.unlink(missing_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix="ps-elastic-steady-", ignore_cleanup_errors=True)
        folder = Path(self._folder.name)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider",
                   f"--junitxml={self._report}", f"--basetemp={folder / 'pytest'}", *TESTS]  # fmt: skip
        own = {"TMPDIR": str(folder), "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis")}
        with path.with_suffix(".log").open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=REPOSITORY, env={**os.environ, **own}, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def ended(self) -> bool:
        """Whether it has ended, and its file is written. Ends everything if there is nothing to count."""
        code, took = self._process.poll(), time.monotonic() - self._started
        if code is None and took < LIMIT_S:
            return False
        if code not in (0, 1):  # neither passed nor failed
            how = f"took more than {LIMIT_S:.0f} s" if code is None else f"ended with {code} after {took:.0f} s"
            raise SystemExit(f"pytest {how}; it said: {self.path.with_suffix('.log')}")
        day = f"{datetime.now(timezone.utc):%Y-%m-%d}"
        asked = {"arguments": TESTS, "together": TOGETHER}
        write_json(self.path, {**asked, "date": day, "seconds": took, **counts(self._report)})
        return True

    def interrupt(self) -> None:
        """Ask it to end: pytest then ends the jobs of its tests."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def close(self) -> None:
        """Leave no process and no temporary file of it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def main() -> int:
    """Make the rounds that are not made, and write the page; 0, or 6 if a test failed in any round."""
    paths = [OUT / f"{number:03d}.json" for number in range(1, ROUNDS + 1)]
    make([path for path in paths if not is_made(path)])
    return publish(page([json.loads(path.read_text()) for path in paths]))


def is_made(path: Path) -> bool:
    """Whether this round was made, of these tests and in this company."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return (found.get("arguments"), found.get("together")) == (TESTS, TOGETHER)


def make(missing: list[Path]) -> None:
    """Make these rounds: TOGETHER processes at any time, of which those compute that find no round left to make."""
    waiting, running = list(missing), list[Round]()
    with contextlib.ExitStack() as company:
        try:
            while waiting or running:
                while waiting and len(running) < TOGETHER:
                    running.append(Round(waiting.pop(0)))
                for each in [each for each in running if each.ended()]:
                    running.remove(each)
                    each.close()
                    print(f"{each.path.stem} of {ROUNDS}: {text(each.path)}", file=sys.stderr, flush=True)
                    if not waiting:
                        company.enter_context(busy())
                time.sleep(POLL_S)
        finally:
            for each in running:
                each.interrupt()
            for each in running:
                each.close()


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Inside, a process computes all the time."""
    with subprocess.Popen([sys.executable, "-c", _BUSY]) as other:
        try:
            yield
        finally:
            other.kill()


def counts(report: Path) -> dict[str, Any]:
    """How many tests there were and were skipped, and what pytest said of each that failed, by its name."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    failed: dict[str, str] = {}
    for case in suite.iter("testcase"):
        for wrong in (*case.iter("failure"), *case.iter("error")):
            name = f"{case.get('classname')}::{case.get('name')}"
            failed[name] = failed.get(name, "") + (wrong.text or wrong.get("message", ""))
    return {**{key: int(suite.get(key, 0)) for key in ("tests", "skipped")}, "failed": failed}


def page(rounds: list[dict[str, Any]]) -> Evidence:
    names = sorted({name for each in rounds for name in each["failed"]})
    here = environment()
    where = {key: here[key] for key in ("versions", "platform", "processor", "cores")}
    where |= {"date": max(each["date"] for each in rounds), "mpi": str(find_mpi())}
    table = [["tests", "skipped", "rounds", "at once", "failures", "median seconds", "longest"]]
    took = [each["seconds"] for each in rounds]
    failures = sum(len(each["failed"]) for each in rounds)
    table.append(
        [f"{rounds[-1]['tests']:,}", str(rounds[-1]["skipped"]), str(len(rounds)), str(TOGETHER), str(failures),
         f"{median(took):.0f}", f"{max(took):.0f}"]
    )  # fmt: skip
    notes = [
        f"{TOGETHER} copies of the tests ran at once on {usable_cores()} cores, each being the load of the others;",
        "when no round was left to begin, a process that only computes took the place of one that had ended.",
        *(f"`{name}` failed in {sum(name in each['failed'] for each in rounds)} rounds." for name in names),
    ]
    claims = [Claim(f"no test failed in {len(rounds)} rounds under load", not names)]
    asked = f"PS_ELASTIC_ROUNDS={ROUNDS} PS_ELASTIC_TOGETHER={TOGETHER}" + (
        f" PS_ELASTIC_TESTS={shlex.quote(shlex.join(TESTS))}" if TESTS != ALL else ""
    )
    command = f"{asked} launch/evidence {NAME}"
    return Evidence(NAME, TITLE, command, where, table, claims, {"rounds": rounds}, notes)


def text(path: Path) -> str:
    found = json.loads(path.read_text())
    failed = ", ".join(found["failed"]) or "none"
    return f"{found['tests']} tests in {found['seconds']:.0f} s, failed: {failed}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else it would leave the rounds running
    sys.exit(main())
