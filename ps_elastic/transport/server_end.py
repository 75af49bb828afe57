"""Rank 0's end of the transport; how messages travel: end.py."""

from __future__ import annotations

from collections import deque
from functools import partial

import numpy as np

from ps_elastic.errors import WireError
from ps_elastic.memory import aligned
from ps_elastic.messages import Message, PushMessage, Reply
from ps_elastic.transport.end import (
    CONTROL,
    MODEL,
    PUSH,
    REPLY,
    TAGS,
    TEXT_BYTES,
    End,
    Traffic,
    is_inline,
    most_reply_bytes,
)
from ps_elastic.transport.slot import MPI, Outbox, Slot
from ps_elastic.wire import HEADER_BYTES, Place, pack, size_of, unpack


class ServerEnd(End):
    """Rank 0's end.

    model: where the server's model (d,) is to live so that workers of this host see it; None without shared windows.
    """

    def __init__(self, comm: MPI.Comm, traffic: Traffic) -> None:
        super().__init__(comm, traffic, range(1, comm.Get_size()))
        frames, model_bytes = traffic.frames, traffic.model_bytes
        self._windows = windows = traffic.links.windows if traffic.links else None
        self.model = windows.model() if windows else None
        self._far = Place.INLINE if is_inline(model_bytes) else Place.APART
        self._near = Place.SHARED if self._far or (windows and (windows.in_place or windows.torn)) else Place.INLINE
        self._given: dict[int, int] = {}  # worker that shares memory -> how many models it was given there
        self._taken: dict[int, memoryview] = {}  # and how many of them it is done with, where that matters
        self._reading: set[int] = set()  # those that may not be done with the last
        self._read: dict[int, list[Slot]] = {}  # worker -> where its push lies until it is answered
        self._shared: dict[Slot, np.ndarray] = {}  # where a push is a header -> the frame in the worker's window
        self._control: set[int] = set()
        self._replies: dict[int, deque[tuple[Outbox, Outbox]]] = {}  # worker -> for heads, for models that go apart
        for worker in range(1, self.size):
            near = windows is not None and worker in windows.workers
            shared = windows.frames(worker) if windows and near and not windows.written else ()
            for i, nbytes in enumerate(frames):
                memory = aligned(HEADER_BYTES if shared else nbytes, HEADER_BYTES)
                slot = self._add(Slot(comm, worker, PUSH + i * TAGS, memory))
                if shared:
                    self._shared[slot] = shared[i]
            if windows and near:
                self._given[worker] = 0
                if not windows.torn:
                    self._taken[worker] = windows.taken(worker)
            self._replies[worker] = deque()
            for _ in range(traffic.pipeline + 1):
                head = aligned(most_reply_bytes(model_bytes, frames), HEADER_BYTES)
                self._replies[worker].append((self._outbox(worker, REPLY, head), self._outbox(worker, MODEL)))
        for worker in range(1, self.size):  # after the pushes: of two arrivals a push is looked at before an Ask
            control = self._add(Slot(comm, worker, CONTROL, aligned(HEADER_BYTES + TEXT_BYTES)))
            self._control.add(id(control))
        for slot in self._slots:
            slot.start()

    def send(self, dest: int, message: Message) -> None:
        """Send a reply; from now on the memory of the push that it answers is received into again."""
        for slot in self._read.pop(dest, ()):
            slot.start()
        head, body = self._replies[dest][0]
        self._replies[dest].rotate(-1)
        self._left(head)
        self._left(body)
        assert head.memory is not None
        place = self._near if dest in self._given else self._far
        if isinstance(message, Reply) and message.model is not None and place == Place.SHARED:
            if self._lives_there(message.model):
                self._given[dest] += 1
                self._reading.add(dest)
            else:  # a model of an earlier version, or of this worker alone
                place = Place.APART
        packed = pack(message, self._layout, head.memory, model=place)
        if self._windows is not None:
            self._windows.sync()
        self._send(head, packed.head)
        if packed.apart is not None:
            self._send(body, packed.apart.view(np.uint8))
        self._ring(dest, packed.head.size if packed.apart is None else packed.apart.nbytes)

    def _look(self, slot: Slot) -> None:
        if not slot.has_first():
            return
        frame = self._shared.get(slot)
        if frame is None:
            if not slot.whole and not slot.complete(size_of(slot.memory, self._layout, slot.name)[0]):
                return
            frame = slot.memory
        message = unpack(frame, self._layout, slot.name)
        if message.worker != slot.source:
            raise WireError(f"{slot.name}: says it is of worker {message.worker}")
        self._ready.append((slot.source, message))
        if id(slot) in self._control or not isinstance(message, PushMessage):
            slot.start()
        else:
            self._read.setdefault(slot.source, []).append(slot)

    def flush(self) -> None:
        """Return when models sent have left, and workers are done with those that they read here: x may change."""
        for outbox in tuple(self._sending):
            if outbox.memory is None:  # else it sends a copy
                self._left(outbox)
        for worker in self._reading & self._taken.keys():
            if self._taken[worker][0] != self._given[worker]:
                self._until(partial(self._is_done, worker), worker)
        self._reading.clear()

    def _is_done(self, worker: int) -> bool:
        self._probe()  # what others send meanwhile must not stop them
        return self._taken[worker][0] == self._given[worker]

    def _lives_there(self, model: np.ndarray) -> bool:
        assert self.model is not None
        return bool(model.__array_interface__["data"] == self.model.__array_interface__["data"])
