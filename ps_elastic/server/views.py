"""Workers' copies of the model: kept here, each once, or left by workers that read what is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from ps_elastic.policies.events import PushId, ReplyId
from ps_elastic.policies.ledger import View
from ps_elastic.server.optimizer import FlatOptimizer
from ps_elastic.server.payloads import Payloads

ViewId = PushId | ReplyId
Apart = tuple[Sequence[Any], dict[Any, Tensor]]  # a key for each copy, equal where they are; key -> what is not x (d,)


class Reapplied(NamedTuple):
    """What a worker that runs ahead does to a model: it subtracts rate x what these pushes of its own decode to."""

    rate: float
    pushes: tuple[PushId, ...]


class KeptViews:
    """Workers' copies of the model that the server knows when it sends them; of the methods see `Store`.

    keeps: they are kept, so that distances can be measured.
    """

    def __init__(self, x: Tensor, optimizer: FlatOptimizer, payloads: Payloads, *, keeps: bool) -> None:
        self.snapshots = Snapshots(x)
        self._array = x.numpy()  # the same; made once, as it takes a microsecond
        self._optimizer, self._payloads, self._keeps = optimizer, payloads, keeps
        self.versions: dict[ViewId, int] = {}  # view -> version kept
        self.reapplied: dict[ViewId, Reapplied] = {}  # view -> what its worker did to that version
        self._own: dict[ViewId, Tensor] = {}  # view -> the copy itself, where it is nobody else's (d,)

    def give(self, view: PushId, given: View, alpha: float) -> Any:
        if view not in self.versions and view not in self._own:
            if given.own_push is not None:
                response = self._optimizer.respond(alpha)
                vector = self._payloads.decoded(given.own_push).mul_(given.own)
                self._own[view] = self._optimizer.add_response(
                    self.snapshots.vector(given.version).clone(), vector, response
                )
            elif self._keeps:
                self.versions[view] = version = given.version
                holders = self.snapshots.holders  # as `hold`, at the price of none
                holders[version] = holders[version] + 1 if version in holders else 1
        if view in self._own:
            return self._own[view].numpy()
        # Without kept versions a reply that is sent again carries the newest model: no farther than it is counted.
        if given.version == self.snapshots.version or not self._keeps:
            return self._array
        return self.snapshots.copies[given.version].array

    def hand(self, reply: ReplyId, version: int) -> Any:
        if reply not in self.versions:
            self.snapshots.hold(version)
            self.versions[reply] = version
        return self.snapshots.fixed(version).numpy()

    def derive(self, view: PushId, reply: ReplyId, rate: float, pushes: Sequence[PushId]) -> None:
        self.versions[view] = self.versions[reply]
        self.snapshots.hold(self.versions[view])
        if pushes:
            self.reapplied[view] = Reapplied(rate, tuple(pushes))

    def keep(self, view: PushId) -> None:
        """Its worker is about to be answered: what is kept here stays as it is."""

    def end(self, view: ViewId) -> None:
        if self._own:
            self._own.pop(view, None)
        if self.reapplied:
            self.reapplied.pop(view, None)
        if (version := self.versions.pop(view, None)) is not None:
            self.snapshots.release(version)

    def vector(self, view: ViewId) -> Tensor:
        """The copy (d,), not to be changed."""
        if view in self._own:
            return self._own[view]
        vector = self.snapshots.vector(self.versions[view])
        if view not in self.reapplied:
            return vector
        rate, pushes = self.reapplied[view]
        vector = vector.clone()
        for push in pushes:
            self._payloads.reapply(push, vector, rate)
        return vector

    def version(self, view: ViewId) -> int | None:
        """The version that this copy was sent from; None where it is of its worker alone."""
        return self.versions.get(view)

    def apart(self, views: Sequence[PushId]) -> Apart:
        """What is to be measured of `views`: those that are the same but once, and what is x itself not at all."""
        current, keys, apart = self.snapshots.version, list[Any](), dict[Any, Tensor]()
        for view in views:
            key = view if view in self.reapplied else self.versions.get(view, view)
            keys.append(key)
            if key != current and key not in apart:
                apart[key] = self.vector(view)
        return keys, apart


class TornViews:
    """Workers' copies of the model, read while it is written: inconsistent reads (`views: torn`). copies: by rank (d,).

    Nobody knows what such a reader sees but the reader itself. So each worker computes on a copy that it made in memory
    shared with the server, and leaves it there until its push is answered: that is the copy.
    Source: the shared-memory model of Nadiradze et al., "Elastic Consistency", AAAI 2021, table 1, where a copy misses,
    in each coordinate, some of the last updates.
    """

    def __init__(self, x: Tensor, copies: Mapping[int, Tensor]) -> None:
        self.snapshots = Snapshots(x)  # of which nobody needs any
        self._array, self._copies = x.numpy(), copies
        self._views: dict[ViewId, Tensor] = {}

    def give(self, view: PushId, given: View, alpha: float) -> Any:
        """The live model: the worker copies it when it likes, whatever is written meanwhile."""
        self._views[view] = self._copies[view.worker]
        return self._array

    def hand(self, *_: object) -> NoReturn:
        raise NotImplementedError("workers that run ahead are refused where the configuration is read")

    derive = hand

    def keep(self, view: PushId) -> None:
        """Its worker is about to copy the model of now there."""
        if view in self._views:
            self._views[view] = self._views[view].clone()

    def end(self, view: ViewId) -> None:
        self._views.pop(view, None)

    def vector(self, view: ViewId) -> Tensor:
        """The copy (d,), not to be changed."""
        return self._views[view]

    def version(self, view: ViewId) -> int | None:
        """Each is of its worker alone."""
        return None

    def apart(self, views: Sequence[PushId]) -> Apart:
        """What is to be measured of `views`: each of them."""
        return views, {view: self._views[view] for view in views}


class Copy(NamedTuple):
    """A model of before (d,), and the same as numpy's, which takes as long to make as to read 2,000 entries."""

    vector: Tensor
    array: np.ndarray


