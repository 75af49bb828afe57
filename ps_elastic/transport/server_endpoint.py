"""Rank 0's end of the transport; what both ends share: endpoint.py."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

import numpy as np

from ps_elastic.errors import WireError
from ps_elastic.transport.buffers import ReceiveBuffer, SendBuffer
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
from ps_elastic.transport.messages import Message, PushMessage, Reply
from ps_elastic.transport.mpi import MPI
from ps_elastic.transport.wire import HEADER_BYTES, Place, pack, padded, size_of, unpack
from ps_elastic.vectors.memory import aligned

_IN_A_ROW = 2  # answers of this kind that a worker must have got


class ServerEndpoint(Endpoint):
    """Rank 0's end.

    model: where the server's model (d,) is to live so that workers of this host see it; None without shared windows.
    """

    def __init__(self, comm: MPI.Comm, traffic: Traffic) -> None:
        super().__init__(comm, traffic, range(1, comm.Get_size()))
        frames, model_bytes, vectors = traffic.frames, traffic.model_bytes, traffic.vectors
        self._windows = windows = traffic.links.windows if traffic.links else None
        self.model = windows.model() if windows else None
        self._far = Place.INLINE if is_inline(model_bytes) else Place.APART
        self._near = Place.SHARED if self._far or (windows and (windows.in_place or windows.torn)) else Place.INLINE
        self._given: dict[int, int] = {}  # worker that shares memory -> how many models it was given there
        self._taken: dict[int, memoryview] = {}  # and how many of them it is done with, where that matters
        self._reading: set[int] = set()  # those that may not be done with the last
        self._read: dict[int, list[ReceiveBuffer]] = {}  # worker -> where its push lies until it is answered
        self._shared: dict[
            ReceiveBuffer, np.ndarray
        ] = {}  # where a push is a header -> the frame in the worker's window
        self._vectors: dict[
            ReceiveBuffer, ReceiveBuffer
        ] = {}  # where a bucket may be apart from its header -> where it arrives
        self._heads: dict[ReceiveBuffer, ReceiveBuffer] = {}  # and back
        self._control: set[int] = set()
        self._replies: dict[
            int, deque[tuple[SendBuffer, SendBuffer]]
        ] = {}  # worker -> for heads, for models that go apart
        for worker in range(1, self.size):
            near = windows is not None and worker in windows.workers
            shared = windows.frames(worker) if windows and near and not windows.written else ()
            for i, nbytes in enumerate(frames):
                apart = vectors[i] if vectors and not near and goes_apart(vectors[i]) else 0
                memory = aligned(HEADER_BYTES if shared else nbytes - padded(apart), HEADER_BYTES)
                slot = self._add(ReceiveBuffer(comm, worker, PUSH + i * TAGS, memory))
                if shared:
                    self._shared[slot] = shared[i]
                if apart:
                    self._vectors[slot] = self._add(
                        ReceiveBuffer(comm, worker, PUSH + i * TAGS + VECTOR, aligned(apart))
                    )
                    self._heads[self._vectors[slot]] = slot
            if windows and near:
                self._given[worker] = 0
                if not windows.torn:
                    self._taken[worker] = windows.taken(worker)
            self._replies[worker] = deque()
            for _ in range(traffic.pipeline + 1):
                head = aligned(most_reply_bytes(model_bytes, frames), HEADER_BYTES)
                body = self._send_buffer(worker, MODEL, chunk_bytes=piece_bytes(model_bytes))
                self._replies[worker].append((self._send_buffer(worker, REPLY, head), body))
        for worker in range(1, self.size):  # after the pushes: of two arrivals a push is looked at before an Ask
            control = self._add(ReceiveBuffer(comm, worker, CONTROL, aligned(HEADER_BYTES + TEXT_BYTES)))
            self._control.add(id(control))
        self._early, self._steps = EagerModels(), 0
        self._ahead: dict[int, int] = {}  # worker -> the step whose model has left for it ahead of its reply
        self._newest, self._begun = 0, 0  # where that model lies, and the step that it is of
        for slot in self._slots:
            slot.start()

    def send(self, dest: int, message: Message) -> None:
        """Send a reply; from now on the memory of the push that it answers is received into again."""
        for slot in self._read.pop(dest, ()):
            slot.start()
        head, body = self._replies[dest][0]
        self._replies[dest].rotate(-1)
        self._left(head)
        assert head.memory is not None
        place = self._near if dest in self._given else self._far
        if isinstance(message, Reply) and message.model is not None and place == Place.SHARED:
            if self._lives_there(message.model):
                self._given[dest] += 1
                self._reading.add(dest)
            else:  # a model of an earlier version, or of this worker alone
                place = Place.APART
        ahead = self._ahead.pop(dest, None)
        whole = isinstance(message, Reply) and message.model is not None and _address(message.model) == self._newest
        newest = whole and self._begun == self._steps  # nothing changed it after the step
        self._early.answered(dest, newest=newest)
        is_there = ahead == self._steps and newest
        packed = pack(message, self._layout, head.memory, place=place, stale=ahead is not None and not is_there)
        if self._windows is not None:
            self._windows.sync()
        self._send(head, packed.head)
        if packed.apart is not None and not is_there:
            self._left(body)
            self._send(body, packed.apart.view(np.uint8))
        self._ring(dest, packed.head.size if packed.apart is None else packed.apart.nbytes)

    def begin_step(self, workers: Collection[int], model: np.ndarray) -> Callable[[int], None] | None:
        """Begin a step of pushes of `workers`: what is to be told how many entries of `model` are as it leaves them.

        So they can leave at once; None where nobody waits for messages of whom this is the next model, most probably.
        """
        self._newest, self._begun = _address(model), self._steps
        chosen = [
            worker
            for worker in self._early.begin(workers)
            if worker in self._read and worker not in self._given and worker not in self._ahead
        ]
        if not chosen or self._far == Place.INLINE:
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
        slot = self._heads.get(slot, slot)
        if not slot.has_first():
            return
        frame, body, apart = self._shared.get(slot), self._vectors.get(slot), None
        if frame is None:
            frame = slot.memory
            if body is not None or not slot.whole:
                size = size_of(frame, self._layout, slot.name)
                if not slot.complete(size.nbytes):
                    return
                if body is not None and size.place == Place.APART:
                    if not body.complete(body.memory.size):
                        return
                    apart = body.memory
        message = unpack(frame, self._layout, slot.name, apart)
        if message.worker != slot.source:
            raise WireError(f"{slot.name}: says it is of worker {message.worker}")
        self._ready.append((slot.source, message))
        if id(slot) in self._control or not isinstance(message, PushMessage):
            slot.start()
        else:
            self._read.setdefault(slot.source, []).append(slot)
            if body is not None and apart is not None:
                self._read[slot.source].append(body)

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

    def _lives_there(self, model: np.ndarray) -> bool:
        assert self.model is not None
        return _address(model) == _address(self.model)


def _address(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


class EagerModels:
    """Workers whose last pushes were each answered with the model of the very step that was made of them.

    They will probably be answered so again: the pieces of the model leave to them as the step makes them. Nobody is
    answered before the rule has said so. What has left is then the rest of the answer, or, where the rule wants
    something else, is told to be stale by the next reply.
    """

    def __init__(self) -> None:
        self._row: dict[int, int] = {}  # worker -> so many answers in a row
        self._pushed: set[int] = set()  # workers of the last step's pushes that nobody answered yet

    def begin(self, workers: Iterable[int]) -> list[int]:
        """A step begins, of pushes of `workers`: those to whom its model may leave early."""
        for worker in self._pushed:
            self._row[worker] = 0
        self._pushed = set(workers)
        return sorted(worker for worker in self._pushed if self._row.get(worker, 0) >= _IN_A_ROW)

    def answered(self, worker: int, *, newest: bool) -> None:
        """A worker was answered; newest: with the model as the last step left it."""
        if worker in self._pushed:
            self._pushed.discard(worker)
            self._row[worker] = self._row.get(worker, 0) + 1 if newest else 0
