"""Every exception that ps_elastic raises on purpose.

PsElasticError
├── ConfigError        the user can fix it: a key, a value, a file, a command line      exit 2
├── PlatformError      this machine or job cannot run it: MPI, launcher, SLURM          exit 3
├── TaskError          the user's own code or numbers failed, on a rank, at a step      exit 1
├── Stalled            everybody waits and nothing can release them; or a deadline      exit 4
├── WorkersLost        fewer workers are left than the run needs                        exit 5
├── PolicyError        a policy broke an invariant of the ledger                        exit 1
├── WireError          bytes that are not a message of ours                             exit 1
├── ShapeError         a tensor of the wrong shape or type at a public door             exit 1
└── Interrupted        Ctrl-C, SIGTERM, or the scheduler wants the machine back        exit 130, 75

Anything else that escapes is a bug of ours and should look like one.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from difflib import get_close_matches

OK, USER_CODE, USAGE, ENVIRONMENT, STALLED, LOST, CHECK_FAILED = range(7)
PREEMPTED, INTERRUPTED = 75, 130
EXIT_CODES = {
    OK: "The command did what it was asked to do.",
    USER_CODE: "The task's own code or numbers failed; the message names the rank. An error of ps_elastic ends so too.",
    USAGE: "A configuration, a file or a command line is wrong.",
    ENVIRONMENT: "MPI, the launcher or SLURM cannot be used here; `ps-elastic doctor` says what to do.",
    STALLED: "No progress: all workers wait, or no push came for `survive.stall_deadline_s`.",
    LOST: "Fewer workers are left than `survive.min_workers`, or a rank was killed.",
    CHECK_FAILED: "A check failed: a target or a bound with `--check`, a replay, or a bound in `verify`.",
    INTERRUPTED: "Somebody asked the command to end: Ctrl-C, SIGTERM, or SLURM before the time limit.",
}


class PsElasticError(Exception):
    """Base of the tree; `exit_code` is what the command ends with."""

    exit_code = USER_CODE


class ConfigError(PsElasticError):
    """A value the user gave is not usable; `key` is its dotted path, `source` the file or command line."""

    exit_code = USAGE

    def __init__(self, message: str, *, key: str = "", source: str = "") -> None:
        self.message, self.key, self.source = message, key, source
        super().__init__(": ".join(part for part in (source, key, message) if part))

    def within(self, prefix: str) -> ConfigError:
        """The same error, seen from the section that holds its key."""
        key = f"{prefix}.{self.key}" if self.key else prefix
        return ConfigError(self.message, key=key, source=self.source)


class PlatformError(PsElasticError):
    """MPI, the launcher, SLURM or a package is missing, mixed up or too small."""

    exit_code = ENVIRONMENT


class TaskError(PsElasticError):
    """The task, as the user wrote it or as its numbers came out, cannot go on."""


class Stalled(PsElasticError):
    """All live workers wait and no action is pending: nothing would ever happen again."""

    exit_code = STALLED


class WorkersLost(PsElasticError):
    """Fewer workers are left than the run needs."""

    exit_code = LOST


class PolicyError(PsElasticError):
    """A policy broke an invariant of the ledger; the message names the policy, the push and the invariant."""


class WireError(PsElasticError):
    """Bytes that are not a message of this version and layout."""


class ShapeError(PsElasticError):
    """A tensor or array has another shape or type than the function states."""


class Interrupted(PsElasticError):
    """Somebody asked the run to end: Ctrl-C, SIGTERM, or the scheduler (then with exit 75)."""

    exit_code = INTERRUPTED


def unknown(kind: str, got: str, known: Iterable[str]) -> str:
    """`unknown KIND 'got'; nearest ...; known: ...`: the one form of this complaint."""
    names = sorted(known)
    near = get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f"; nearest '{near[0]}'" if near else ""
    return f"unknown {kind} '{got}'{hint}; known: {', '.join(names)}"


def exit_code(error: BaseException) -> int:
    """The documented exit code for `error`."""
    if isinstance(error, PsElasticError):
        return error.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else USER_CODE


def describe(error: BaseException) -> str:
    """One line for an error of ours, the traceback for any other."""
    if isinstance(error, PsElasticError):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()
