from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ps_elastic.plugins import Rounds
from ps_elastic.policies import Action, Bound, Facts, Ledger, Policy, Push, Release, Step, policies
from ps_elastic.policies.theory import b_message_passing, b_reapplied


@policies.register("message_passing")
@dataclass
class MessagePassing(Policy):
    """Use every gradient at once; a worker computes its round t only with all rounds <= t - `delay` of all others.

    x_{t+1} = x_t - (alpha/p) G(v_t^i). With `update.pipeline: k` worker i continues while k pushes have no reply,
    v_t^i = (model of the last reply) - (alpha/p) (its own pushes that this model lacks); so that only others' are
    missing. A reply waits until clock_i - min_j clock_j <= delay - 1 - k. When round t of worker i is used, those of
    worker j up to t - delay are in its copy and none beyond t - 1 + delay is in the model: tau = 2 delay - 1 rounds are
    missed at most, and B <= (p - 1) tau M / p.
    Source: Nadiradze et al., "Elastic Consistency", AAAI 2021, asynchronous message passing with delays of at most
    tau (table 1), here through a server; the delay is enforced by late replies instead of assumed.
    Share: 1/p.
    """

    pipelines = adds = True
    delay: Rounds = 8  # rounds, more than update.pipeline; 1 is synchronous in pace, larger: staler, less waiting

    def longest_pipeline(self) -> int:
        return self.delay - 1

    def declared_bound(self, facts: Facts) -> Bound:
        scale = facts.p / facts.fewest  # the share is that of the workers left
        missed = b_message_passing(facts.p, 2 * self.delay - 1, scale * facts.M)
        if not facts.reapplied:
            return Bound(missed, "(p - 1)(2 delay - 1) M/p")
        return Bound(missed + b_reapplied(facts), "(p - 1)(2 delay - 1) M/p + r M")

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        worker = push.id.worker
        yield Step.mean([push.id], share=1 / len(ledger.workers))
        if ledger.clock(worker) == ledger.slowest:  # it was the slowest, alone: others may continue now
            yield from self.try_again(ledger)
        elif self._may_go_on(worker, ledger):
            yield Release((worker,))

    def try_again(self, ledger: Ledger) -> Iterator[Action]:
        ready = tuple(worker for worker in ledger.waiting if self._may_go_on(worker, ledger))
        if ready:
            yield Release(ready)

    def _may_go_on(self, worker: int, ledger: Ledger) -> bool:
        return ledger.clock(worker) - ledger.slowest <= self.delay - 1 - ledger.pipeline
