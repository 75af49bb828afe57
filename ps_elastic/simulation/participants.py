"""Who takes part in a simulated run: a server and workers that compute, or those of a timing-only simulation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ps_elastic.config.schema import Config
from ps_elastic.errors import OK
from ps_elastic.records.tracker import Pages, Tracker
from ps_elastic.records.writer import RunWriter
from ps_elastic.runtime.build import Parts, assemble_server, make_server, shared_workers
from ps_elastic.runtime.summary import finish, summarise
from ps_elastic.server.evaluator import Evaluator
from ps_elastic.server.protocols import Store
from ps_elastic.server.server import Server
from ps_elastic.simulation.header_workers import HeaderWorker, LayerHeaderWorker, RecordedNorms, modelled
from ps_elastic.simulation.headers import HeaderStore, joined
from ps_elastic.simulation.nodes import Stopwatch, TurnTakingWorker, VirtualWorker
from ps_elastic.vectors.layout import Layout


class ComputingParticipants:
    """Server and workers that compute. All workers share one module and its memory, since they take turns."""

    def __init__(self, config: Config, parts: Parts, ranks: int) -> None:
        self._stopwatch = Stopwatch()
        self._config, self._parts = config, parts
        self._make_worker = shared_workers(config, parts, ranks, self._stopwatch)
        self._evaluator: Evaluator | None = None
        self._pages: list[Pages] = []
        self._directory = Path()
        self.copies: dict[int, Tensor] | None = None  # with inconsistent reads, what each worker read last (d,)
        if config.views == "torn":
            self.copies = {rank: parts.layout.empty() for rank in range(1, ranks + 1)}

    def server(self, workers: int, record: RunWriter) -> Server:
        self._directory = record.directory
        log = record.events().note
        made, self._evaluator = make_server(
            self._config, self._parts, workers, record.tracker, log, background=False, copies=self.copies,
            keeps_versions=True,  # a worker computes on a model that was sent long before
        )  # fmt: skip
        return made

    def worker(self, rank: int, server: Server) -> VirtualWorker:
        pages = Pages(self._directory / "metrics" / f"rank-{rank:03d}.jsonl")
        self._pages.append(pages)
        worker = self._make_worker(rank, Tracker(rank, pages.write))
        return TurnTakingWorker(worker, self._stopwatch, server.store.view)

    def finish(self, server: Server, record: RunWriter, now: float, wall_s: float, **more: Any) -> dict[str, Any]:
        assert self._evaluator is not None
        return finish(self._config, self._parts, server, self._evaluator, record, now, wall_s, **more)

    def close(self) -> None:
        if self._evaluator is not None:
            self._evaluator.close()
        for pages in self._pages:
            pages.flush()


class HeaderParticipants:
    """Server and workers of a timing-only simulation."""

    copies: None = None

    def __init__(self, config: Config, parts: Parts, norms: str | os.PathLike[str] | None) -> None:
        self._config, self._layout = config, parts.layout
        self._bucket_bytes = [parts.compressor.max_nbytes(bucket.numel) for bucket in parts.layout.buckets]
        steps = getattr(config.update.plugin.build(), "local_steps", 1)
        self._samples = parts.task.batch_size * config.update.accumulate * steps  # of a push
        self._norms = None if norms is None else RecordedNorms(os.fspath(norms))

    def server(self, workers: int, record: RunWriter) -> Server:
        config, coherence = self._config, self._config.simulation.norms.coherence

        def store(part: Layout, buckets: slice) -> Store:
            return HeaderStore(config.optimizer, part, coherence)

        log = record.events().note
        return assemble_server(config, self._layout, workers, record.tracker, log, store, join=joined)

    def worker(self, rank: int, server: Server) -> VirtualWorker:
        config, totals = self._config, server.totals
        model = config.simulation.norms
        headers = self._norms.of(rank) if self._norms else modelled(model, rank, config.seed, lambda: totals.samples)
        if config.policy.build().layerwise:
            return LayerHeaderWorker(rank, headers, self._layout, self._bucket_bytes, self._samples)
        return HeaderWorker(rank, headers, sum(self._bucket_bytes), self._samples)

    def finish(self, server: Server, record: RunWriter, now: float, wall_s: float, **more: Any) -> dict[str, Any]:
        summary = summarise(self._config, server, now, wall_s, OK, **more)
        return {**record.write_summary(summary), "run_dir": str(record.directory)}

    def close(self) -> None:
        """Nothing is open."""
