"""Past versions of the model, each kept once for all who hold it and freed with the last.

The current version is the live vector itself: it is copied only when a Step is about to change it while
somebody's view still is that version. Copies come from a pool, so that the steady state allocates nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Snapshots:
    """x: the live model (d,). Versions count from 0."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.version = x, 0
        self.peak = 0  # most copies alive at once
        self._holders = {0: 0}
        self._copies: dict[int, Tensor] = {}
        self._pool: list[Tensor] = []

    def hold(self, version: int) -> None:
        self._holders[version] = self._holders.get(version, 0) + 1

    def let_go(self, version: int) -> None:
        self._holders[version] -= 1
        if not self._holders[version]:
            del self._holders[version]
            copy = self._copies.pop(version, None)
            if copy is not None:
                self._pool.append(copy)

    def vector(self, version: int) -> Tensor:
        """The model (d,) as it was at `version`, which somebody must hold unless it is the current one."""
        return self.x if version == self.version else self._copies[version]

    def fixed(self, version: int) -> Tensor:
        """As `vector` of a version that somebody holds, in memory that stays as it is until nobody does."""
        if version == self.version and version not in self._copies:
            self._place().copy_(self.x)
        return self._copies[version]

    def advance(self) -> Tensor | None:
        """The live vector is about to become the next version: where the current one is to be copied to first (d,).

        None if nobody holds it, or it has been copied. The memory may be that of a version just let go, which can be
        read until then.
        """
        copy = None
        if self._holders.get(self.version) and self.version not in self._copies:
            copy = self._place()
        self.version += 1
        return copy

    def _place(self) -> Tensor:
        copy = self._copies[self.version] = self._pool.pop() if self._pool else torch.empty_like(self.x)
        self.peak = max(self.peak, len(self._copies))
        return copy
