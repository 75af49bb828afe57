"""A worker as a machine without I/O: a reply in, a push out. No MPI, no clock of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ps_elastic.compressors import Compressor, ErrorFeedback
from ps_elastic.errors import TaskError
from ps_elastic.records.tracker import Tracker
from ps_elastic.transport.messages import PushMessage, Reply
from ps_elastic.vectors.layout import statistics_of
from ps_elastic.worker.drift import drift_meter
from ps_elastic.worker.flat_module import ModelLives
from ps_elastic.worker.gradients import GradientSource
from ps_elastic.worker.push import Outlet, PushEncoder, Residuals, ToServer, plain

MOST_NONFINITE = 10  # gradients in a row that may be discarded before the run is given up


class Worker:
    """A worker: `load` takes a reply, `push` computes the next push, `note` logs the reply.

    A push is three calls: `begin`, the gradient, and `send`. x, g: the model and the gradient (d,), where `source` has
    them. outlet: how pushes leave; None: they are sent. on_nonfinite: "stop" or "drop". overlap: buckets may leave
    during backward, where nothing of the gradient is decided after it. pipeline: pushes that may be unanswered while it
    goes on.
    """

    def __init__(
        self, source: GradientSource, compressors: list[Compressor | ErrorFeedback], tracker: Tracker, *,
        on_nonfinite: str = "stop", discrepancy: str = "exact", outlet: Outlet | None = None, layerwise: bool = False,
        pipeline: int = 0, overlap: bool = True,
    ) -> None:  # fmt: skip
        flat, layout, rank, clock, update = source.flat, source.flat.layout, source.rank, source.clock, source.update
        self.rank, self.layout, self.step, self.base = rank, layout, 0, 0
        self.pipeline, self.told = pipeline, -1  # the last step that a reply answered; -1 before the first reply
        self._gradient_source, self._task, self._update, self._clock = source, source.task, update, clock
        self._on_nonfinite, self._layerwise = on_nonfinite, layerwise
        self._flat, self.x, self.g = flat, flat.x, flat.g
        shares = flat.lives is ModelLives.SHARED
        plains = [plain(compressor) for compressor in compressors]
        self._outlet: Outlet = outlet or ToServer(self.x, layout.buckets, plains, pipeline)
        self._encoder = PushEncoder(
            rank, layout.buckets, compressors, flat.staging, clock, self._outlet, lends=shares or pipeline > 0
        )
        may_leave = source.final and on_nonfinite == "stop"
        self._overlaps = overlap and may_leave and len(layout.buckets) > 1 and not layerwise
        if self._overlaps:
            source.leave = self._encoder.leave
        self._residuals = Residuals(compressors, scales=update.units == "gradient", layerwise=layerwise)
        self.worker_log = WorkerLog(tracker, layerwise=layerwise)
        self._statistics = statistics_of(flat.model)
        self._own_statistics = [buffer.clone() for buffer in self._statistics] if shares else []  # while others compute
        measures = discrepancy == "exact" and not pipeline  # no reply tells of the copy that pipelining made
        self._drift_meter = drift_meter(flat, plains, moves=update.moves) if measures else None
        self._compares = measures and flat.lives is ModelLives.BESIDE
        self._bases: tuple[int, ...] = (0,) * len(layout.buckets)  # of the buckets of the model loaded
        self._told_alpha = self._waited_s = 0.0

    @property
    def unanswered(self) -> int:
        """How many of its pushes no reply has answered."""
        return self.step - self.told

    @property
    def may_go_on(self) -> bool:
        """Whether it can compute its next push before another reply comes."""
        return self.told >= 0 and self.unanswered <= self.pipeline

    def load(self, reply: Reply) -> bool:
        """Take a reply in: learn the outcomes of pushes, and continue from its model. Returns whether to.

        The model may stand in `x` already, received in place, unless the worker compares the two.
        """
        if self._encoder.feeds_back:
            self._residuals.learn(reply)
        self._outlet.came(reply)
        self.told, self.step = reply.step, max(self.step, reply.step)
        self._told_alpha = reply.alpha
        if reply.model is None:
            return False
        self.base = reply.version
        if not self._compares:
            self._outlet.resume(reply.model)
        if self._drift_meter is not None:
            model = torch.from_numpy(reply.model) if self._compares else self.x
            self._drift_meter.came(model, self._weights(reply))
        self._bases = tuple([layer.version for layer in reply.layers])
        return True

    def resume(self, model: Any) -> None:
        """Stand where the next push is to be computed, given the model of the last reply, as `load` does."""
        self._outlet.resume(model)

    def push(self, emit: Callable[[PushMessage], None], cut: Collection[int] | None = None) -> None:
        """Compute the next push at the model loaded and `emit` it, a message a bucket, bucket 0 last.

        Where the gradient is final as backward makes it, a bucket leaves as soon as backward has finished it (nothing
        can be yielded from there, so that it is a callback). Raises TaskError by step and loss, and what `emit` raises.
        The arrays stay valid until the next `push`; with `update.pipeline`, as long as anybody holds them.
        cut: buckets that the computation does not come to before it is cut off, where an update says that it may be;
        None: the clock tells.
        """
        self.begin(emit, cut)
        try:
            for _ in range(MOST_NONFINITE):
                loss = self._gradient()
                if self.send(loss):
                    return
            raise TaskError(f"step {self.step}: {MOST_NONFINITE} gradients in a row were not finite (loss {loss})")
        finally:
            self.worker_log.tell()

    def begin(self, emit: Callable[[PushMessage], None], cut: Collection[int] | None = None) -> None:
        """The next push begins: its gradient comes next, and then `send`."""
        self.step += 1
        base, ahead = self._outlet.begin(self.step, self.base, self.told, early=self._overlaps)
        self._started = self._clock()
        self._gradient_source.begin(self.step, self._started, cut)
        if self._own_statistics:
            _copy(self._own_statistics, self._statistics)
        self._encoder.begin(self.step, base, ahead, emit)

    def _gradient(self) -> float:
        """Leave what is to be pushed in g; return the loss. Raises TaskError for parameters that do not stay."""
        source = self._gradient_source
        source.drawn = 0
        try:
            loss = self._update.run(source.gradient, self.x, self._flat.made, self._told_alpha, self.base)
        except RuntimeError:  # of torch, where what happened to a parameter is the cause
            self._flat.watch.look_at_all(self.step)
            raise
        self._flat.watch.look(self.step)
        return loss

    def send(self, loss: float) -> bool:
        """Let the push leave whose gradient is in g, and whose loss that is; return whether it has.

        One that is not finite has not, where that may happen; else it raises TaskError. What can be done while the
        answer is awaited comes after it has left.
        """
        encoder, missing = self._encoder, self._gradient_source.missing()
        norm = encoder.norm()
        if not math.isfinite(norm):
            if self._on_nonfinite == "stop":
                raise TaskError(f"step {self.step}: the gradient is not finite (norm {norm}, loss {loss})")
            return False
        if self._own_statistics:
            _copy(self._statistics, self._own_statistics)
        compute_s = self._clock() - self._started - encoder.encode_s - encoder.emit_s
        statistics = None
        if self._statistics:
            statistics = torch.cat([buffer.detach().flatten() for buffer in self._statistics]).float().cpu().numpy()
        samples = self._task.batch_size * self._gradient_source.drawn
        if self._layerwise:
            encoder.close_layers(self._bases, missing, samples, loss, self._waited_s, statistics)
        else:
            encoder.close(samples, loss, norm, self._waited_s, statistics)
        if encoder.feeds_back:
            kept = {i: encoder.keep(p) for i, p in enumerate(encoder.payloads) if i not in missing}
            self._residuals.sent(self.step, kept)
        self._outlet.close(encoder.payloads)
        self.worker_log.made(self.step, encoder.residual_norm, compute_s, encoder.encode_s)
        if self._drift_meter is not None:
            self._drift_meter.left(encoder.payloads, self._update.view)
        return True

    def note(self, reply: Reply, t_s: float, send_s: float, wait_s: float) -> None:
        """Log what the reply told: a line for the push answered, one for each earlier push settled since.

        The lines are written when the next push has left, or at once where there is none to come.
        """
        self._waited_s += wait_s
        seen = None if reply.model is None else self._drift_meter
        self.worker_log.note(reply, t_s, lambda: math.nan if seen is None else seen.moved, send_s, wait_s)

    def _weights(self, reply: Reply) -> tuple[float, ...]:
        """What the server applied each bucket of the last push times; 0 of what is no gradient.

        So after local steps, and of a model, `moved` is ||new model - copy of the last gradient||: the distance of a
        local model from the mean of all where all are averaged.
        """
        if self._update.units != "gradient":
            return (0.0,) * len(self.layout.buckets)
        if self._layerwise:
            return tuple([layer.weight for layer in reply.layers])
        return (reply.weight,) * len(self.layout.buckets)


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


class WorkerLog:
    """Notes what comes, and writes the lines when it is told to, or at once where no push is to come."""

    def __init__(self, tracker: Tracker, *, layerwise: bool) -> None:
        self._tracker, self._layerwise = tracker, layerwise
        self._made: dict[int, tuple[float, float, float]] = {}  # push not answered -> what its line says of it
        self._untold: list[tuple[Reply, float, Callable[[], float], float, float]] = []  # noted, and not written yet

    def made(self, step: int, residual_norm: float, compute_s: float, encode_s: float) -> None:
        """Push `step` has left."""
        self._made[step] = residual_norm, compute_s, encode_s

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
            residual_norm, compute_s, encode_s = self._made.pop(reply.step, (0.0, 0.0, 0.0))  # of an earlier life
            self._tracker.note(
                "reply", t_s, step=reply.step, version=reply.version, discrepancy=reply.discrepancy, moved=moved(),
                residual_norm=residual_norm, outcome=reply.outcome, compute_s=compute_s, encode_s=encode_s,
                send_s=send_s, wait_s=wait_s,
            )  # fmt: skip
            for answered in [step for step in self._made if step < reply.step]:
                del self._made[answered]
