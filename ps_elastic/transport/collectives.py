"""What the ranks of a job do together, so that all go on or all end, with one message.

MPI's Finalize waits for every rank: a rank that ends alone, in whatever way, must end the others too. No numpy here:
the ranks agree on their threads before it is imported.
"""

from __future__ import annotations

import contextlib
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from ps_elastic.errors import OK, USAGE, USER_CODE, PsElasticError, describe, exit_code

if TYPE_CHECKING:
    from ps_elastic.transport.mpi import MPI

T = TypeVar("T")
_TEXT_BYTES = 1 << 14
_LOOK_S = 0.002


class JobFailed(PsElasticError):
    """Some rank could not begin; told by rank 0 for all, with the exit code of the rank's own error."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


class Told(SystemExit):
    """Ends a rank whose job failed in a way that rank 0 tells the user."""


@contextlib.contextmanager
def ending_all(comm: MPI.Comm) -> Iterator[None]:
    """Whatever escapes from the block on one rank alone ends the job, with its rank, its text and its exit code."""
    try:
        yield
    except (JobFailed, Told):
        raise
    except BaseException as error:
        with contextlib.suppress(BrokenPipeError):  # where mpirun was killed nobody listens
            print(f"ps-elastic: {blame(error, comm.Get_rank())}", file=sys.stderr, flush=True)
        comm.Abort(exit_code(error))
        raise


def blame(error: BaseException, rank: int) -> str:
    """What to tell of an error on `rank`. What the server says on purpose already names the rank that it is about."""
    prefix = "" if rank == 0 and isinstance(error, PsElasticError) else f"rank {rank}: "
    return prefix + describe(error)


def agree(comm: MPI.Comm, action: Callable[[], T]) -> T:
    """Do `action` on every rank; where one fails, all end: JobFailed on rank 0 says why, the others raise Told."""
    code, text, value = OK, "", None
    try:
        value = action()
    except Exception as error:
        code, text = exit_code(error), describe(error)
    codes = array("i", [OK] * comm.Get_size())
    meet(comm)
    comm.Allgather(array("i", [code]), codes)
    first = next((rank for rank, code in enumerate(codes) if code != OK), None)
    if first is None:
        return value  # type: ignore[return-value]
    text = broadcast(comm, text, first)
    if comm.Get_rank():
        raise Told(codes[first])
    where = f"rank {first}: " if first or codes[first] == USER_CODE else ""
    raise JobFailed(where + text, codes[first])


def compare(comm: MPI.Comm, what: str, digest: bytes) -> None:
    """End all ranks where their digests (32 bytes) differ; JobFailed on rank 0 names those that differ from its own."""
    digests = bytearray(comm.Get_size() * len(digest))
    comm.Allgather(digest, digests)
    each = [digests[start : start + len(digest)] for start in range(0, len(digests), len(digest))]
    foreign = [rank for rank, other in enumerate(each) if other != each[0]]
    if foreign and comm.Get_rank():
        raise Told(USAGE)
    if foreign:
        raise JobFailed(f"{what} of ranks {foreign} differs from that of rank 0: start all with the same files", USAGE)


def broadcast(comm: MPI.Comm, text: str, root: int) -> str:
    """The text of rank `root`, on every rank; the last 16 kB of it."""
    box = bytearray(text.encode()[-_TEXT_BYTES:].ljust(_TEXT_BYTES, b"\0"))
    comm.Bcast(box, root)
    return box.rstrip(b"\0").decode(errors="replace")


def meet(comm: MPI.Comm) -> None:
    """Wait, asleep, until all ranks are here: MPI's own waiting would burn a core."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(_LOOK_S)
