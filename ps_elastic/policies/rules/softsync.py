from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ps_elastic.plugins import Steps
from ps_elastic.policies import Action, Bound, Facts, Ledger, Policy, Push, Release, Step, policies
from ps_elastic.policies.theory import b_missed_steps


@policies.register("softsync")
@dataclass
class Softsync(Policy):
    """Make a server step of every floor(p / n) gradients, from any worker; no worker waits.

    x_{t+1} = x_t - (alpha / n) mean of the collected: staleness is about n versions, B about n M (alpha / n) = M.
    Source: Zhang et al., "Staleness-aware async-SGD for distributed deep learning", IJCAI 2016 (arXiv 1511.05950),
    n-softsync with the learning rate divided by n.
    Share: 1/n, the source's.
    """

    # server steps of a round; 1: p gradients a step, p: one gradient a step. Larger: smaller steps, staler
    n: Steps = 1

    def declared_bound(self, facts: Facts) -> Bound:
        return Bound(b_missed_steps(facts.tau, 1 / self.n, facts.M), "tau M/n", kind="observed")

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        if len(ledger.held) >= max(1, len(ledger.workers) // self.n):
            yield Step.mean(ledger.held, share=1 / self.n)
        yield Release((push.id.worker,))
