"""The server's calculator where workers read the model while it is written: `views: torn`.

Nobody knows what such a reader sees but the reader itself. So each worker computes on a copy that it made in memory
shared with the server, and leaves it there until its push is answered: that copy is the view.
Source: the shared-memory model of Nadiradze et al., "Elastic Consistency", AAAI 2021, table 1, where a view misses, in
each coordinate, some of the last updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ps_elastic.compressors import Compressor
from ps_elastic.policies.events import PushId
from ps_elastic.policies.ledger import View
from ps_elastic.server.optimizer import FlatOptimizer
from ps_elastic.server.store import Calculator
from ps_elastic.vectors.layout import Layout


class TornCalculator(Calculator):
    """copies: of each worker the model (d,) that it computes on, in shared memory."""

    def __init__(
        self,
        layout: Layout,
        x: Tensor,
        optimizer: FlatOptimizer,
        compressors: Sequence[Compressor],
        copies: Mapping[int, Tensor],
    ) -> None:
        super().__init__(layout, x, optimizer, compressors, keeps_versions=False)
        self._copies = copies

    def give(self, view: PushId, given: View, alpha: float) -> Any:
        """The live model: the worker copies it when it likes, whatever is written meanwhile."""
        self._own[view] = self._copies[view.worker]
        return self.x.numpy()

    def keep(self, push: PushId) -> None:
        super().keep(push)
        if push in self._own:  # its worker is about to copy the model of now there
            self._own[push] = self._own[push].clone()
