"""From a configuration to a Server and Workers: the one place where the parts are put together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ps_elastic.compressors import Compressor, ErrorFeedback
from ps_elastic.compressors.identity import Identity
from ps_elastic.config.compatibility import refuse_alone
from ps_elastic.config.schema import Config
from ps_elastic.errors import ConfigError, PlatformError
from ps_elastic.policies.events import Told
from ps_elastic.records.tracker import Tracker
from ps_elastic.runtime.initial_model import make_model
from ps_elastic.server.evaluator import Evaluator
from ps_elastic.server.layers import JoinedModel
from ps_elastic.server.optimizer import FlatOptimizer, step_sizes
from ps_elastic.server.protocols import Store
from ps_elastic.server.server import Server
from ps_elastic.server.shared_step_memory import SharedStepMemory
from ps_elastic.server.store import ParameterStore
from ps_elastic.server.totals import BoundFacts
from ps_elastic.server.written import WrittenStore
from ps_elastic.tasks import Task
from ps_elastic.tasks.copies import copy_model
from ps_elastic.transport.wire import HEADER_BYTES, padded
from ps_elastic.vectors.layout import Bucket, Layout, statistics_of
from ps_elastic.worker.flat_module import FlatModule, Memory, ModelLives
from ps_elastic.worker.gradients import GradientSource, draw_seed
from ps_elastic.worker.hogwild import IntoModel, takes_as_made
from ps_elastic.worker.model_writer import SharedModel, runs_of
from ps_elastic.worker.push import plain
from ps_elastic.worker.worker import Worker


class Readers(Protocol):
    """Those who read the server's model where it lies: its end of the transport."""

    def flush(self) -> None:
        """Return when the model may change."""

    def begin_step(self, workers: Sequence[int], model: np.ndarray) -> Callable[[int], None] | None:
        """A step begins, of pushes of `workers`: what is to be told how many entries of `model` it is done with."""


class Parts(NamedTuple):
    """What every rank makes for itself: the same on all of them."""

    task: Task
    model: nn.Module
    layout: Layout
    compressor: Compressor
    notes: tuple[str, ...] = ()  # for the user, of the model

    @property
    def frame_bytes(self) -> list[int]:
        """Most bytes that the frame of each bucket can take, payload included."""
        return self._frames(padded(self.compressor.max_nbytes(bucket.numel)) for bucket in self.layout.buckets)

    def frames(self, config: Config) -> list[int]:
        """The same where it is sent: workers that write the model themselves send none."""
        return self.frame_bytes if config.writers == "server" else self._frames(0 for _ in self.layout.buckets)

    def _frames(self, payloads: Iterable[int]) -> list[int]:
        statistics = sum(4 * buffer.numel() for buffer in statistics_of(self.model))
        sizes = [HEADER_BYTES + nbytes for nbytes in payloads]
        sizes[0] += padded(statistics) + 8 * 4
        return sizes

    def vectors(self, config: Config) -> list[int]:
        """Bytes of each bucket where what is sent is the gradient itself, in several; none where it is not."""
        several = self.is_gradient(config) and len(self.layout.buckets) > 1
        return [4 * bucket.numel for bucket in self.layout.buckets] if several else []

    def is_gradient(self, config: Config) -> bool:
        """Whether a push, in however many pieces, is sent from where the gradient lies."""
        return isinstance(self.compressor, Identity) and not config.update.pipeline and config.writers == "server"

    def copied(self, seed: int) -> Parts:
        """The same with a model of its own. seed: that the model was made with."""
        return self._replace(model=copy_model(self.task, self.model, seed))

    @property
    def in_place(self) -> bool:
        """Whether a push is the gradient itself, in one piece."""
        return isinstance(self.compressor, Identity) and len(self.layout.buckets) == 1


def make_parts(config: Config, workers: int) -> Parts:
    """Build task, model and layout; auto buckets are whole here. Raises ConfigError where they do not fit together."""
    policy = config.policy.build()
    needed = policy.workers_needed()
    if needed > workers:
        raise ConfigError(f"{config.policy.text()} needs {needed} workers, got {workers}", key="policy")
    task = config.task.build()
    try:
        task.prepare()
    except ConfigError as error:
        raise error.within("task") from None
    model, notes = make_model(task, config)
    buckets = "whole" if config.buckets == "auto" else config.buckets
    if policy.layerwise and buckets == "whole":  # which would leave it nothing to choose
        buckets = "layer"
    layout = Layout(model, buckets)
    return Parts(task, model, layout, config.compressor.plugin.build(), notes)


