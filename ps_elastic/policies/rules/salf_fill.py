from __future__ import annotations

from dataclasses import dataclass

from ps_elastic.policies import Ledger, Step, policies
from ps_elastic.policies.rules.layer_rounds import LayerRounds


@policies.register("salf_fill")
@dataclass
class SalfFill(LayerRounds):
    """At each deadline change a layer by what is here, divided by all workers; a worker without the layer adds zero.

    w_l <- w_l - alpha (1/U) SUM over U_l of g_{u,l}: a step shrunk by the part r_l of the workers that come to the
    layer, E = r_l x full step; the first layers learn more slowly. B = 0 against the server's model.
    Source: the public code of Lang, Cohen and Shlezinger, "Stragglers-aware low-latency synchronous federated learning
    via layer-wise model updates", 2024 (arXiv 2403.18375), which keeps the old layer for absent users.
    Share: |U_l| / U.
    """

    def step(self, ledger: Ledger) -> Step:
        return Step.mean(ledger.held, share=min(1.0, len(ledger.held) / max(1, len(ledger.workers))))
