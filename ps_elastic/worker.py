"""A worker as a machine without I/O: a reply in, a push out. No MPI, no clock of its own."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ps_elastic.compressors import Compressor, ErrorFeedback, Payload
from ps_elastic.errors import TaskError
from ps_elastic.evaluate import statistics_of
from ps_elastic.layout import Layout
from ps_elastic.lookout import Lookout
from ps_elastic.messages import PushMessage, Reply
from ps_elastic.parcel import Courier, Parcel, plain
from ps_elastic.reapply import reapply
from ps_elastic.tasks import Task
from ps_elastic.tracker import Tracker
from ps_elastic.updates import Update
from ps_elastic.updates.sgd import Sgd
from ps_elastic.workbench import Memory, Workbench

_NO_DURATIONS = {"compute_s": 0.0, "encode_s": 0.0}  # of a push of an earlier life
MOST_NONFINITE = 10  # gradients in a row that may be discarded before the run is given up


class Worker:
    """Worker `rank` of 1..p: `load` takes a reply, `push` computes the next push, `note` logs the reply.

    x, g: the model and the gradient, flat (d,), of its bench: its own, with the transport's `memory`, or a shared one.
    clock: seconds; only durations are taken from it. on_nonfinite: "stop" or "drop". overlap: buckets may leave during
    backward, where nothing of the gradient is decided after it. pipeline: pushes that may be unanswered while it
    goes on; to the model of each reply it re-applies those of its pushes that this model lacks.
    """

    workbench: type[Workbench] = Workbench

    def __init__(
        self,
        rank: int,
        task: Task,
        model: nn.Module,
        layout: Layout,
        batches: Iterator[Any],
        update: Update,
        compressors: list[Compressor | ErrorFeedback],
        tracker: Tracker,
        *,
        seed: int = 0,
        accumulate: int = 1,
        clip_norm: float | None = None,
        on_nonfinite: str = "stop",
        autocast: str | None = None,
        discrepancy: str = "exact",
        memory: Memory | None = None,
        bench: Workbench | None = None,
        layerwise: bool = False,
        pipeline: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        overlap: bool = True,
    ) -> None:
        self.rank, self.layout, self.step, self.base, self.samples = rank, layout, 0, 0, 0
        self._task, self._model, self._batches, self._update, self._tracker = task, model, batches, update, tracker
        self._compressors, self._seed, self._accumulate, self._clip_norm = compressors, seed, accumulate, clip_norm
        self._on_nonfinite, self._clock, self._layerwise = on_nonfinite, clock, layerwise
        self._cut_s, self._until = update.cut_s, math.inf
        self._cut: Collection[int] | None = ()  # buckets that the computation under way does not come to, if known
        made = bench or self.workbench(model, layout, memory)
        self.x, self.g, self._g, self._gradient, self._device = made.x, made.g, made.made, made.gradient, made.device
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(autocast or "")
        self._autocast: Callable[[], Any] = (
            (lambda: torch.autocast(self._device.type, dtype)) if dtype else contextlib.nullcontext
        )
        self._shortcut = type(task).differentiate is not Task.differentiate and accumulate == 1 and dtype is None
        self._shortcut = self._shortcut and self._cut_s is None
        self._statistics = statistics_of(model)
        self._own_statistics = [buffer.clone() for buffer in self._statistics] if bench else []  # while others compute
        self.pipeline, self.told = pipeline, -1  # the last step that a reply answered; -1 before the first reply
        self._flying: dict[int, list[Payload]] = {}  # pushes that the model of the last reply lacks
        self._rate = 0.0
        # Who computes on the server's model has no copy of it; who runs ahead has a view that no reply tells of.
        keeps_view = discrepancy == "exact" and not made.foreign and not pipeline
        plains = [plain(compressor) for compressor in compressors]
        self._lookout: Lookout | None = None
        self._compares = keeps_view and bench is None and not made.watched  # x itself is the view, until the next model
        if keeps_view:
            view = self.x if self._compares else torch.empty_like(self.x)
            self._lookout = Lookout(view, layout.buckets, plains)
        self._sent: dict[int, tuple[float, dict[int, Payload]]] = {}  # alpha, and by bucket what may yet be dropped
        lends = bench is not None or pipeline > 0
        self._courier = Courier(rank, layout.buckets, compressors, made.staging, clock, lends=lends)
        # What backward makes is what is pushed, and it is pushed in any case.
        self._final = type(update).run is Sgd.run and clip_norm is None and self._cut_s is None
        may_leave = self._final and on_nonfinite == "stop" and not self._shortcut
        self._overlaps = overlap and may_leave and len(layout.buckets) > 1 and not layerwise
        self._alpha = self._told_alpha = 0.0  # the last that was not 0, and the last
        self._drawn = 0  # batches, for the push being made
        self._made: dict[int, tuple[float, dict[str, float]]] = {}  # push not answered -> norm of residual, durations
        self._moved = math.nan
        self._bases: tuple[int, ...] = (0,) * len(layout.buckets)  # of the buckets of the model loaded
        self._waited_s = 0.0
        self._untold: list[tuple[Reply, float, float, float, float]] = []  # replies noted, of which no line tells yet

    @property
    def unanswered(self) -> int:
        """How many of its pushes no reply has answered."""
        return self.step - self.told

    @property
    def may_go_on(self) -> bool:
        """Whether it can compute its next push before another reply comes."""
        return self.told >= 0 and self.unanswered <= self.pipeline

    def load(self, reply: Reply) -> bool:
        """Take a reply in: learn the fates of pushes, and go on from its model. Returns whether to go on.

        The model may stand in `x` already, received in place, unless the worker compares the two.
        """
        if self._sent:
            self._learn_all(reply)
        self.told, self.step = reply.step, max(self.step, reply.step)
        self._told_alpha = reply.alpha
        if reply.alpha and reply.alpha != self._alpha:
            before, self._alpha = self._alpha, reply.alpha
            if (factor := self._factor(before)) != 1:
                for compressor in self._compressors:
                    if isinstance(compressor, ErrorFeedback):
                        compressor.rescale(factor)
        if reply.model is None:
            self._moved = math.nan
            return False
        if self.pipeline:
            told = [(reply.step, reply.outcome), *((settled.step, settled.outcome) for settled in reply.settled)]
            held = {step for step, outcome in told if outcome == "held"}
            self._flying = {step: sent for step, sent in self._flying.items() if step > reply.step or step in held}
        self.base, self._rate = reply.version, reply.rate
        if not self._compares:
            self.resume(reply.model)
        if self._lookout is not None:
            model = torch.from_numpy(reply.model) if self._compares else self.x
            self._moved = self._lookout.came(model, self._weights(reply))
        self._bases = tuple([layer.version for layer in reply.layers])
        return True

    def resume(self, model: Any) -> None:
        """Stand where the next push is to be computed, given the model of the last reply."""
        received = torch.from_numpy(model)
        if received.data_ptr() != self.x.data_ptr():
            self.x.copy_(received)
        for payloads in self._flying.values():
            self._reapply(payloads)

    def _reapply(self, payloads: list[Payload]) -> None:
        compressors = [plain(compressor) for compressor in self._compressors]
        reapply(self.x, payloads, self.layout.buckets, compressors, self._rate)

    def push(self, emit: Callable[[PushMessage], None], cut: Collection[int] | None = None) -> None:
        """Compute the next push at the model loaded and `emit` it, a message a bucket, bucket 0 last.

        Where the gradient is final as backward makes it, a bucket leaves as soon as backward has finished it (nothing
        can be yielded from there, so that it is a callback). Raises TaskError by step and loss, and what `emit` raises.
        The arrays stay valid until the next `push`; of one that may run ahead, as long as anybody holds them.
        cut: buckets that the computation does not come to before it is cut off, where an update says that it may be;
        None: the clock tells.
        """
        self.step += 1
        started = self._clock()
        self._until = math.inf if self._cut_s is None or cut is not None else started + self._cut_s
        self._cut = () if self._cut_s is None else cut
        _copy(self._own_statistics, self._statistics)
        parcel = self._parcel(emit)
        try:
            self._send(parcel, started)
        finally:
            self.tell()

    def _send(self, parcel: Parcel, started: float) -> None:
        """Compute and send; what can be done while the answer is awaited comes after."""
        loss, norm = self._finite_gradient(parcel)
        _copy(self._statistics, self._own_statistics)
        compute_s = self._clock() - started - parcel.encode_s - parcel.emit_s
        statistics = None
        if self._statistics:
            statistics = torch.cat([buffer.detach().flatten() for buffer in self._statistics]).cpu().numpy()
        self.samples = self._task.batch_size * self._drawn
        missing = self._missing()
        if self._layerwise:
            parcel.close_layers(self._bases, missing, self.samples, loss, self._waited_s, statistics)
        else:
            parcel.close(self.samples, loss, norm, self._waited_s, statistics, self.unanswered - 1)
        if self._courier.feeds_back:
            kept = {i: self._courier.keep(p) for i, p in enumerate(parcel.payloads) if i not in missing}
            self._sent[self.step] = self._alpha, kept
        if self.pipeline:
            self._flying[self.step] = parcel.payloads
            self._reapply(parcel.payloads)
        self._made[self.step] = parcel.residual_norm, {"compute_s": compute_s, "encode_s": parcel.encode_s}
        if self._lookout is not None:
            self._lookout.left(parcel.payloads, self._update.view)

    def _parcel(self, emit: Callable[[PushMessage], None]) -> Parcel:
        return Parcel(self._courier, self.step, self.base, emit)

    def note(self, reply: Reply, t_s: float, send_s: float, wait_s: float) -> None:
        """Log what the reply told: a line for the push answered, one for each earlier push settled since.

        The lines are written when the next push has left, or at once where there is none to come.
        """
        self._waited_s += wait_s
        self._untold.append((reply, t_s, self._moved, send_s, wait_s))
        if reply.model is None:
            self.tell()

    def tell(self) -> None:
        """Write the lines of what was noted."""
        for noted in self._untold:
            self._tell(*noted)
        self._untold.clear()

    def _tell(self, reply: Reply, t_s: float, moved: float, send_s: float, wait_s: float) -> None:
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
                "reply", t_s, step=reply.step, version=reply.version, discrepancy=reply.discrepancy, moved=moved,
                residual_norm=residual_norm, outcome=reply.outcome, **durations, send_s=send_s, wait_s=wait_s,
            )  # fmt: skip
            for answered in [step for step in self._made if step < reply.step]:
                del self._made[answered]

    def _learn_all(self, reply: Reply) -> None:
        every = range(len(self._compressors))
        for i in every:
            self._learn(reply.step, i, reply.layers[i].outcome if self._layerwise else reply.outcome)
        for settled in reply.settled:
            for i in (settled.bucket,) if self._layerwise else every:
                self._learn(settled.step, i, settled.outcome)

    def _learn(self, step: int, bucket: int, outcome: str) -> None:
        if outcome == "held" or step not in self._sent:
            return
        alpha, payloads = self._sent[step]
        payload, compressor = payloads.pop(bucket, None), self._compressors[bucket]
        if not payloads:
            del self._sent[step]
        if payload is not None and outcome == "dropped" and isinstance(compressor, ErrorFeedback):
            compressor.take_back(payload, self._factor(alpha))

    def _factor(self, alpha: float) -> float:
        """What a gradient kept back at step size `alpha` counts now; updates and models are scaled already."""
        return alpha / self._alpha if alpha and self._alpha and self._update.units == "gradient" else 1.0

    def _weights(self, reply: Reply) -> tuple[float, ...]:
        """What the server applied each bucket of the last push times; 0 of what is no gradient.

        So after local steps, and of a model, `moved` is ||new model - view of the last gradient||: the distance of a
        local model from the mean of all where all are averaged.
        """
        if self._update.units != "gradient":
            return (0.0,) * len(self.layout.buckets)
        if self._layerwise:
            return tuple([layer.weight for layer in reply.layers])
        return (reply.weight,) * len(self.layout.buckets)

    def _missing(self) -> Collection[int]:
        """The buckets that backward had not finished when it was cut off."""
        if self._cut is not None:
            return self._cut
        return self._gradient.missing() if self._gradient.cut else ()

    def _finite_gradient(self, parcel: Parcel) -> tuple[float, float]:
        self._leave = parcel.leave
        for _ in range(MOST_NONFINITE):
            self._drawn = 0
            loss = self._update.run(self._clipped_gradient, self.x, self._g, self._told_alpha, self.base)
            norm = parcel.norm()
            if math.isfinite(norm):
                return loss, norm
            if self._on_nonfinite == "stop":
                raise TaskError(f"step {self.step}: the gradient is not finite (norm {norm}, loss {loss})")
        raise TaskError(f"step {self.step}: {MOST_NONFINITE} gradients in a row were not finite (loss {loss})")

    def _clipped_gradient(self) -> float:
        loss = self._mean_gradient()
        if self._clip_norm is not None:
            norm = float(torch.linalg.vector_norm(self._g))
            if self._clip_norm < norm < math.inf:
                self._g *= self._clip_norm / norm
        return loss

    def _mean_gradient(self) -> float:
        """The gradient of the mean loss of the next `accumulate` batches at x, into g; returns that loss."""
        if self._shortcut:
            return self._task.differentiate(self._model, self._next_batch(), self._gradient.views)
        total = 0.0
        final = self._final and self._accumulate == 1
        with self._gradient.collecting(self._clock, self._until, final=final):
            for number in range(1, self._accumulate + 1):
                batch = self._next_batch()
                with self._autocast():
                    loss = self._task.loss(self._model, batch)
                if self._overlaps and number == self._accumulate:
                    self._gradient.tell(self._leave)
                total += float(loss.detach())
                (loss / self._accumulate if self._accumulate > 1 else loss).backward()
                self._gradient.told()
        for i in self._missing():
            bucket = self.layout.buckets[i]
            self._g[bucket.start : bucket.stop].zero_()
        return total / self._accumulate

    def _next_batch(self) -> Any:
        if not self._shortcut:
            _seed(self._device, draw_seed(self._seed, self.rank, self.step, self._drawn))
        self._drawn += 1
        return to_device(next(self._batches), self._device)


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=False):  # one of the two may be empty
        target.copy_(source)


def _seed(device: torch.device, seed: int) -> None:
    """Seed torch's default generator of the CPU and of `device`."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 300 us more: it notes where it was called from
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def draw_seed(*parts: int) -> int:
    """A 63-bit seed for a generator, from whole numbers such as (seed, worker, step)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def to_device(batch: Any, device: torch.device) -> Any:
    """`batch` with every tensor in it on `device`; arrays become tensors."""
    match batch:
        case Tensor():
            return batch.to(device, non_blocking=True)
        case np.ndarray():
            return torch.from_numpy(batch).to(device)
        case tuple() | list():
            return type(batch)(to_device(item, device) for item in batch)
        case dict():
            return {key: to_device(item, device) for key, item in batch.items()}
    return batch
