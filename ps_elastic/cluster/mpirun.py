"""One mpirun as our child: it hears of Ctrl-C from us alone, and nothing of it remains when we return.

mpirun answers SIGINT and SIGTERM by ending its ranks at once, and then ends with 1 whatever they had to say. So a
wish to stop travels as a message of its own: a file in the run folder, then SIGUSR1, which every mpirun passes on.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import psutil

from ps_elastic.cluster import leftovers
from ps_elastic.cluster.leftovers import mapped_by, remove_segments
from ps_elastic.errors import INTERRUPTED
from ps_elastic.records.run_dir import INTERRUPT

MARK = "PS_ELASTIC_JOB"  # carried by every process of a job: sessions and parents change, the environment does not
POLL_S = 0.1
LINGER_S = 3.0  # a rank may still be writing its summary when mpirun has ended
STAGES = ((signal.SIGUSR1, 10.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))  # and how long each may take
_PR_SET_PDEATHSIG = 1


class Ended(NamedTuple):
    """How mpirun ended, whether we were asked to stop it, and which of its processes had to be killed after it."""

    code: int
    interrupted: bool
    outlived: list[int]
    timed_out: bool = False


@dataclass
class Stopping:
    """How far the ending of a job has got; each further request goes on to the next stage at once."""

    segments: set[Path] = field(default_factory=set)  # of shared memory, of processes that had to be killed
    requests: int = 0
    checkpoints: int = 0  # SIGUSR1 that came to us, to be passed on as it is
    stage: int = 0  # of STAGES, how many have begun
    until: float = float("inf")

    def request(self, *_: object) -> None:
        self.requests += 1

    def checkpoint(self, *_: object) -> None:
        self.checkpoints += 1

    def advance(self, process: subprocess.Popen[bytes], mark: str, run_dir: Path, now: float) -> None:
        """Send what is due by now."""
        if self.checkpoints:
            self.checkpoints = 0
            process.send_signal(signal.SIGUSR1)
        if (self.requests > self.stage or now > self.until) and self.stage < len(STAGES):
            number, patience = STAGES[self.stage]
            self.stage += 1
            self.until = now + patience
            if number == signal.SIGUSR1:
                leave_word(run_dir)
            if number == signal.SIGKILL:
                kill(mark, self.segments)
            process.send_signal(number)


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    run_dir: Path,
    stdout: IO[Any] | None = None,
    stderr: IO[Any] | int | None = None,
    limit_s: float = float("inf"),
) -> Ended:
    """Run mpirun to its end and return how it ended. Call it from the main thread: it takes over the signals.

    SIGINT and SIGTERM end the run in three stages (a message, SIGTERM, SIGKILL); SIGUSR1 is passed on. A job that
    takes longer than `limit_s` is killed.
    """
    mark, stopping, timed_out = uuid.uuid4().hex, Stopping(), False
    ends_at = time.monotonic() + limit_s
    with handling(stopping), leftovers.own_folder(environment) as variables:
        process = subprocess.Popen(
            command,
            env={**variables, MARK: mark},
            stdin=subprocess.DEVNULL,  # a session without a terminal must not read from one
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,  # else the terminal's Ctrl-C reaches mpirun too
            preexec_fn=ending_with(os.getpid()),
        )
        try:
            while process.poll() is None:
                stopping.advance(process, mark, run_dir, time.monotonic())
                if time.monotonic() > ends_at:
                    timed_out = bool(kill(mark, stopping.segments))
                try:
                    process.wait(POLL_S)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            outlived = sweep(mark, 0.0 if stopping.stage >= len(STAGES) else LINGER_S, stopping.segments)
            process.wait()
            remove_segments(stopping.segments)
    return Ended(process.returncode, stopping.requests > 0, outlived, timed_out)


def leave_word(run_dir: Path) -> None:
    """Write the message that rank 0 finds when SIGUSR1 comes: end, and with which code."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / INTERRUPT).write_text(str(INTERRUPTED))


def members(mark: str) -> list[int]:
    """The processes on this host that carry `mark`, zombies aside."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process.pid)
        except psutil.Error:  # gone, a zombie, or somebody else's: not one of this job
            continue
    return found


def kill(mark: str, segments: set[Path]) -> list[int]:
    """Kill every process that carries `mark`, and return them; what shared memory they had is added to `segments`.

    With mpirun killed too, nobody else would know that it is to be removed.
    """
    found = members(mark)
    segments |= mapped_by(found)
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return found


def sweep(mark: str, patience_s: float, segments: set[Path]) -> list[int]:
    """Return the processes that had to be killed because they carried `mark` for longer than `patience_s`.

    segments: to it the shared memory of those killed is added.
    """
    patience = time.monotonic() + patience_s
    while members(mark) and time.monotonic() < patience:
        time.sleep(POLL_S)
    killed: set[int] = set()
    limit = time.monotonic() + STAGES[-1][1]
    while (found := kill(mark, segments)) and time.monotonic() < limit:
        killed.update(found)
        time.sleep(POLL_S)
    return sorted(killed)


@contextmanager
def handling(stopping: Stopping) -> Iterator[None]:
    """Send SIGINT, SIGTERM and SIGUSR1 to `stopping` while the block runs."""
    ours = {signal.SIGINT: stopping.request, signal.SIGTERM: stopping.request, signal.SIGUSR1: stopping.checkpoint}
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ending_with(parent: int) -> Any:
    """What the child does before it becomes mpirun: ask for SIGTERM at our death, which may be a SIGKILL."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # died before the kernel knew
            os._exit(1)

    return ask
