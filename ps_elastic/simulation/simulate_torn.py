"""Workers that read the model while it changes: `views: torn` in virtual time.

A read takes a while and goes through the entries in their order, as a copy of memory does; a step of the server falls
between two entries of it. So each entry of a view lacks the steps that came after it was read, and no others.
Source: the shared-memory model of Nadiradze et al., "Elastic Consistency", AAAI 2021, table 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ps_elastic.simulation.nodes import Node
from ps_elastic.simulation.simulator import Simulator
from ps_elastic.transport.messages import Reply
from ps_elastic.vectors.layout import Layout

PIECES = 64  # most moments at which a view is read


def pieces_of(layout: Layout) -> tuple[Tensor, ...]:
    """The entries of the flat vector (n,) that are read at one moment, in turn: all parameters, no padding."""
    entries = torch.cat([torch.arange(slot.offset, slot.offset + slot.numel) for slot in layout.slots])
    return torch.tensor_split(entries, min(PIECES, entries.numel()))


class TornSimulator(Simulator):
    """As `Simulator`; copies: of each worker what it read of the server's model (d,). read_s: how long that takes."""

    def __init__(
        self, *arguments: Any, layout: Layout, copies: Mapping[int, Tensor], read_s: float, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._pieces, self._copies, self._read_s = pieces_of(layout), copies, read_s

    def _compute(self, node: Node, reply: Reply, begins: float, ends: float) -> None:
        """Piece i of n is read at (i + 1/2) / n of the time that reading takes; then the worker computes."""
        for i, piece in enumerate(self._pieces):
            self._at(begins + (i + 0.5) / len(self._pieces) * self._read_s, self._read, node, piece)
        super()._compute(node, reply, begins, ends + self._read_s)

    def _read(self, node: Node, piece: Tensor) -> None:
        if node.alive:
            self._copies[node.rank][piece] = self._server.calculator.x[piece]