def make_server(
    config: Config,
    parts: Parts,
    workers: int,
    tracker: Tracker,
    log: Callable[[Told], None],
    *,
    background: bool,
    x: Tensor | None = None,
    copies: Mapping[int, Tensor] | None = None,
    distances: Mapping[int, np.ndarray] | None = None,
    sharing: SharedStepMemory | None = None,
    readers: Readers | None = None,
    keeps_versions: bool = False,
    measures: BoundFacts | None = None,
) -> tuple[Server, Evaluator]:
    """The server, with the model's parameters living in its flat vector; and the evaluator it submits to.

    x: zeros (d,) to be that vector, where the transport has memory for it. copies: where each worker leaves the copy
    of it that it used (d,), with `views: torn`; distances: where each leaves those that it measured, with `writers:
    workers`. Raises ConfigError for `views: torn` without either. sharing: with the workers that make a part of a step.
    readers: of the model where it lies. keeps_versions: the models given are kept even where nobody measures them.
    """
    if copies is None and distances is None:
        refuse_alone(config)
    layout = parts.layout
    train = config.train
    evaluator = Evaluator(
        parts.task, parts.model, layout, train.evaluate_every_samples, background=background, seed=config.seed
    )
    x = layout.empty() if x is None else x
    layout.attach(parts.model, x)
    policy = config.policy.build()
    compressors = _fresh(parts.compressor, layout.buckets, config.seed, 0)
    keeps = keeps_versions or config.tracker.discrepancy == "exact" or policy.jobs > 1 or policy.layerwise

    def store(part: Layout, buckets: slice) -> Store:
        own = layout.buckets[buckets]
        x_part = x[own[0].start : own[-1].stop]
        if distances is not None:
            return WrittenStore(part, x_part, distances)
        optimizer = FlatOptimizer(config.optimizer, part, x_part, sharing.moments if sharing else ())
        return ParameterStore(
            part, x_part, optimizer, compressors[buckets], keeps_versions=keeps, copies=copies,
            before_change=readers.flush if readers else None,
            begin_step=readers.begin_step if readers and not policy.layerwise else None,
            crew=sharing.leader(optimizer) if sharing else None,
        )  # fmt: skip

    return assemble_server(
        config, layout, workers, tracker, log, store, x=x, evaluator=evaluator, measures=measures
    ), evaluator


def assemble_server(
    config: Config,
    layout: Layout,
    workers: int,
    tracker: Tracker,
    log: Callable[[Told], None],
    make_store: Callable[[Layout, slice], Store],
    *,
    x: Tensor | None = None,
    join: Callable[[Sequence[Any]], Any] | None = None,
    evaluator: Evaluator | None = None,
    measures: BoundFacts | None = None,
) -> Server:
    """The server around stores of any kind: one that `make_store` makes of the whole model, or one for each bucket.

    make_store: of the part of `layout` that is in so many of its buckets. join: the model of its parts.
    """
    train, joined = config.train, None
    if config.policy.build().layerwise:
        stores = [make_store(part, slice(i, i + 1)) for i, part in enumerate(layout.parts())]
        joined = JoinedModel(layout, x, stores, join)
    else:
        stores = [make_store(layout, slice(0, len(layout.buckets)))]
    policies = [config.policy.build() for _ in stores]
    rates = step_sizes(config.optimizer, config.schedule, train.samples)
    return Server(
        policies, stores, workers, rates, train.samples, tracker, log, joined=joined, evaluator=evaluator,
        discrepancy=config.tracker.discrepancy, target=train.target, units=config.update.plugin.build().units,
        pipeline=config.update.pipeline, measures=measures,
    )  # fmt: skip


