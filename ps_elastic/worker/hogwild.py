"""A worker that adds its pushes to the shared model itself: `writers: workers`. What it does there: model_writer.py.

It computes on a copy that it makes in passing: the pass that writes its push, and measures how far the copy has
become from the model, makes the next copy too. With `update.pipeline` it goes on at once; else it waits for rank 0,
and copies the model then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ps_elastic.compressors import Compressor, ErrorFeedback
from ps_elastic.compressors.identity import Identity
from ps_elastic.tasks import Task
from ps_elastic.transport.messages import PushMessage, Reply
from ps_elastic.vectors.layout import Layout
from ps_elastic.worker.flat_module import FlatModule, GradientHooks
from ps_elastic.worker.model_writer import ModelWriter, Run, SharedModel, runs_of
from ps_elastic.worker.push import OutgoingPush, PushEncoder, plain
from ps_elastic.worker.staging import GradientRegion
from ps_elastic.worker.updates import Update
from ps_elastic.worker.updates.sgd import Sgd
from ps_elastic.worker.worker import Worker


class Kept(GradientHooks):
    """Keeps each large gradient as backward made it: who writes the model in place needs no copy of it."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        places: Mapping[str, GradientRegion],
        begin: Callable[[int], None],
        g: Tensor,
    ) -> None:
        self._g, self._runs = g, runs_of(layout)
        self._alone = {run.names[0] for run in self._runs if len(run.names) == 1}
        self._kept: dict[str, Tensor] = {}
        super().__init__(model, layout, places, begin)

    def _hook(self, name: str, bucket: int) -> Callable[[Tensor], None]:
        if name not in self._alone:
            return super()._hook(name, bucket)
        kept, seen = self._kept, self._seen

        def keep(parameter: Tensor) -> None:
            assert parameter.grad is not None
            kept[name] = kept[name].add_(parameter.grad) if name in seen else parameter.grad
            seen.add(name)
            parameter.grad = None

        return keep

    def take(self) -> tuple[Tensor, ...]:
        """The gradient in parts, for a Writer; it is the caller's."""
        return tuple([self._part(run) for run in self._runs])

    def _part(self, run: Run) -> Tensor:
        kept = self._kept.pop(run.names[0], None)
        return self._g[run.start : run.stop].clone() if kept is None else kept.reshape(-1)


class OpenBench(FlatModule):
    """A flat_module whose gradients stay where backward made them."""

    def _collector(self, model: nn.Module, layout: Layout, places: Mapping[str, GradientRegion]) -> GradientHooks:
        return Kept(model, layout, places, self.staging.begin, self.made)


class WrittenPush(OutgoingPush):
    """A push on its way into the model: what is encoded is written at once, and only the header leaves.

    reads: the copy that the next push is computed on is made on the way. ahead: see PushMessage. take: gives the
    gradient in parts, if it is to be written as it is.
    """

    def __init__(
        self,
        encoder: PushEncoder,
        step: int,
        base: int,
        emit: Callable[[PushMessage], None],
        writer: ModelWriter,
        rate: float,
        ahead: int,
        take: Callable[[], tuple[Tensor, ...]] | None,
        *,
        reads: bool,
    ) -> None:
        super().__init__(encoder, step, base, emit)
        self._writer, self._rate, self._ahead, self._reads, self._take = writer, rate, ahead, reads, take
        self._square = 0.0  # of the distance

    def norm(self) -> float:
        if self._take is None:
            return super().norm()
        started = self._encoder.clock()
        self.payloads[0] = self._take()
        self._square, norm = self._writer.write_parts(self.payloads[0], self._rate, reads=self._reads)
        self._squares[0] = self._payload_squares[0] = [norm * norm]
        self._encoded[0] = True
        self.encode_s += self._encoder.clock() - started
        return norm

    def close(self, samples: int, loss: float, norm: float, waited_s: float, statistics: Any, ahead: int = 0) -> None:
        super().close(samples, loss, norm, waited_s, statistics, self._ahead)

    def _encode(self, i: int) -> None:
        super()._encode(i)
        compressor = plain(self._encoder.compressors[i])
        self._square += self._writer.write(i, compressor, self.payloads[i], self._rate, reads=self._reads)

    def _send(self, i: int, **numbers: Any) -> None:
        if i == 0:
            self._writer.leave(self._step, self._square)
        self._emit(PushMessage(self._encoder.rank, self._step, self._base, (), i, len(self.payloads), **numbers))


class WritingWorker(Worker):
    """As `Worker`; shared_model: the model that it writes, and what it is told by."""

    def __init__(
        self,
        shared_model: SharedModel,
        rank: int,
        task: Task,
        model: nn.Module,
        layout: Layout,
        batches: Iterator[Any],
        update: Update,
        compressors: list[Compressor | ErrorFeedback],
        *arguments: Any,
        discrepancy: str = "exact",
        **settings: Any,
    ) -> None:
        own = type(task).differentiate is not Task.differentiate
        whole = len(compressors) == 1 and isinstance(compressors[0], Identity)
        as_made = whole and type(update).run is Sgd.run and settings.get("clip_norm") is None and not own
        self.flat_module = OpenBench if as_made else FlatModule
        super().__init__(
            rank, task, model, layout, batches, update, compressors, *arguments, discrepancy="off", **settings
        )
        gradient = self._bench.gradient
        self._take = gradient.take if isinstance(gradient, Kept) else None
        self._writer = ModelWriter(shared_model, self.x, layout, measures=discrepancy == "exact")
        self._unsettled: dict[
            int, tuple[float, Sequence[tuple[Tensor, ...]]]
        ] = {}  # rate and payloads of what it wrote
        self._has_read = False  # whether x is a copy that no push was computed on
        self._read_base = self._read_told = 0  # version and step of the last reply before it was made

    def load(self, reply: Reply) -> bool:
        going = super().load(reply)
        told = [(reply.step, reply.outcome), *((settled.step, settled.outcome) for settled in reply.settled)]
        for step, outcome in told:
            if outcome != "held" and step in self._unsettled:
                rate, payloads = self._unsettled.pop(step)
                if outcome == "dropped":
                    self._take_back(rate, payloads)
        return going

    def resume(self, model: Any) -> None:
        """There is nothing to be copied before the next push is due, if it has not been already."""

    def push(self, emit: Callable[[PushMessage], None], cut: Collection[int] | None = None) -> None:
        if not self._has_read:
            self._writer.read()
            self._note_read()
        super().push(emit, cut)

    def _outgoing(self, emit: Callable[[PushMessage], None]) -> WrittenPush:
        base, ahead = self._read_base, self.step - 1 - self._read_told
        self._has_read = self.may_go_on and not self._overlaps
        if self._has_read:
            self._note_read()
        page = WrittenPush(
            self._encoder, self.step, base, emit, self._writer, self._rate, ahead, self._take, reads=self._has_read
        )  # fmt: skip
        self._unsettled[self.step] = self._rate, page.payloads
        return page

    def _note_read(self) -> None:
        self._has_read, self._read_base, self._read_told = True, self.base, self.told

    def _reapply(self, payloads: Sequence[tuple[Tensor, ...]]) -> None:
        """Its pushes are in the model that it reads."""

    def _take_back(self, rate: float, payloads: Sequence[tuple[Tensor, ...]]) -> None:
        if self._take is not None:
            self._writer.take_parts_back(payloads[0], rate)
            return
        for i, (compressor, payload) in enumerate(zip(self._compressors, payloads, strict=True)):
            self._writer.take_back(i, plain(compressor), payload, rate)
