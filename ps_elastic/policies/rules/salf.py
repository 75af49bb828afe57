from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ps_elastic.errors import ConfigError
from ps_elastic.plugins import expect
from ps_elastic.policies import Action, Ledger, Step, Term, policies
from ps_elastic.policies.rules.layer_rounds import LayerRounds
from ps_elastic.policies.theory import p_layer_empty


@policies.register("salf")
@dataclass
class Salf(LayerRounds):
    """At each deadline change a layer by the mean of the workers that have it, corrected for rounds in which none has.

    w_l <- w_l - alpha / (1 - p_l) (1/|U_l|) SUM over U_l of g_{u,l}; if U_l is empty the layer stays. p_l = P(U_l
    empty), so that over exchangeable workers the expectation is the mean of all U (theirs: p_l = ((L - l)/L)^U for
    depths uniform on L layers, l = 1 the input). Workers of unlike speed are not exchangeable: the slow never move the
    first layers. B = 0 against the server's model.
    Source: Lang, Cohen and Shlezinger, "Stragglers-aware low-latency synchronous federated learning via layer-wise
    model updates", 2024 (arXiv 2403.18375); their w_{u,l} = w_l - alpha g_{u,l} written in gradients.
    Share: 1, as the source averages what it uses. The correction is in the weights, 1 / (|U_l| (1 - p_l)) each of a
    sum: a step scale says which fraction of a round counts, and no round counts for more than one.
    """

    # p_l, probability that no worker comes to the layer: one for each bucket; or uniform: every depth is as likely; or
    # estimated from earlier rounds. Larger: longer steps
    empty: str | tuple[float, ...] = "uniform"
    missed: int = field(default=0, init=False)  # this layer, by workers, in rounds past
    asked: int = field(default=0, init=False)  # workers in rounds past

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.empty, str):
            known = self.empty in ("uniform", "estimated")
            expect(known, self, "empty", "uniform, estimated or a list of numbers")
        else:
            expect(all(0 <= p < 1 for p in self.empty), self, "empty", "probabilities from 0 to below 1")

    def on_start(self, ledger: Ledger) -> Iterator[Action]:
        layers = ledger.bucket[1]
        if not isinstance(self.empty, str) and len(self.empty) != layers:
            raise ConfigError(f"got {len(self.empty)} numbers, expected one for each of {layers}", key="policy.empty")
        return super().on_start(ledger)

    def on_wake(self, ledger: Ledger) -> Iterator[Action]:
        here, everybody = len(ledger.held), len(ledger.workers)
        yield from super().on_wake(ledger)
        self.missed += max(0, everybody - here)
        self.asked += everybody

    def step(self, ledger: Ledger) -> Step:
        p = self._empty(ledger)
        if not p:
            return Step.mean(ledger.held)
        weight = 1 / (len(ledger.held) * (1 - p))
        return Step(tuple([Term(push, weight) for push in sorted(ledger.held)]), combine="sum")

    def _empty(self, ledger: Ledger) -> float:
        """p_l of this layer; estimated: (part of the workers that missed it in rounds past)^U, below 1."""
        (index, layers), workers = ledger.bucket, max(1, len(ledger.workers))
        if self.empty == "uniform":
            return p_layer_empty(index + 1, layers, workers)
        if isinstance(self.empty, str):
            return float((self.missed / (self.asked + 1)) ** workers)
        return self.empty[index]
