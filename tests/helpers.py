"""What several test files share: tiny tasks, rules for tests alone, runs in one process, a server played by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ps_elastic import train
from ps_elastic.analysis.replay.decisions import replay_decisions
from ps_elastic.compressors import Compressor
from ps_elastic.compressors.identity import Identity
from ps_elastic.config.load import load
from ps_elastic.config.schema import Config
from ps_elastic.config.sections import Optimizer
from ps_elastic.policies import Policy
from ps_elastic.policies.events import Action, Drop, Measure, Push, Release, Step, lines_of
from ps_elastic.policies.ledger import Ledger
from ps_elastic.records.tracker import Tracker
from ps_elastic.server.layers import JoinedModel
from ps_elastic.server.optimizer import FlatOptimizer
from ps_elastic.server.server import Server
from ps_elastic.server.store import ParameterStore
from ps_elastic.tasks import Task, seeded
from ps_elastic.transport.messages import Message, PushMessage, Reply
from ps_elastic.vectors.layout import Layout

# ---- tasks, named `helpers:Name` in a configuration


@dataclass
class Blobs(Task):
    """Three Gaussian clouds and a perceptron; drawn anew for every batch, the same for the same worker."""

    batch_size: int = 4
    shape: ClassVar[tuple[int, ...]] = (6,)

    def model(self, seed: int) -> nn.Module:
        with seeded(seed):
            return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))

    def batches(self, worker: int, workers: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 * seed + worker)
        while True:
            yield self.draw(generator, self.batch_size)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        inputs, labels = self.draw(torch.Generator().manual_seed(1), 60)
        scores = model(inputs)
        right = float((scores.argmax(dim=1) == labels).float().mean())
        return {"loss": float(nn.functional.cross_entropy(scores, labels)), "accuracy": right}

    def draw(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(3, (count,), generator=generator)
        inputs = torch.randn(count, *self.shape, generator=generator)
        inputs.view(count, -1)[torch.arange(count), labels] += 2
        return inputs, labels


@dataclass
class Images(Blobs):
    """A small convolutional network with BatchNorm."""

    shape: ClassVar[tuple[int, ...]] = (2, 6, 6)

    def model(self, seed: int) -> nn.Module:
        with seeded(seed):
            return nn.Sequential(
                nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 7, bias=False),
                nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3),
            )  # fmt: skip


class OddModel(nn.Module):
    """A frozen, an unused and a tied layer, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 9)
        self.frozen.weight.requires_grad = False
        self.twice = nn.Linear(9, 9)
        self.again = nn.Linear(9, 9, bias=False)
        self.again.weight = self.twice.weight
        self.unused = nn.Linear(3, 2)
        self.out = nn.Linear(9, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.again(torch.tanh(self.twice(self.frozen(x)))))) * self.scale


@dataclass
class Odd(Blobs):
    def model(self, seed: int) -> nn.Module:
        with seeded(seed):
            return OddModel()


@dataclass
class Dropout(Blobs):
    def model(self, seed: int) -> nn.Module:
        with seeded(seed):
            return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.5), nn.Linear(9, 3))


class Point(nn.Module):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x)


@dataclass
class Slope(Task):
    """A loss whose gradient is the same everywhere."""

    batch_size: int = 1
    gradient: tuple[float, ...] = (3.0, 4.0)
    start: float = 0.0

    def model(self, seed: int) -> nn.Module:
        return Point(torch.full((len(self.gradient),), self.start))

    def batches(self, worker: int, workers: int, seed: int) -> Iterator[Tensor]:
        while True:
            yield torch.tensor(self.gradient)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return batch @ model.get_parameter("x")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(torch.tensor(self.gradient) @ model.get_parameter("x"))}


@dataclass
class Poisoned(Slope):
    """Batches of worker 2 are not finite where their number, from 1, is listed."""

    bad: tuple[int, ...] = ()
    value: float = 0.0  # what a bad batch is divided by: 0 makes it infinite

    def batches(self, worker: int, workers: int, seed: int) -> Iterator[Tensor]:
        for number, batch in enumerate(super().batches(worker, workers, seed), 1):
            yield batch / self.value if worker == 2 and number in self.bad else batch


@dataclass
class Ledgered(Slope):
    """Gradients of norm 1, so that the norm of a push says how many of them it carries."""

    gradient: tuple[float, ...] = (1.0,)


# ---- rules


@dataclass
class Ahead(Policy):
    """Let every worker go on at once; use what is held when `need` pushes are, and drop those of worker `scorned`."""

    need: int = 4
    scorned: int = 0

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        yield Release((push.id.worker,))
        if len(ledger.held) >= self.need:
            used = [id for id in ledger.held if id.worker != self.scorned]
            for id in [id for id in ledger.held if id.worker == self.scorned]:
                yield Drop(id, "scorned")
            if used:
                yield Step.mean(used)


