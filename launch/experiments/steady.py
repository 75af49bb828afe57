"""The quick tests again and again, beside processes that take every core: a test that fails now and then shows here.

PS_ELASTIC_ROUNDS: how often, 20 by default. PS_ELASTIC_TESTS: which, as pytest's arguments, all quick ones by default.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

from _page import REPOSITORY, Claim, Evidence, publish

from ps_elastic.environment import find_mpi, usable_cores
from ps_elastic.record import environment, write_json

NAME, TITLE = "steady", "The quick tests, again and again on cores that are taken"
OUT = REPOSITORY / "runs" / "evidence" / NAME
ROUNDS = int(os.environ.get("PS_ELASTIC_ROUNDS", 20))
ALL = ["tests"]
TESTS = shlex.split(os.environ.get("PS_ELASTIC_TESTS", shlex.join(ALL)))
LIMIT_S = 3600.0  # of a round
_BUSY = "while True: pass"


def main() -> int:
    """Run the rounds that are not finished, and write the page; 0, or 6 if a test failed in any round."""
    rounds = []
    for number in range(1, ROUNDS + 1):
        path = OUT / f"{number:03d}.json"
        if not path.exists() or json.loads(path.read_text())["arguments"] != TESTS:
            write_json(path, one_round(path.with_suffix(".xml")))
        rounds.append(json.loads(path.read_text()))
        print(f"round {number} of {ROUNDS}: {text(rounds[-1])}", file=sys.stderr, flush=True)
    return publish(page(rounds))


def one_round(report: Path) -> dict[str, Any]:
    """Run the tests once, beside a busy process for each core; what happened, by pytest's own report."""
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", f"--junitxml={report}", *TESTS]
    started = time.monotonic()
    with busy(usable_cores()):
        code = subprocess.run(command, cwd=REPOSITORY, stdout=sys.stderr, timeout=LIMIT_S, check=False).returncode
    took = time.monotonic() - started
    if code not in (0, 1):  # neither passed nor failed: there is nothing to count
        raise SystemExit(f"pytest ended with {code} after {took:.0f} s")
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "skipped")}
    day = f"{datetime.now(timezone.utc):%Y-%m-%d}"
    return {"arguments": TESTS, "date": day, "seconds": took, **counts, "failed": failed}


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Inside, so many processes compute all the time."""
    others = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def page(rounds: list[dict[str, Any]]) -> Evidence:
    names = sorted({name for each in rounds for name in each["failed"]})
    here = environment()
    where = {key: here[key] for key in ("versions", "platform", "processor", "cores")}
    where |= {"date": max(each["date"] for each in rounds), "mpi": str(find_mpi())}
    table = [["tests", "skipped", "rounds", "failures", "median seconds", "longest"]]
    took = [each["seconds"] for each in rounds]
    failures = sum(len(each["failed"]) for each in rounds)
    table.append(
        [f"{rounds[-1]['tests']:,}", str(rounds[-1]["skipped"]), str(len(rounds)), str(failures),
         f"{median(took):.0f}", f"{max(took):.0f}"]
    )  # fmt: skip
    notes = [
        f"Beside the tests {usable_cores()} processes computed all the time, one for each core.",
        *(f"`{name}` failed in {sum(name in each['failed'] for each in rounds)} rounds." for name in names),
    ]
    claims = [Claim(f"no test failed in {len(rounds)} rounds under load", not names)]
    asked = f"PS_ELASTIC_ROUNDS={ROUNDS}" + (
        f" PS_ELASTIC_TESTS={shlex.quote(shlex.join(TESTS))}" if TESTS != ALL else ""
    )
    command = f"{asked} launch/evidence {NAME}"
    return Evidence(NAME, TITLE, command, where, table, claims, {"rounds": rounds}, notes)


def text(found: dict[str, Any]) -> str:
    failed = ", ".join(found["failed"]) or "none"
    return f"{found['tests']} tests in {found['seconds']:.0f} s, failed: {failed}"


if __name__ == "__main__":
    sys.exit(main())