def make_worker(
    config: Config,
    parts: Parts,
    rank: int,
    workers: int,
    tracker: Tracker,
    memory: Memory | None = None,
    local: int = 0,
    flat: FlatModule | None = None,
    clock: Callable[[], float] = time.perf_counter,
    shared_model: SharedModel | None = None,
) -> Worker:
    """Worker `rank` of 1..workers, the `local`-th rank on its host (0 is the first). memory: for its model and gradient
    on the CPU. flat: shared with others, instead. shared_model: where it writes itself."""
    task, layout, update = parts.task, parts.layout, config.update.plugin.build()
    coders = working_copies(config, parts.compressor, layout.buckets, rank)
    if flat is None:
        device = choose_device(config.device, local)
        as_made = shared_model is not None and takes_as_made(task, update, coders, config.optimizer.clip_norm)
        memory = memory if device.type == "cpu" else None
        flat = FlatModule(parts.model.to(device), layout, memory, runs_of(layout) if as_made else ())
    try:
        batches = task.batches(rank, workers, config.seed)
    except ConfigError as error:
        raise error.within("task") from None
    outlet, discrepancy = None, config.tracker.discrepancy
    if shared_model is not None:  # which measures, as its worker cannot
        measures, discrepancy = discrepancy == "exact", "off"
        outlet = IntoModel(shared_model, flat, list(map(plain, coders)), config.update.pipeline, measures=measures)
    source = GradientSource(
        rank, task, flat, batches, update, seed=config.seed, accumulate=config.update.accumulate,
        clip_norm=config.optimizer.clip_norm, autocast=config.train.autocast, clock=clock,
    )  # fmt: skip
    return Worker(
        source, coders, tracker, on_nonfinite=config.train.on_nonfinite, discrepancy=discrepancy, outlet=outlet,
        layerwise=config.policy.build().layerwise, pipeline=config.update.pipeline,
    )  # fmt: skip


def shared_workers(
    config: Config, parts: Parts, workers: int, clock: Callable[[], float] = time.perf_counter
) -> Callable[[int, Tracker], Worker]:
    """What makes worker `rank` of 1..workers with its tracker, for workers that take turns: all of them compute in one
    module, a copy of that of `parts`, which is the server's."""
    shared = parts.copied(config.seed)
    shared.model.to(choose_device(config.device, 0))
    memory = Memory(parts.layout.empty(), parts.layout.empty(), ModelLives.SHARED)
    flat = FlatModule(shared.model, parts.layout, memory)
    return lambda rank, tracker: make_worker(config, shared, rank, workers, tracker, flat=flat, clock=clock)


def reads_in_place(config: Config) -> bool:
    """Whether workers that share memory with the server can compute on its model itself.

    So they can where no step comes before the last push, and nothing that they do changes the model.
    """
    update = config.update
    lockstep = config.policy.build().lockstep and config.views == "exact"
    return lockstep and not update.plugin.build().moves and not update.pipeline and config.computes_on_cpu


def compares(config: Config) -> bool:
    """Whether a worker with memory of its own compares the model of each reply with that which it computed on."""
    return config.tracker.discrepancy == "exact" and not config.update.pipeline and config.writers == "server"


def shares_steps(config: Config, parts: Parts) -> bool:
    """Whether workers that share memory with the server, and wait for it, can make a part of its step.

    So they can where the model is changed by the server alone, from payloads as they are.
    """
    usual = config.views == "exact" and not config.update.pipeline and not config.policy.build().layerwise
    return usual and parts.in_place


def choose_device(name: str, local: int) -> torch.device:
    """The device of the `local`-th rank of a host: GPUs are dealt out in turn. Raises PlatformError without one."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise PlatformError("device: cuda, but torch finds no GPU here")
    return torch.device("cuda", local % torch.cuda.device_count())


def working_copies(
    config: Config, compressor: Compressor, buckets: Sequence[Bucket], rank: int
) -> list[Compressor | ErrorFeedback]:
    """What worker `rank` encodes each bucket with."""
    copies = _fresh(compressor, buckets, config.seed, rank)
    feedback = config.compressor.error_feedback
    if not (compressor.biased if feedback == "auto" else feedback):
        return list(copies)
    return [ErrorFeedback(copy, bucket.numel) for copy, bucket in zip(copies, buckets, strict=True)]


def _fresh(compressor: Compressor, buckets: Sequence[Bucket], seed: int, rank: int) -> list[Compressor]:
    return [
        compressor.fresh(bucket.numel, torch.Generator().manual_seed(draw_seed(seed, rank, i)))
        for i, bucket in enumerate(buckets)
    ]