@dataclass
class Surveyor(Policy):
    """Asynchronous, and asks for the distance of every other view after each step."""

    seen: list[float] = field(init=False, default_factory=list)

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        yield Step.mean([push.id], share=1 / len(ledger.workers))
        others = tuple(ledger.views)
        if others:
            yield Measure(others)
            self.seen += [ledger.travelled - ledger.views[view].travelled for view in others]
        yield Release((push.id.worker,))


@dataclass
class Dealer(Policy):
    """Use every push at once, and hand the job out to the next worker in turn, which may be busy."""

    jobs: ClassVar[int] = 3
    count: int = field(init=False, default=0)

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        yield Step.mean([push.id], share=1 / len(ledger.workers))
        workers = [w for w, member in ledger.workers.items() if member.assigned - member.seen < self.jobs]
        idle = [w for w in workers if w in ledger.waiting]
        self.count += 1
        yield Release((idle[0] if len(idle) > 1 else workers[self.count % len(workers)],))


@dataclass
class LayersAtOnce(Policy):
    """Every layer is used as it comes, and its worker let go by it: each has its own version and pace."""

    layerwise: ClassVar[bool] = True

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        yield Step.mean([push.id])
        yield Release((push.id.worker,))


@dataclass
class QueuedLayers(LayersAtOnce):
    jobs: ClassVar[int] = 2


# ---- runs


@dataclass(frozen=True)
class Run:
    """A finished run; `lines(rank, event)` reads its metrics."""

    directory: Path
    summary: dict[str, Any]

    @property
    def config(self) -> Config:
        return load(self.directory / "config.yaml")

    @property
    def events(self) -> list[str]:
        return (self.directory / "events.jsonl").read_text().splitlines()

    def lines(self, rank: int, event: str) -> list[dict[str, Any]]:
        text = (self.directory / "metrics" / f"rank-{rank:03d}.jsonl").read_text()
        return [line for line in map(json.loads, text.splitlines()) if line["event"] == event]

    def column(self, name: str, rank: int = 0, event: str = "used") -> list[Any]:
        return [line[name] for line in self.lines(rank, event)]


def fit(
    folder: Path, source: str | Mapping[str, Any], *overrides: str, workers: int = 3, samples: int | None = None
) -> Run:
    """Train in this process; the decisions of every run made here are replayed and must be the same."""
    config = {"task": source} if isinstance(source, str) else source
    if samples is not None:
        overrides = (*overrides, f"train.samples={samples}")
    directory = folder / f"run-{len(list(folder.iterdir()))}"
    summary = train(config, overrides, workers=workers, run_dir=directory)
    assert summary is not None
    run = Run(directory, summary)
    replayed = replay_decisions(
        run.config.policy.build(), run.events, range(1, workers + 1), pipeline=run.config.update.pipeline
    )
    assert replayed.match, replayed.first_mismatch
    return run


# ---- a server played by hand


class Desk:
    """A server and `workers` workers that push what a test says, on a model of `size` floats that starts at zero."""

    def __init__(
        self,
        policy: Policy,
        workers: int = 2,
        size: int = 64,
        *,
        optimizer: Optimizer | None = None,
        compressor: Compressor | None = None,
        alpha: Callable[[int], float] | None = None,
        budget: int = 10**9,
        discrepancy: str = "exact",
        buckets: str | int = "whole",
        model: nn.Module | None = None,
        **more: Any,
    ) -> None:
        settings = optimizer or Optimizer(lr=0.5)
        self.model = model or Point(torch.zeros(size))
        self.layout = Layout(self.model, buckets)
        self.x = self.layout.empty()
        self.layout.attach(self.model, self.x)
        self.notes: list[dict[str, Any]] = []
        self.log: list[str] = []
        self.compressors = [(compressor or Identity()).fresh(b.numel, torch.Generator()) for b in self.layout.buckets]
        keeps = discrepancy == "exact" or policy.jobs > 1
        store = ParameterStore(
            self.layout, self.x, FlatOptimizer(settings, self.layout, self.x), self.compressors, keeps_versions=keeps
        )
        self.server = Server(
            [policy], [store], workers, alpha or (lambda samples: settings.lr), budget,
            Tracker(0, lambda line: self.notes.append(json.loads(line))),
            lambda told: self.log.extend(lines_of([told])),
            discrepancy=discrepancy, **more,
        )  # fmt: skip
        self.now = 0.0
        self.views: dict[int, Reply] = {}  # the last reply of each worker
        self.take(self.server.start(0.0))

    def take(self, replies: Iterable[tuple[int, Reply]]) -> dict[int, Reply]:
        """Carry replies out: as a transport does, each model is copied at once."""
        taken = {}
        for worker, reply in replies:
            model = None if reply.model is None else reply.model.copy()
            taken[worker] = self.views[worker] = reply._replace(model=model)
        return taken

    def send(self, message: Message) -> dict[int, Reply]:
        self.now += 1
        return self.take(self.server.receive(message, self.now))

    def push(self, worker: int, vector: float | Tensor = 1.0, **header: Any) -> dict[int, Reply]:
        """The next push of `worker`, in one bucket: `vector`, or as many entries of a number; returns the replies."""
        return self.send(self.message(worker, vector, **header))

    def message(self, worker: int, vector: float | Tensor = 1.0, **header: Any) -> PushMessage:
        dense = torch.full((self.layout.size,), vector) if isinstance(vector, float) else vector
        payload = self.compressors[0].encode(dense)
        view = self.views[worker]
        norm = float(dense.norm())
        message = PushMessage(
            worker, view.step + 1, view.version, tuple(array.numpy() for array in payload), samples=1, norm=norm,
            payload_norm=norm,
        )  # fmt: skip
        return message._replace(**header)

    def told(self, event: str) -> list[dict[str, Any]]:
        return [note for note in self.notes if note["event"] == event]


