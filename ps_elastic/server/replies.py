"""What workers are answered: what became of their pushes, and the model to go on with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ps_elastic.server.layers import JoinedModel
from ps_elastic.server.outcomes import HELD, Outcome, of_parts
from ps_elastic.server.protocols import LedgerView
from ps_elastic.server.run import Run
from ps_elastic.server.shard import Shard
from ps_elastic.transport.messages import MOST_SETTLED, Layer, Reply, Settled


class Answer(NamedTuple):
    """What a worker was last told, in case it asks again. outcomes: of each shard; outcome: of the push."""

    step: int
    outcome: Outcome
    outcomes: Sequence[Outcome]
    settled: tuple[Settled, ...]
    alpha: float


class Replies:
    """joined: the model whose parts the stores of the shards hold, if the policy is layerwise."""

    def __init__(self, run: Run, shards: Sequence[Shard], ledger: LedgerView, joined: JoinedModel | None) -> None:
        self._run, self._shards, self._ledger, self._joined = run, shards, ledger, joined
        self._answers: dict[int, Answer] = {}

    def forget(self, worker: int) -> None:
        """`worker` begins anew: what it was told is of its earlier life."""
        self._answers.pop(worker, None)

    def release(self, worker: int, shard: Shard) -> Reply | None:
        """A shard releases a worker: its reply, if one is due. What it is given by a shard is kept until all have."""
        run = self._run
        step = run.owed.get(worker)
        if self._joined is not None:
            if not run.over:
                shard.give(worker)
            if step is None or any(one.ledger.workers[worker].assigned <= step for one in self._shards):
                return None
        elif step is None:
            if not run.over:
                shard.queue(worker)
            return None
        elif shard.ledger.pipeline:
            step, _ = shard.ledger.told(worker)
        del run.owed[worker]
        return self.reply(worker, step)

    def reply(self, worker: int, step: int) -> Reply:
        """The answer to `step` of `worker`, whose push may be overwritten once this has been sent."""
        run, joined, shards = self._run, self._joined, self._shards
        for shard in shards:
            shard.keep(worker)
        last = self._answers.get(worker)
        if last is None or last.step != step:
            last = self._answers[worker] = self._answer(worker, step)
        _, (what, discrepancy, weight), outcomes, settled, alpha = last
        version, model, rate = self._ledger.version, None, 0.0
        layers: tuple[Layer, ...] = ()
        if joined is not None:
            versions = [shard.ledger.version for shard in shards]
            if not run.over:
                given = [shard.give(worker) for shard in shards]
                versions, model = [version for version, _ in given], joined.join([part for _, part in given])
            version = min(versions)
            layers = tuple(Layer(v, part.what, part.weight) for v, part in zip(versions, outcomes, strict=True))
        elif not run.over:
            version, model = shards[0].give(worker)
            rate = shards[0].rate(worker)
        if model is not None:
            run.totals.bytes_down += model.nbytes
        return Reply(worker, step, version, model, what, discrepancy, alpha, weight, settled, layers, rate)

    def _answer(self, worker: int, step: int) -> Answer:
        if self._joined is None:
            outcome, settled = self._shards[0].told(worker, MOST_SETTLED)
            return Answer(step, outcome, (), settled, self._run.alpha)
        outcomes, told = list[Outcome](), list[Settled]()
        for shard in self._shards:
            outcome, settled = shard.told(worker, MOST_SETTLED - len(told))
            outcomes.append(outcome)
            told += settled
        return Answer(step, of_parts(outcomes), outcomes, tuple(told), self._run.alpha)


class PlainReplies(Replies):
    """Those of one shard whose workers wait for each answer, and leave the model to the server: the same, sooner."""

    def __init__(self, run: Run, shards: Sequence[Shard], ledger: LedgerView) -> None:
        super().__init__(run, shards, ledger, None)
        self._last: dict[int, Reply] = {}  # worker -> what it was last told

    def forget(self, worker: int) -> None:
        self._last.pop(worker, None)

    def release(self, worker: int, shard: Shard) -> Reply | None:
        run = self._run
        step = run.owed.pop(worker, None)
        if step is None:
            if not run.over:
                shard.queue(worker)
            return None
        if worker in shard.borrowed and shard.borrowed[worker] in shard.arrived:
            shard.keep(worker)
        ledger, outcomes, last = shard.ledger, shard.outcomes, self._last
        version, model = ledger.version, None
        if not run.over:
            version, model = shard.lend(ledger.workers[worker].due)
            run.totals.bytes_down += model.nbytes
        if worker in last and last[worker].step == step:
            reply = last[worker]._replace(version=version, model=model)
        else:
            settled: tuple[Settled, ...] = ()
            if outcomes.settled:
                outcome, settled = outcomes.take(worker, MOST_SETTLED)
            else:
                outcome = outcomes.answered.pop(worker, HELD)
            what, discrepancy, weight = outcome
            reply = Reply(worker, step, version, model, what, discrepancy, run.alpha, weight, settled)
        last[worker] = reply
        return reply

    def reply(self, worker: int, step: int) -> Reply:
        self._run.owed[worker] = step
        reply = self.release(worker, self._shards[0])
        assert reply is not None
        return reply


def make_replies(
    run: Run, shards: Sequence[Shard], ledger: LedgerView, joined: JoinedModel | None, *, waits: bool
) -> Replies:
    """waits: workers do so for each answer, and do not write the model."""
    return PlainReplies(run, shards, ledger) if joined is None and waits else Replies(run, shards, ledger, joined)
