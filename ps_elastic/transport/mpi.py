"""Messages over MPI: receives posted before they are needed, no pickle, no allocation in the steady state.

Upwards each bucket of a push is one message, header and payload in one piece of memory: the gradient itself stands
right behind the header and is sent from there. Downwards a small model travels behind the reply's header; a larger one
follows as a message of its own, from the server's model into the worker's, with no copy at either end. A long
message is cut (slot.py), chunk i under tag + i. (Designs and figures: docs/performance.md.)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from ps_elastic.errors import PlatformError, Stalled, WireError
from ps_elastic.memory import aligned
from ps_elastic.messages import MOST_SETTLED, Message, PushMessage
from ps_elastic.transport.slot import MPI, Slot, chunk_count, chunks
from ps_elastic.wire import HEADER_BYTES, pack, padded, size_of, unpack

INLINE_BYTES = 1 << 15  # models up to here travel behind the reply's header
_TEXT_BYTES = 1 << 16  # longest farewell
_CONTROL, _REPLY, _MODEL, _PUSH = 1, 2, 1000, 10_000
_TAGS = 1000  # per bucket: most chunks of a frame
_SHORTEST_SLEEP_S, _LONGEST_SLEEP_S = 50e-6, 2e-3


class _End:
    """What both ends share: slots to receive into, and sends that have not left yet."""

    def __init__(self, comm: MPI.Comm, layout: bytes, spins: int, patience_s: float) -> None:
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._comm, self._layout, self._spins, self._patience_s = comm, layout, spins, patience_s
        self._slots: list[Slot] = []
        self._requests: list[MPI.Prequest] = []
        self._places: list[tuple[Slot, int]] = []
        self._ready: deque[tuple[int, Message]] = deque()
        self._sending: dict[tuple[int, int], list[MPI.Request]] = {}

    def recv(self, timeout: float) -> tuple[int, Message] | None:
        """The next message and its source, or None after `timeout` seconds: spin first, then sleep ever longer."""
        started, probes, sleep = time.monotonic(), 0, _SHORTEST_SLEEP_S
        while not self._ready:
            self._probe()
            if self._ready:
                break
            probes += 1
            if probes < self._spins:
                continue
            waited = time.monotonic() - started
            if waited >= timeout:
                return None
            time.sleep(min(sleep, timeout - waited))
            # In proportion to the time waited: late by a few percent at most, and idle while nothing happens.
            sleep = min(_LONGEST_SLEEP_S, max(_SHORTEST_SLEEP_S, 0.1 * waited))
            self._probe()  # Testsome tells of an arrival only when it is called again
        return self._ready.popleft()

    def flush(self) -> None:
        """Return when everything sent has left. Raises Stalled where a rank takes nothing in for `patience_s`."""
        for dest, tag in tuple(self._sending):
            self._left(dest, tag)

    def idle(self) -> bool:
        """Whether everything sent has left."""
        return all(MPI.Request.Testall(requests) for requests in self._sending.values())

    def close(self) -> None:
        """Take the posted receives back. Everything sent must have left."""
        self.flush()
        for slot in self._slots:
            slot.free()

    def _add(self, slot: Slot) -> Slot:
        self._slots.append(slot)
        for i, request in enumerate(slot.requests):
            self._requests.append(request)
            self._places.append((slot, i))
        return slot

    def _probe(self) -> None:
        for index in MPI.Request.Testsome(self._requests) or ():
            slot, chunk = self._places[index]
            slot.arrived(chunk)
            self._look(slot)

    def _look(self, slot: Slot) -> None:
        raise NotImplementedError

    def _send(self, dest: int, tag: int, data: np.ndarray) -> None:
        requests = self._sending.setdefault((dest, tag), [])
        for i, chunk in enumerate(chunks(data)):
            requests.append(self._comm.Isend([chunk, MPI.BYTE], dest, tag + i))

    def _left(self, dest: int, tag: int) -> None:
        """Return when what was last sent to `dest` under `tag` has left, so that its memory may change."""
        requests = self._sending.pop((dest, tag), [])
        started, probes = time.monotonic(), 0
        while not MPI.Request.Testall(requests):  # not Waitall, from which neither a signal nor a deadline gets us out
            probes += 1
            if probes < self._spins:
                continue
            if time.monotonic() - started > self._patience_s:
                raise Stalled(f"rank {dest} took nothing in for {self._patience_s:.0f} s")
            time.sleep(_SHORTEST_SLEEP_S)

    def _source(self, slot: Slot) -> str:
        return f"rank {self.rank}: message from rank {slot.source}"


class ServerEnd(_End):
    """Rank 0's end. frames: most bytes that each bucket's frame can take; model_bytes: of the flat model.

    spins: probes before it sleeps. patience_s: how long a rank may take nothing in before Stalled is raised.
    """

    def __init__(
        self, comm: MPI.Comm, layout: bytes, frames: Sequence[int], model_bytes: int, spins: int, patience_s: float
    ) -> None:
        super().__init__(comm, layout, spins, patience_s)
        _refuse_untaggable(comm, frames, model_bytes)
        self._apart = model_bytes > INLINE_BYTES
        self._read: dict[int, list[Slot]] = {}  # worker -> where its push lies until it is answered
        self._control: set[int] = set()
        self._heads: dict[int, np.ndarray] = {}
        for worker in range(1, self.size):
            for i, nbytes in enumerate(frames):
                self._add(Slot(comm, worker, _PUSH + i * _TAGS, aligned(nbytes, HEADER_BYTES)))
            self._heads[worker] = aligned(_reply_bytes(model_bytes), HEADER_BYTES)
        for worker in range(1, self.size):  # after the pushes: of two arrivals a push is looked at before an Ask
            control = self._add(Slot(comm, worker, _CONTROL, aligned(HEADER_BYTES + _TEXT_BYTES)))
            self._control.add(id(control))
        for slot in self._slots:
            slot.start()

    def send(self, dest: int, message: Message) -> None:
        """Send a reply; from now on the memory of the push that it answers is received into again."""
        for slot in self._read.pop(dest, ()):
            slot.start()
        self._left(dest, _REPLY)
        self._left(dest, _MODEL)
        packed = pack(message, self._layout, self._heads[dest], model_apart=self._apart)
        self._send(dest, _REPLY, packed.head)
        if packed.apart is not None:
            self._send(dest, _MODEL, packed.apart.view(np.uint8))

    def _look(self, slot: Slot) -> None:
        if not slot.has_first():
            return
        nbytes, _ = size_of(slot.memory, self._layout, self._source(slot))
        if nbytes > slot.memory.size:
            raise WireError(f"{self._source(slot)}: {nbytes} bytes, expected at most {slot.memory.size}")
        if not slot.complete(nbytes):
            return
        message = unpack(slot.memory[:nbytes], self._layout, self._source(slot))
        if message.worker != slot.source:
            raise WireError(f"{self._source(slot)}: says it is of worker {message.worker}")
        self._ready.append((slot.source, message))
        if id(slot) in self._control:
            slot.start()
        else:
            self._read.setdefault(slot.source, []).append(slot)


class WorkerEnd(_End):
    """A worker's end. memory: the model (d,) and the gradient (d,), float32, that lie in the transport's buffers.

    in_place: a push is the gradient itself, in one bucket, so that it is sent from where it is.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        layout: bytes,
        frames: Sequence[int],
        model_bytes: int,
        spins: int,
        patience_s: float,
        *,
        in_place: bool,
    ) -> None:
        super().__init__(comm, layout, spins, patience_s)
        _refuse_untaggable(comm, frames, model_bytes)
        self._frames = [aligned(nbytes, HEADER_BYTES) for nbytes in frames]
        self._farewell = aligned(HEADER_BYTES + _TEXT_BYTES)
        self._model = aligned(model_bytes)
        self._head = self._add(Slot(comm, 0, _REPLY, aligned(_reply_bytes(model_bytes), HEADER_BYTES)))
        self._body = self._add(Slot(comm, 0, _MODEL, self._model)) if model_bytes > INLINE_BYTES else None
        gradient = self._frames[0][HEADER_BYTES : HEADER_BYTES + model_bytes] if in_place else aligned(model_bytes)
        self.memory = self._model.view(np.float32), gradient.view(np.float32)
        self._taken = True
        self._post()

    def send(self, dest: int, message: Message) -> None:
        self._post()
        if isinstance(message, PushMessage):
            tag, buffer = _PUSH + message.bucket * _TAGS, self._frames[message.bucket]
        else:
            tag, buffer = _CONTROL, self._farewell
        self._left(dest, tag)
        self._send(dest, tag, pack(message, self._layout, buffer).head)

    def recv(self, timeout: float) -> tuple[int, Message] | None:
        self._post()
        return super().recv(timeout)

    def _post(self) -> None:
        """Be ready for the next reply. Its predecessor was read before the worker sends or receives anything more."""
        if self._taken:
            self._taken = False
            self._head.start()
            if self._body:
                self._body.start()

    def _look(self, slot: Slot) -> None:
        if not self._head.has_first():
            return
        head, source = self._head.memory, self._source(self._head)
        nbytes, apart = size_of(head, self._layout, source)
        if nbytes > head.size or (apart and self._body is None):
            raise WireError(f"{source}: {nbytes} bytes, expected at most {head.size}")
        if not self._head.complete(nbytes) or (apart and self._body and not self._body.complete(self._model.size)):
            return
        model = self._model.view(np.float32) if apart else None
        self._ready.append((0, unpack(head[:nbytes], self._layout, source, model)))
        self._taken = True


def _reply_bytes(model_bytes: int) -> int:
    inline = padded(model_bytes) if model_bytes <= INLINE_BYTES else 0
    return HEADER_BYTES + inline + MOST_SETTLED * 24


def _refuse_untaggable(comm: MPI.Comm, frames: Sequence[int], model_bytes: int) -> None:
    """Raise PlatformError where the tags of two messages would meet, or this MPI has none so high."""
    most, highest = chunk_count(max(frames)), _PUSH + len(frames) * _TAGS
    allowed = comm.Get_attr(MPI.TAG_UB) or 0
    if most > _TAGS or chunk_count(model_bytes) > _PUSH - _MODEL or highest > allowed:
        raise PlatformError(
            f"{len(frames)} buckets of up to {most} chunks need more tags than there are ({_TAGS} a bucket, "
            f"{allowed} in all): make the buckets fewer or the chunks (PS_ELASTIC_CHUNK_BYTES) larger"
        )
