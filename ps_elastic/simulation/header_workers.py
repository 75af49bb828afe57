"""Workers of a timing-only simulation: their pushes are metadata, with norms that are made up or were recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from random import Random
from typing import Any

from ps_elastic.config.sections import Norms
from ps_elastic.errors import ConfigError
from ps_elastic.policies.events import ReplyId
from ps_elastic.simulation.costs import generator
from ps_elastic.simulation.headers import Weight
from ps_elastic.simulation.nodes import Taken
from ps_elastic.transport.messages import PushMessage, Reply
from ps_elastic.vectors.layout import Layout

Headers = tuple[float, float, float]  # of a push: norm, payload_norm, residual_norm


class HeaderWorker:
    """A worker that pushes metadata. headers: norms of each push in turn; nbytes: of its payload; samples: of it."""

    def __init__(self, rank: int, headers: Iterator[Headers], nbytes: int, samples: int) -> None:
        self.rank, self.step, self._samples = rank, 0, samples
        self._headers, self._arrays = headers, (Weight(nbytes),)
        self._waited_s = 0.0
        self._reply: Reply | None = None  # the last one, where it may run ahead

    def compute(
        self, reply: Reply, arrived: float, now: float, wait_s: float, cut: Collection[int] = ()
    ) -> list[PushMessage]:
        self.step = reply.step + 1
        self._waited_s += wait_s
        norm, payload_norm, residual_norm = next(self._headers)
        return [
            PushMessage(
                self.rank, self.step, reply.version, self._arrays, 0, 1, self._samples, math.nan, norm, payload_norm,
                residual_norm, self._waited_s,
            )
        ]  # fmt: skip

    def go_on(self, replies: Sequence[Taken], given: ReplyId, began: float, now: float) -> list[PushMessage]:
        for reply, _, wait_s in replies:
            self._reply, self._waited_s = reply, self._waited_s + wait_s
        assert self._reply is not None, "nobody goes on without a first reply"
        self.step = max(self.step, self._reply.step)
        (push,) = self.compute(self._reply._replace(step=self.step), began, now, 0.0)
        return [push._replace(ahead=self.step - 1 - self._reply.step)]

    def stop(self, reply: Reply, arrived: float, wait_s: float) -> None:
        self._waited_s += wait_s


class LayerHeaderWorker(HeaderWorker):
    """As `HeaderWorker`, with a push for each bucket of `layout`: the squares of norms go by parameters."""

    def __init__(
        self, rank: int, headers: Iterator[Headers], layout: Layout, nbytes: Sequence[int], samples: int
    ) -> None:
        super().__init__(rank, headers, 0, samples)
        self._weights = [Weight(n) for n in nbytes]
        self._parts = [math.sqrt(part.numel / layout.numel) for part in layout.parts()]

    def compute(
        self, reply: Reply, arrived: float, now: float, wait_s: float, cut: Collection[int] = ()
    ) -> list[PushMessage]:
        (whole,) = super().compute(reply, arrived, now, wait_s)
        return [
            whole._replace(
                base=reply.layers[i].version,
                arrays=() if i in cut else (self._weights[i],),
                bucket=i,
                buckets=len(self._parts),
                norm=part * whole.norm,
                payload_norm=part * whole.payload_norm,
                residual_norm=part * whole.residual_norm,
            )
            for i, part in reversed(list(enumerate(self._parts)))
        ]


def modelled(settings: Norms, worker: int, seed: int, samples: Callable[[], int]) -> Iterator[Headers]:
    """Norms by the model of `settings`; samples(): used so far. Nothing is compressed away."""
    if not settings.spread and settings.half_life_samples is None:
        return repeat((settings.initial, settings.initial, 0.0))
    return _drawn(settings, generator(seed, "norms", worker), samples)


def _drawn(settings: Norms, random: Random, samples: Callable[[], int]) -> Iterator[Headers]:
    while True:
        noise = math.exp(random.gauss(0.0, settings.spread)) if settings.spread else 1.0
        norm = settings.at(samples()) * noise
        yield norm, norm, 0.0


class RecordedNorms:
    """The norms of the pushes of a recorded run. Raises ConfigError if there are none that can be read."""

    def __init__(self, run: str) -> None:
        path = Path(run) / "events.jsonl"
        self._by_worker: dict[int, list[Headers]] = {}
        number = 0
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                number += 1
                self._take(json.loads(line))
        except OSError as error:
            raise ConfigError(f"cannot read it: {error.strerror}", key="--norms", source=str(path)) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"line {number} is no event: {error}", key="--norms", source=str(path)) from None
        if not self._by_worker:
            raise ConfigError("no pushes are recorded here", key="--norms", source=str(path))

    def of(self, worker: int) -> Iterator[Headers]:
        """Worker i repeats what the recorded worker ((i - 1) mod p) + 1 had; the runs need not be of one length."""
        ranks = sorted(self._by_worker)
        series = self._by_worker[ranks[(worker - 1) % len(ranks)]]
        while True:
            yield from series

    def _take(self, record: dict[str, Any]) -> None:
        if record["event"] == "push":
            norms = float(record["norm"]), float(record["payload_norm"]), float(record["residual_norm"])
            self._by_worker.setdefault(record["worker"], []).append(norms)