class Layered(nn.Module):
    """As many parameters of 64 floats as there are layers, zeros."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList([nn.Parameter(torch.zeros(64)) for _ in range(layers)])


class LayerDesk:
    """As `Desk`, of a layerwise rule: a number for each layer that a worker pushes."""

    def __init__(
        self, make: Callable[[], Policy], workers: int = 2, layers: int = 3, *, lr: float = 0.5,
        budget: int = 10**9, compressor: Compressor | None = None, momentum: float = 0.0,
    ) -> None:  # fmt: skip
        self.layout = Layout(Layered(layers), "layer")
        self.x = self.layout.empty()
        self.notes: list[dict[str, Any]] = []
        self.log: list[str] = []
        self.coder = compressor or Identity()
        settings = Optimizer(lr=lr, momentum=momentum)
        parts = []
        for part, bucket in zip(self.layout.parts(), self.layout.buckets, strict=True):
            x = self.x[bucket.start : bucket.stop]
            coder = self.coder.fresh(bucket.numel, torch.Generator())
            parts.append(ParameterStore(part, x, FlatOptimizer(settings, part, x), [coder]))
        self.server = Server(
            [make() for _ in range(layers)], parts, workers, lambda samples: lr, budget,
            Tracker(0, lambda line: self.notes.append(json.loads(line))),
            lambda told: self.log.extend(lines_of([told])),
            joined=JoinedModel(self.layout, self.x, parts),
        )  # fmt: skip
        self.now = 0.0
        self.views: dict[int, Reply] = {}  # the last reply of each worker
        self.take(self.server.start(0.0))

    @property
    def model(self) -> list[float]:
        """The first entry of each layer."""
        return self.x[:: self.layout.parts()[0].size].tolist()

    def take(self, replies: Iterable[tuple[int, Reply]]) -> dict[int, Reply]:
        """Carry replies out: as a transport does, each model is copied at once."""
        taken = {}
        for worker, reply in replies:
            model = None if reply.model is None else reply.model.copy()
            taken[worker] = self.views[worker] = reply._replace(model=model)
        return taken

    def send(self, message: Message) -> dict[int, Reply]:
        return self.take(self.server.receive(message, self.now))

    def bucket(self, worker: int, bucket: int, value: float | None = 1.0, **header: Any) -> dict[int, Reply]:
        """One bucket of the next push of `worker`; None: it was cut off before it."""
        return self.send(self.message(worker, bucket, value)._replace(**header))

    def message(self, worker: int, bucket: int, value: float | None) -> PushMessage:
        view, arrays = self.views[worker], ()
        dense = torch.full((64,), value or 0.0)
        if value is not None:
            arrays = tuple([array.numpy() for array in self.coder.encode(dense)])
        norm = float(dense.norm())
        return PushMessage(
            worker, view.step + 1, view.layers[bucket].version, arrays, bucket, len(view.layers), samples=3, norm=norm,
            payload_norm=norm,
        )  # fmt: skip

    def push(self, worker: int, *values: float | None) -> dict[int, Reply]:
        """All buckets of the next push, the last layer first; returns the replies."""
        messages = [self.message(worker, i, value) for i, value in enumerate(values)]
        replies: dict[int, Reply] = {}
        for message in reversed(messages):
            replies |= self.send(message)
        return replies

    def tick(self, now: float) -> dict[int, Reply]:
        self.now = now
        return self.take(self.server.tick(now))

    def told(self, event: str) -> list[dict[str, Any]]:
        return [note for note in self.notes if note["event"] == event]


def flat(model: nn.Module) -> np.ndarray:
    """All parameters of `model` one after the other, (d,) float32."""
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
