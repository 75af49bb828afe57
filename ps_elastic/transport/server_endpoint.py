"""Rank 0's end of the transport; what both ends share: endpoint.py."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial

import numpy as np

from ps_elastic.errors import WireError
from ps_elastic.transport.buffers import ReceiveBuffer, SendBuffer
from ps_elastic.transport.eager import EagerModels
from ps_elastic.transport.endpoint import (
    CONTROL,
    MODEL,
    PUSH,
    REPLY,
    TAGS,
    TEXT_BYTES,
    VECTOR,
    Endpoint,
    Traffic,
    goes_apart,
    is_inline,
    most_reply_bytes,
    piece_bytes,
)
from ps_elastic.transport.frame_cache import PushReader, ReplyStamp
from ps_elastic.transport.messages import Message, PushMessage, Reply
from ps_elastic.transport.mpi import MPI
from ps_elastic.transport.wire import HEADER_BYTES, Place, pack, padded, size_of, unpack
from ps_elastic.vectors.memory import aligned


class ServerEndpoint(Endpoint):
    """Rank 0's end.

    model: where the server's model (d,) is to live so that workers of this host see it; None without shared windows.
    lends: models are sent, or read, from where the server has them, so that `flush` must come before they change, and
    `begin_step` may let them leave early. Small ones travel as copies.
    """

    def __init__(self, comm: MPI.Comm, traffic: Traffic) -> None:
        super().__init__(comm, traffic, range(1, comm.Get_size()))
        frames, model_bytes, vectors = traffic.frames, traffic.model_bytes, traffic.vectors
        self._windows = windows = traffic.links.windows if traffic.links else None
        self.model = windows.model() if windows else None
        self._far = Place.INLINE if is_inline(model_bytes) else Place.APART
        self._near = Place.SHARED if self._far or (windows and (windows.in_place or windows.torn)) else Place.INLINE
        self.lends = self._far == Place.APART or self._near == Place.SHARED
        self._located, self._location = np.empty(0), 0  # the array asked for last, and its address
        self._model_address = 0 if self.model is None else self._address(self.model)
        self._given: dict[int, int] = {}  # worker that shares memory -> how many models it was given there
        self._taken: dict[int, memoryview] = {}  # and how many of them it is done with, where that matters
        self._reading: set[int] = set()  # those that may not be done with the last
        self._read: dict[int, list[ReceiveBuffer]] = {}  # worker -> where its push lies until it is answered
        self._readers: dict[ReceiveBuffer, PushReader] = {}  # of frames that come in one piece, or are in a window
        # where a bucket may be apart from its header -> where it arrives
        self._vectors: dict[ReceiveBuffer, ReceiveBuffer] = {}
        self._heads: dict[ReceiveBuffer, ReceiveBuffer] = {}  # and back
        self._control: set[ReceiveBuffer] = set()
        # worker -> for heads, for models that go apart, and what writes the heads of those that do not
        self._replies: dict[int, deque[tuple[SendBuffer, SendBuffer, ReplyStamp | None]]] = {}
        for worker in range(1, self.size):
            near = windows is not None and worker in windows.workers
            shared = windows.frames(worker) if windows and near and not windows.written else ()
            for i, nbytes in enumerate(frames):
                apart = vectors[i] if vectors and not near and goes_apart(vectors[i]) else 0
                memory = aligned(HEADER_BYTES if shared else nbytes - padded(apart), HEADER_BYTES)
                slot = self._add(ReceiveBuffer(comm, worker, PUSH + i * TAGS, memory))
                if apart:
                    self._vectors[slot] = self._add(
                        ReceiveBuffer(comm, worker, PUSH + i * TAGS + VECTOR, aligned(apart))
                    )
                    self._heads[self._vectors[slot]] = slot
                elif shared or slot.whole:
                    self._readers[slot] = PushReader(shared[i] if shared else memory, self._layout, slot.name)
            if windows and near:
                self._given[worker] = 0
                if not windows.torn:
                    self._taken[worker] = windows.taken(worker)
            self._replies[worker] = deque()
            for _ in range(traffic.pipeline + 1):
                head = aligned(most_reply_bytes(model_bytes, frames), HEADER_BYTES)
                body = self._send_buffer(worker, MODEL, chunk_bytes=piece_bytes(model_bytes))
                place = self._place(worker)
                stamp = None if place == Place.APART else ReplyStamp(head, self._layout, model_bytes // 4, place)
                self._replies[worker].append((self._send_buffer(worker, REPLY, head), body, stamp))
        for worker in range(1, self.size):  # after the pushes: of two arrivals a push is looked at before an Ask
            control = self._add(ReceiveBuffer(comm, worker, CONTROL, aligned(HEADER_BYTES + TEXT_BYTES)))
            self._control.add(control)
        self._early, self._steps = EagerModels(), 0
        self._ahead: dict[int, int] = {}  # worker -> the step whose model has left for it ahead of its reply
        self._newest, self._begun = 0, 0  # where that model lies, and the step that it is of
        for slot in self._slots:
            slot.start()

    def send(self, dest: int, message: Message) -> None:
        """Send a reply; from now on the memory of the push that it answers is received into again."""
        for slot in self._read.pop(dest, ()):
            slot.start()
        turns = self._replies[dest]
        head, body, stamp = turns[0]
        if len(turns) > 1:
            turns.rotate(-1)
        self._left(head)
        frame = None if stamp is None else self._stamped(dest, message, stamp)
        if frame is None:
            self._send_apart(dest, message, head, body)
            return
        if self._windows is not None:
            self._windows.sync()
        self._send(head, frame)
        self._ring(dest, frame.size)

    def _stamped(self, dest: int, message: Message, stamp: ReplyStamp) -> np.ndarray | None:
        """The frame of a reply whose model is in it, or where the worker sees it; None where it must go apart."""
        if not isinstance(message, Reply):
            return None
        if stamp.place == Place.SHARED and message.model is not None:
            if self._address(message.model) != self._model_address:
                return None  # a model of an earlier version, or of this worker alone
            self._given[dest] += 1
            self._reading.add(dest)
        return stamp.write(message)

    def _send_apart(self, dest: int, message: Message, head: SendBuffer, body: SendBuffer) -> None:
        """Send a reply whose model goes in messages of its own, or has gone already."""
        assert head.memory is not None
        ahead = self._ahead.pop(dest, None)
        model = message.model if isinstance(message, Reply) else None
        is_of_step = model is not None and self._address(model) == self._newest
        newest = is_of_step and self._begun == self._steps  # nothing changed it after the step
        self._early.answered(dest, newest=newest)
        is_there = ahead == self._steps and newest
        stale = ahead is not None and not is_there
        packed = pack(message, self._layout, head.memory, place=Place.APART, stale=stale)
        if self._windows is not None:
            self._windows.sync()
        self._send(head, packed.head)
        if packed.apart is not None and not is_there:
            self._left(body)
            self._send(body, packed.apart.view(np.uint8))
        self._ring(dest, packed.head.size if packed.apart is None else packed.apart.nbytes)

    def _place(self, dest: int) -> Place:
        """Where the model of a reply to `dest` is, if it is the server's own."""
        return self._near if dest in self._given else self._far

    def begin_step(self, workers: Collection[int], model: np.ndarray) -> Callable[[int], None] | None:
        """Begin a step of pushes of `workers`: what is to be told how many entries of `model` are as it leaves them.

        So they can leave at once; None where nobody waits for messages of whom this is the next model, most probably.
        """
        if self._far == Place.INLINE:
            return None
        self._newest, self._begun = self._address(model), self._steps
        chosen = [
            worker
            for worker in self._early.begin(workers)
            if worker in self._read and worker not in self._given and worker not in self._ahead
        ]
        if not chosen:
            return None
        for worker in chosen:
            self._ahead[worker] = self._steps
            self._replies[worker][0][1].begin()
        return partial(self._send_ahead, chosen, model.view(np.uint8))

    def _send_ahead(self, workers: Sequence[int], model: np.ndarray, entries: int) -> None:
        for worker in workers:
            body = self._replies[worker][0][1]
            if body.reach(model, 4 * entries):
                self._sending.add(body)
                self._ring(worker, model.size)

    def _look(self, slot: ReceiveBuffer) -> None:
        if (reader := self._readers.get(slot)) is not None:
            self._take_in(slot, reader.read())
            return
        slot = self._heads.get(slot, slot)
        if not slot.has_first():
            return
        body, apart = self._vectors.get(slot), None
        if body is not None or not slot.whole:
            size = size_of(slot.memory, self._layout, slot.name)
            if not slot.complete(size.nbytes):
                return
            if body is not None and size.place == Place.APART:
                if not body.complete(body.memory.size):
                    return
                apart = body
        message = unpack(slot.memory, self._layout, slot.name, None if apart is None else apart.memory)
        self._take_in(slot, message, *(() if apart is None else (apart,)))

    def _take_in(self, slot: ReceiveBuffer, message: Message, *more: ReceiveBuffer) -> None:
        """A message has come in `slot`, and in `more`: a push stays there until it is answered."""
        source = slot.source
        if message.worker != source:
            raise WireError(f"{slot.name}: says it is of worker {message.worker}")
        self._ready.append((source, message))
        if not isinstance(message, PushMessage) or slot in self._control:
            slot.start()
        elif (read := self._read.get(source)) is None:
            self._read[source] = [slot, *more]
        else:
            read += [slot, *more]

    def flush(self) -> None:
        """Return when models sent have left, and workers are done with those that they read here: x may change."""
        self._steps += 1
        for send_buffer in tuple(self._sending):
            if send_buffer.memory is None:  # else it sends a copy
                self._left(send_buffer)
        for worker in self._reading & self._taken.keys():
            if self._taken[worker][0] != self._given[worker]:
                self._until(partial(self._is_done, worker), worker)
        self._reading.clear()

    def _is_done(self, worker: int) -> bool:
        self._probe()  # what others send meanwhile must not stop them
        return self._taken[worker][0] == self._given[worker]

    def _address(self, array: np.ndarray) -> int:
        """Where `array` lies: asked for of the same one again and again, which takes a microsecond each time."""
        if array is not self._located:
            self._located, self._location = array, array.__array_interface__["data"][0]
        return self._location
