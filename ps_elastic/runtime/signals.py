"""What somebody outside wants of a run: signals, as flags that the server's loop looks at."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

from ps_elastic.cluster import leftovers
from ps_elastic.errors import Interrupted, PsElasticError, WorkersLost

TERM_GRACE_S = 2  # a worker lives on after SIGTERM
ORPHAN_GRACE_S = 10  # the server, after its launcher died: time to write the summary
_PR_SET_PDEATHSIG = 1


class Signals:
    """What somebody wants of this rank: SIGUSR1 (end well), SIGTERM or SIGINT (end now).

    Rank 0 answers for all, as launchers signal every rank. A worker that died of SIGTERM at once would have mpirun kill
    rank 0 before it can write the summary (mpirun's own patience is 0.25 s), so it lives on for a while.

    A rank whose launcher was killed gets SIGTERM too, where the kernel can be asked for that. It then removes what MPI
    has in shared memory, as nobody else is left to do so, and does not live long.
    """

    def __init__(self, rank: int) -> None:
        self.stop, self.end = False, ""  # end: the name of the signal
        self._launcher = os.getppid()
        signal.signal(signal.SIGUSR1, self._on_stop if rank == 0 else signal.SIG_IGN)
        signal.signal(signal.SIGINT, self._on_end if rank == 0 else signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_end if rank == 0 else self._on_term)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop = True

    def _on_end(self, number: int, frame: FrameType | None) -> None:
        self.end = signal.Signals(number).name
        if self._orphaned():
            signal.alarm(ORPHAN_GRACE_S)

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        self._orphaned()
        signal.alarm(TERM_GRACE_S)  # whose signal ends this process, whatever it does then

    def _orphaned(self) -> bool:
        """Whether the launcher is gone; then nothing of ours stays in shared memory."""
        if os.getppid() == self._launcher:
            return False
        leftovers.remove_segments(leftovers.mapped_by([os.getpid()]))
        return True


def ended_by(name: str, lost: list[int]) -> PsElasticError:
    """Why the signal `name` came: a launcher sends SIGTERM to all when a rank died, too."""
    if lost:
        return WorkersLost(f"ranks {lost} died, and so the launcher ended the job ({name})")
    return Interrupted(f"the run was told to end ({name})")
