"""Pushes that a worker adds to the shared model itself: `writers: workers`. What it does there: model_writer.py.

It computes on a copy that it makes in passing: the pass that writes its push, and measures how far the copy has
become from the model, makes the next copy too. With `update.pipeline` it continues at once; else it waits for rank 0,
and copies the model then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ps_elastic.compressors import Compressor, ErrorFeedback, Payload
from ps_elastic.compressors.identity import Identity
from ps_elastic.tasks import Task
from ps_elastic.transport.messages import Reply
from ps_elastic.worker.flat_module import FlatModule
from ps_elastic.worker.model_writer import ModelWriter, SharedModel
from ps_elastic.worker.push import outcomes
from ps_elastic.worker.updates import Update
from ps_elastic.worker.updates.sgd import Sgd


def takes_as_made(
    task: Task, update: Update, compressors: Sequence[Compressor | ErrorFeedback], clip_norm: float | None
) -> bool:
    """Whether a gradient can be written as backward made it: nothing changes or encodes it after that."""
    whole = len(compressors) == 1 and isinstance(compressors[0], Identity)
    own = type(task).differentiate is not Task.differentiate
    return whole and type(update).run is Sgd.run and clip_norm is None and not own


class IntoModel:
    """What is encoded is written at once, and only the metadata leave.

    flat: where gradients are made at a copy of the model; if in parts, they are written as they are. pipeline: pushes
    that the worker may leave unanswered. measures: see `ModelWriter`.
    """

    def __init__(
        self, shared_model: SharedModel, flat: FlatModule, plains: Sequence[Compressor], pipeline: int,
        *, measures: bool,
    ) -> None:  # fmt: skip
        self._writer = ModelWriter(shared_model, flat.x, flat.layout, measures=measures)
        self._plains, self._parts, self._pipeline = plains, flat.parts, pipeline
        self.write_made: Callable[[], tuple[Payload, float]] | None = self._write_made if flat.parts else None
        self._unsettled: dict[int, tuple[float, list[Payload]]] = {}  # rate and payloads of what it wrote
        self._has_read = False  # whether x is a copy that no push was computed on
        self._read = 0, 0  # version and step of the last reply before it was made
        self._step, self._rate = 0, 0.0
        self._square = 0.0  # of the distance

    def came(self, reply: Reply) -> None:
        self._rate = reply.rate
        for step, outcome in outcomes(reply):
            if outcome != "held" and step in self._unsettled:
                rate, payloads = self._unsettled.pop(step)
                if outcome == "dropped":
                    self._take_back(rate, payloads)

    def resume(self, model: Any) -> None:
        """There is nothing to be copied before the next push is due, if it has not been already."""

    def begin(self, step: int, version: int, told: int, *, early: bool) -> tuple[int, int]:
        if not self._has_read:
            self._writer.read()
            self._read = version, told
        base, read_told = self._read
        self._step, self._square = step, 0.0
        self._has_read = told >= 0 and step - told <= self._pipeline and not early  # the pass that writes reads again
        if self._has_read:
            self._read = version, told
        return base, step - 1 - read_told

    def ready(self, i: int, payload: Payload) -> tuple[Any, ...]:
        self._square += self._writer.write(i, self._plains[i], payload, self._rate, reads=self._has_read)
        if i == 0:
            self._writer.leave(self._step, self._square)
        return ()

    def _write_made(self) -> tuple[Payload, float]:
        parts = tuple([take() for take in self._parts])
        square, norm = self._writer.write_parts(parts, self._rate, reads=self._has_read)
        self._writer.leave(self._step, square)
        return parts, norm

    def close(self, payloads: list[Payload]) -> None:
        self._unsettled[self._step] = self._rate, payloads

    def _take_back(self, rate: float, payloads: list[Payload]) -> None:
        if self.write_made is not None:
            self._writer.take_parts_back(payloads[0], rate)
            return
        for i, (compressor, payload) in enumerate(zip(self._plains, payloads, strict=True)):
            self._writer.take_back(i, compressor, payload, rate)
