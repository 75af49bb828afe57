from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Annotated

from ps_elastic.plugins import OneOf, Range
from ps_elastic.policies import Action, Bound, Facts, Ledger, Policy, Push, Release, Step, policies
from ps_elastic.policies.theory import b_shared_memory


@policies.register("asgrad")
@dataclass
class AsGrad(Policy):
    """Make a step of every `wait` gradients, then hand out as many jobs: to their workers, at random, or shuffled.

    x_{t+1} = x_t - (alpha/b) SUM over b jobs of G(their copies). pure: the workers that finished continue, so fast ones
    dominate and different data leave a floor; random: each job to a worker drawn from all; shuffled: to the next of a
    permutation, redrawn every p jobs. Jobs queue at a busy worker with the model of their assignment.
    Source: Islamov, Safaryan, Alistarh, "AsGrad: a sharp unified analysis of asynchronous-SGD algorithms", AISTATS
    2024 (arXiv 2310.20452).
    Share: 1.
    """

    jobs = 1 << 30  # as many as come
    # who gets the next jobs. pure: to those who finished; random: to workers drawn from all; shuffled: in random order
    assignment: Annotated[str, OneOf("pure, random or shuffled")] = "shuffled"
    # b, gradients of one server step; larger: less noise, fewer steps. With pure, p is minibatch SGD
    wait: Annotated[int, Range("a number of jobs >= 1")] = 1
    seed: int = 0  # seed of the random order
    drawn: int = field(default=0, init=False)
    members: list[int] = field(default_factory=list, init=False)  # workers that may get jobs: a joiner once it asked
    order: list[int] = field(default_factory=list, init=False)  # what is left of the permutation

    def workers_needed(self) -> int:
        return self.wait

    def declared_bound(self, facts: Facts) -> Bound:
        return Bound(b_shared_memory(facts.tau, facts.M), "tau M", kind="observed")

    def on_start(self, ledger: Ledger) -> tuple[()]:
        self.members = list(ledger.workers)
        return ()

    def on_push(self, push: Push, ledger: Ledger) -> Iterator[Action]:
        yield from self._step_and_release(ledger)

    def on_ask(self, worker: int, ledger: Ledger) -> Iterator[Action]:
        if worker not in self.members:
            self.members.append(worker)
        yield Release((worker,))

    def on_leave(self, worker: int, ledger: Ledger) -> Iterator[Action]:
        for known in (self.members, self.order):
            if worker in known:
                known.remove(worker)
        yield from self._step_and_release(ledger)
        if ledger.waiting and not ledger.computing:
            yield Release(tuple(ledger.waiting))  # the jobs that the leaver had queued are lost

    def _step_and_release(self, ledger: Ledger) -> Iterator[Action]:
        enough = len(ledger.held) >= min(self.wait, len(self.members)) or not ledger.computing
        if not ledger.held or not enough:
            return
        yield Step.mean(ledger.held)
        if self.assignment == "pure":
            to = tuple(ledger.waiting)
        else:  # as many jobs under way as there are workers: those done, and those that were lost
            to = tuple(self._draw() for _ in range(len(self.members) - len(ledger.views)))
        if to:
            yield Release(to)

    def _draw(self) -> int:
        self.drawn += 1
        random = Random(f"{self.seed}:{self.drawn}")
        if self.assignment == "random":
            return random.choice(self.members)
        if not self.order:
            self.order = list(self.members)
            random.shuffle(self.order)
        return self.order.pop()
