"""The shards of a layerwise policy, one for each bucket, as one: their ledgers and their stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ps_elastic.policies.events import PushId, ReplyId
from ps_elastic.policies.ledger import Ledger, Member
from ps_elastic.server.protocols import Model, Snapshots

if TYPE_CHECKING:
    from torch import Tensor

    from ps_elastic.vectors.layout import Layout


class Ledgers:
    """The ledgers of all shards as one, for those who look at the run from outside."""

    def __init__(self, ledgers: Sequence[Ledger]) -> None:
        self._ledgers = ledgers
        self.workers: dict[int, Member] = ledgers[0].workers

    @property
    def waiting(self) -> dict[int, None]:
        """Workers of whom some bucket is here, and not released."""
        return {worker: None for worker in self.workers if any(worker in one.waiting for one in self._ledgers)}

    @property
    def version(self) -> int:
        """Of the bucket that has most."""
        return max(one.version for one in self._ledgers)

    @property
    def done(self) -> bool:
        return any(one.done for one in self._ledgers)

    @property
    def wake_at(self) -> float | None:
        return min((one.wake_at for one in self._ledgers if one.wake_at is not None), default=None)


class Peak(NamedTuple):
    """Most copies of a part alive at once; None where there are no numbers."""

    peak: int | None


class JoinedModel:
    """x: the whole model (d,), of which each of `parts` moves its slice; None in a timing-only simulation.

    join: makes the model of a reply from those of its slices. A slice may be older than the others: a worker goes on
    when the last bucket releases it, with every slice as it was when its own bucket did. So copies are always kept.
    """

    def __init__(
        self,
        layout: Layout,
        x: Tensor | None,
        parts: Sequence[Model],
        join: Callable[[Sequence[Any]], Any] | None = None,
    ) -> None:
        self.layout, self.x, self.parts = layout, x, tuple(parts)
        self.join = join or self._concatenated

    @property
    def snapshots(self) -> Snapshots:
        peaks = [part.snapshots.peak for part in self.parts]
        return Peak(max([peak for peak in peaks if peak is not None], default=None))

    def view(self, view: PushId | ReplyId) -> Any:
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
