"""A worker's lines: one for each push answered, one for each earlier push settled since."""

from __future__ import annotations

from collections.abc import Callable

from ps_elastic.records.tracker import Tracker
from ps_elastic.transport.messages import Reply

_NO_DURATIONS = {"compute_s": 0.0, "encode_s": 0.0}  # of a push of an earlier life


class Logbook:
    """Notes what comes, and writes the lines when it is told to, or at once where no push is to come."""

    def __init__(self, tracker: Tracker, *, layerwise: bool) -> None:
        self._tracker, self._layerwise = tracker, layerwise
        self._made: dict[int, tuple[float, dict[str, float]]] = {}  # push not answered -> norm of residual, durations
        self._untold: list[
            tuple[Reply, float, Callable[[], float], float, float]
        ] = []  # replies noted, of which no line tells yet

    def made(self, step: int, residual_norm: float, compute_s: float, encode_s: float) -> None:
        """Push `step` has left."""
        self._made[step] = residual_norm, {"compute_s": compute_s, "encode_s": encode_s}

    def note(self, reply: Reply, t_s: float, moved: Callable[[], float], send_s: float, wait_s: float) -> None:
        """A reply was loaded; `moved` is asked when its line is written."""
        self._untold.append((reply, t_s, moved, send_s, wait_s))
        if reply.model is None:
            self.tell()

    def tell(self) -> None:
        """Write the lines of what was noted."""
        for noted in self._untold:
            self._tell(*noted)
        self._untold.clear()

    def _tell(self, reply: Reply, t_s: float, moved: Callable[[], float], send_s: float, wait_s: float) -> None:
        for settled in reply.settled:
            if settled.outcome == "held":
                continue
            named = {"bucket": settled.bucket} if self._layerwise else {}
            self._tracker.note(
                "settled", t_s, step=settled.step, outcome=settled.outcome, discrepancy=settled.discrepancy, **named
            )
        if reply.step:
            residual_norm, durations = self._made.pop(reply.step, (0.0, _NO_DURATIONS))
            self._tracker.note(
                "reply", t_s, step=reply.step, version=reply.version, discrepancy=reply.discrepancy, moved=moved(),
                residual_norm=residual_norm, outcome=reply.outcome, **durations, send_s=send_s, wait_s=wait_s,
            )  # fmt: skip
            for answered in [step for step in self._made if step < reply.step]:
                del self._made[answered]
