"""A recorded run, trained again in the recorded order of events: the same pushes, actions and parameters, bit for bit.

The record says who pushed when, and the rest follows: what a worker computes depends on its seed, its batches and the
replies that it got, and what the server replies on the pushes so far. So the same Server and Workers are fed the
recorded events in turn, and each line that the server logs must be the line recorded. Evaluations change nothing and
are left out; a run that one of them ended has a recorded Done.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from ps_elastic.analysis.replay.decisions import Mismatch, Replay
from ps_elastic.config.schema import Config
from ps_elastic.errors import ConfigError, PolicyError, Stalled, TaskError, WireError
from ps_elastic.policies.events import Applied, Asked, Done, Joined, Left, Push, PushId, ReplyId, Woke, lines_of
from ps_elastic.records.reader import RecordedEvent, read_line
from ps_elastic.records.tracker import Tracker
from ps_elastic.runtime.build import make_parts, make_server, shared_workers
from ps_elastic.transport.messages import Ask, PushMessage, Reply
from ps_elastic.vectors import kernels
from ps_elastic.vectors.norms import quiet
from ps_elastic.worker.worker import Worker


class Recomputed(NamedTuple):
    """`replay` ends at the first line that came out otherwise; then there are no parameters to tell of."""

    replay: Replay
    parameters_sha256: str | None


def recompute(
    config: Config, lines: Iterable[str], workers: int, *, server_threads: int, source: str, whole: bool = True
) -> Recomputed:
    """Train again what `lines`, of events.jsonl, tell of.

    workers: at the start. server_threads: that the server computed on. whole: the run did not go on after `lines`.
    Raises ConfigError naming the line if the record is damaged, and what the user's own code raises.
    """
    run = _Run(config, workers, server_threads)
    if run.cuts:
        lines = list(lines)
        run.note_buckets(lines, source)
    events = actions = 0
    ended: str | None = None

    def differs(recorded: str, replayed: str, error: str | None) -> Recomputed:
        return Recomputed(Replay(events, actions, False, Mismatch(events, recorded, replayed, error)), None)

    for line in lines:
        events += 1
        if ended is not None:
            return differs(line, "", ended)
        told = read_line(line, f"{source}:{events}", first=events == 1)
        if not run.logged:
            ended = _fed(run, told, f"{source}:{events}")
        replayed = run.logged.popleft() if run.logged else ""
        actions += told.actions
        if replayed != line:
            return differs(line, replayed, ended)
    if not events:
        raise ConfigError("no events are recorded here", source=source)
    if whole and run.logged:
        events += 1
        return differs("", run.logged[0], None)
    return Recomputed(Replay(events, actions, True, None), run.parameters_sha256())


def _fed(run: _Run, told: RecordedEvent, where: str) -> str | None:
    """Feed one event to the server; return why the run could not continue, if it could not."""
    try:
        run.feed(told)
    except (PolicyError, Stalled, TaskError) as error:
        return f"{type(error).__name__}: {error}"
    except WireError as error:
        raise ConfigError(f"{error}; is the record damaged, or of other workers?", source=where) from error
    return None


class _Run:
    """One server and its workers in this process; they do what is recorded, when it is recorded.

    The workers take turns: each takes its reply in when its push is due, on the copy that the server keeps.
    """

    def __init__(self, config: Config, workers: int, server_threads: int) -> None:
        self.logged: deque[str] = deque()  # by the server, not yet compared
        train = dataclasses.replace(config.train, evaluate_every_samples=None, stop_at=None)
        self._config = dataclasses.replace(config, train=train)
        self._threads, self._server_threads = config.threads, server_threads
        compute_on(self._threads)
        self._parts = make_parts(self._config, workers)
        self._shared_worker = shared_workers(self._config, self._parts, workers + config.faults.check(workers))
        self._workers = {rank: self._make_worker(rank) for rank in range(1, workers + 1)}
        self._replies: dict[int, Reply] = {}  # of workers that compute
        self._mail: dict[int, list[Reply]] = {}  # with `update.pipeline`: what workers have not taken in
        self._server, _ = make_server(
            self._config, self._parts, workers, Tracker(0, _discard),
            lambda told: self.logged.extend(lines_of([told])), background=False, keeps_versions=True,
        )  # fmt: skip
        self.cuts = self._config.update.plugin.build().cut_s is not None
        if self.cuts and self._config.faults.lost_push:
            raise ConfigError("pushes were cut off and pushes were lost: the record does not tell which", key="faults")
        self._came: set[tuple[PushId, int]] = set()  # buckets, where a push may have been cut off
        self._made: dict[int, dict[int, PushMessage]] = {}  # worker -> buckets of its push that are not fed yet

    def note_buckets(self, lines: Iterable[str], source: str) -> None:
        """Which buckets came: the others of their pushes were cut off."""
        for number, line in enumerate(lines, 1):
            told = read_line(line, f"{source}:{number}", first=number == 1)
            if isinstance(told.event, Push) and told.bucket is not None and not told.ignored:
                self._came.add((told.event.id, told.bucket))

    def feed(self, told: RecordedEvent) -> None:
        """Let one recorded event happen. What was due by the clock is an event of its own."""
        event, now, server = told.event, told.t_s, self._server
        match event:
            case Applied():
                self._deliver(server.start(now))
            case Push():
                for message in self._told(event, told):
                    self._deliver(server.take(message, now))
            case Asked(worker, step) if self._is_cut(PushId(worker, step), told.bucket):
                for message in self._messages(PushId(worker, step), told.bucket):
                    self._deliver(server.take(message, now))
            case Asked(worker, step):
                if worker in self._replies and self._workers[worker].step < step:
                    self._push(worker)  # it was computed, and lost on its way
                self._deliver(server.take(Ask(worker, step), now))
            case Joined(worker):
                self._deliver(server.join(worker, now))
                self._workers[worker] = self._make_worker(worker)
                self._workers[worker].step = server.ledger.workers[worker].seen
                self._replies.pop(worker, None)
                self._mail.pop(worker, None)
            case Left(worker):
                self._deliver(server.leave(worker, now))
            case Woke():
                self._deliver(server.tick(now))
            case Done():
                self._deliver(server.stop(now))

    def parameters_sha256(self) -> str:
        return self._parts.layout.sha256(self._parts.model)

    def _make_worker(self, rank: int) -> Worker:
        return self._shared_worker(rank, Tracker(rank, _discard))

    def _told(self, push: Push, told: RecordedEvent) -> list[PushMessage]:
        """What a recorded line of a push stands for."""
        if told.ignored:
            return [_header(push, told.bucket)]
        if self._config.update.pipeline:
            return self._push_ahead(push.id.worker, push.id.step - 1 - push.ahead)
        return self._messages(push.id, told.bucket)

    def _push_ahead(self, rank: int, told: int) -> list[PushMessage]:
        """With `update.pipeline`, the next push of a worker that has taken in the replies up to that to step `told`."""
        worker, mail = self._workers[rank], self._mail.get(rank, [])
        if told > max(worker.told, *(reply.step for reply in mail), -1):
            raise WireError(f"worker {rank} pushes after a reply to its step {told}, and there is none")
        view = self._server.store.view(ReplyId(rank, told))
        compute_on(self._threads)
        while mail and mail[0].step <= told:
            worker.load(mail.pop(0)._replace(model=view))
        worker.resume(view)
        return _pushed(worker)

    def _push(self, rank: int) -> list[PushMessage]:
        """The next push of a worker; without a reply to continue from it has none."""
        worker, reply = self._workers[rank], self._replies.pop(rank, None)
        if reply is None:
            raise WireError(f"worker {rank} pushes after step {worker.step}, and was not released")
        view = self._server.store.view(PushId(rank, reply.step + 1))
        compute_on(self._threads)
        worker.load(reply._replace(model=view))
        push, buckets = PushId(rank, reply.step + 1), range(len(self._parts.layout.buckets))
        return _pushed(worker, cut={i for i in buckets if (push, i) not in self._came} if self.cuts else ())

    def _messages(self, push: PushId, bucket: int | None) -> list[PushMessage]:
        """What was recorded of a push by one line: all of it, or the bucket of that line."""
        if bucket is None:
            return self._push(push.worker)
        if self._workers[push.worker].step < push.step:
            self._made[push.worker] = {message.bucket: message for message in self._push(push.worker)}
        if (message := self._made.get(push.worker, {}).pop(bucket, None)) is None:
            raise WireError(f"bucket {bucket} of push {tuple(push)} comes twice")
        return [message]

    def _is_cut(self, push: PushId, bucket: int | None) -> bool:
        """Whether this Asked is the bucket of a push that was cut off before it, and not a question."""
        if bucket is None or not self.cuts or (push, bucket) in self._came:
            return False
        due = self._workers[push.worker].step < push.step and push.worker in self._replies
        return due or bucket in self._made.get(push.worker, {})

    @quiet
    def _deliver(self, replies: Iterator[tuple[int, Reply]]) -> None:
        """Keep what a worker continues from; a second copy of a reply is not needed, and a stop ends nothing here."""
        compute_on(self._server_threads)
        for rank, reply in replies:
            if self._config.update.pipeline and reply.model is not None:
                self._mail.setdefault(rank, []).append(reply)
            waits = rank not in self._replies and self._workers[rank].step == reply.step
            if waits and reply.model is not None:
                self._replies[rank] = reply


def _pushed(worker: Worker, cut: Collection[int] = ()) -> list[PushMessage]:
    messages: list[PushMessage] = []
    worker.push(messages.append, cut=cut)
    return messages


def compute_on(threads: int) -> None:
    """Let torch use so many threads from here on: sums differ with them in the last bits."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def warnings(env: dict[str, Any]) -> Iterator[str]:
    """What may make other bits here than where the run was recorded, by its env.json."""
    here = {
        "processor": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "kernels": kernels.described(),
    }
    recorded = {**env["versions"], "processor": env.get("processor"), "kernels": env.get("kernels")}
    for name, found in here.items():
        if recorded.get(name) != found:
            yield (
                f"recorded with {name} {recorded.get(name)}, and this is {found}: equal parameters are promised for "
                "equal processors, thread counts and libraries only"
            )
    if env.get("cuda") or torch.cuda.is_available():
        yield "with a GPU, equal parameters are not promised: sums there are made in any order; `device: cpu` repeats"


def _header(push: Push, bucket: int | None) -> PushMessage:
    """A message with the metadata of a push that the server ignored: its payload is never looked at."""
    return PushMessage(
        push.id.worker, push.id.step, push.base, (np.zeros(push.nbytes, np.uint8),), bucket or 0, norm=push.norm,
        payload_norm=push.payload_norm, residual_norm=push.residual_norm, ahead=push.ahead,
    )  # fmt: skip


def _discard(line: str) -> None:
    """The metrics of this run were written when it was recorded."""
