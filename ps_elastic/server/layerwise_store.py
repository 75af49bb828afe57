"""The stores of a layerwise rule, one for each bucket, as the store of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ps_elastic.policies.events import PushId
from ps_elastic.server.protocols import Store
from ps_elastic.vectors.layout import Layout


class Copies:
    """The snapshots of all slices."""

    def __init__(self, parts: Sequence[Store]) -> None:
        self._parts = parts

    @property
    def peak(self) -> int | None:
        """Most copies of a slice alive at once; None where there are no numbers."""
        peaks = [part.snapshots.peak for part in self._parts]
        known = [peak for peak in peaks if peak is not None]
        return max(known) if known else None


class LayerwiseStore:
    """x: the whole model (d,), of which each of `parts` moves its slice; None where headers alone move.

    join: makes the model of a reply from those of its slices. A slice may be older than the others: a worker goes on
    when the last bucket releases it, with every slice as it was when its own bucket did. So views are always kept.
    """

    def __init__(
        self,
        layout: Layout,
        x: Tensor | None,
        parts: Sequence[Store],
        join: Callable[[Sequence[Any]], Any] | None = None,
    ) -> None:
        self.layout, self.x, self.parts, self.snapshots = layout, x, tuple(parts), Copies(parts)
        self.join = join or self._concatenated

    def view(self, view: PushId) -> Any:
        """The model given for the push `view`, whatever x has become since."""
        return self.join([part.view(view) for part in self.parts])

    def _concatenated(self, slices: Sequence[np.ndarray]) -> np.ndarray:
        """One array (d,): the live model itself where every slice is of it."""
        assert self.x is not None
        live = self.x.numpy()
        places = (live[bucket.start :].ctypes.data for bucket in self.layout.buckets)
        if all(array.ctypes.data == place for array, place in zip(slices, places, strict=True)):
            return live
        return np.concatenate(slices)
