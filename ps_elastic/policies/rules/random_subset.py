from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from ps_elastic.plugins import Pushes
from ps_elastic.policies import Action, Bound, Drop, Facts, Ledger, Policy, Push, Release, Step, exact, policies


@policies.register("random_subset")
@dataclass
class RandomSubset(Policy):
    """Wait for all, use the mean of `q` pushes drawn at random, discard the others, release all workers.

    x_{t+1} = x_t - alpha (1/q) SUM over a uniform subset of size q: a random mixing step through the server. With
    `update: local_sgd` the mean of q local models after H local steps.
    Source: Koloskova et al., "A unified theory of decentralized SGD with changing topology and local updates", ICML
    2020 (arXiv 2003.10422), whose random mixing matrix it is at a server.
    Share: 1.
    """

    lockstep = True
    q: Pushes = 2  # pushes of one server step; larger: fewer are discarded, less noise. p: all of them
    seed: int = 0  # seed of the draws
    rounds: int = field(default=0, init=False)

    def workers_needed(self) -> int:
        return self.q

    def declared_bound(self, facts: Facts) -> Bound:
        return exact()

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        yield from self.try_again(ledger)

    def try_again(self, ledger: Ledger) -> Iterator[Action]:
        if not ledger.held or ledger.computing:
            return
        self.rounds += 1
        here = sorted(ledger.held)
        chosen = set(Random(f"{self.seed}:{self.rounds}").sample(here, min(self.q, len(here))))
        for push in here:
            if push not in chosen:
                yield Drop(push, "not drawn")
        yield Step.mean(chosen)
        if ledger.waiting:
            yield Release(tuple(ledger.waiting))