class Snapshots:
    """Past versions of the model, each kept once for all who need it and freed with the last. They count from 0.

    The current version is the live vector x (d,) itself: it is copied only when a Step is about to change it while
    some worker's copy still is that version. Copies come from a pool, so that the steady state allocates nothing.
    """

    def __init__(self, x: Tensor) -> None:
        self.x, self.version = x, 0
        self.peak = 0  # most copies alive at once
        self.holders = dict[int, int]()  # version -> how many need it
        self.copies: dict[int, Copy] = {}
        self._pool: list[Copy] = []

    def hold(self, version: int) -> None:
        self.holders[version] = self.holders.get(version, 0) + 1

    def release(self, *versions: int) -> None:
        holders = self.holders
        for version in versions:
            holders[version] -= 1
            if not holders[version]:
                del holders[version]
                if version in self.copies:
                    self._pool.append(self.copies.pop(version))

    def vector(self, version: int) -> Tensor:
        """The model (d,) as it was at `version`, which somebody must need unless it is the current one."""
        return self.x if version == self.version else self.copies[version].vector

    def fixed(self, version: int) -> Tensor:
        """As `vector` of a version that somebody needs, in memory that stays as it is until nobody does."""
        if version == self.version and version not in self.copies:
            self._place().vector.copy_(self.x)
        return self.copies[version].vector

    def advance(self) -> Tensor | None:
        """As `move_on`, the vector alone."""
        copy = self.move_on()
        return None if copy is None else copy.vector

    def move_on(self) -> Copy | None:
        """The live vector is about to become the next version: where the current one is to be copied to first (d,).

        None if nobody needs it, or it has been copied. The memory may be that of a version just released, which can be
        read until then.
        """
        copy = None
        if self.version in self.holders and self.version not in self.copies:
            copy = self._place()
        self.version += 1
        return copy

    def _place(self) -> Copy:
        if self._pool:
            copy = self._pool.pop()
        else:
            vector = torch.empty_like(self.x)
            copy = Copy(vector, vector.numpy())
        self.copies[self.version] = copy
        if len(self.copies) > self.peak:
            self.peak = len(self.copies)
        return copy
