"""Messages over MPI: receives posted before they are needed, no pickle, no allocation in the steady state.

Upwards each bucket of a push is one message, header and payload in one piece of memory: the gradient itself stands
right behind the header and is sent from there. Downwards a small model travels behind the reply's header; a larger one
follows as a message of its own, from the server's model into the worker's, with no copy at either end. A long
message is cut (slot.py), chunk i under tag + i. A worker that may leave k pushes unanswered has k + 1 frames, and the
server as many headers for it: the one due next is that of a push that was answered, so nobody waits for the other to
take a message in; models are received beside the one that is computed on. (Designs and figures: docs/performance.md.)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from ps_elastic.errors import PlatformError, Stalled, WireError
from ps_elastic.memory import aligned
from ps_elastic.messages import Ask, Message, PushMessage, Reply
from ps_elastic.transport.links import Links
from ps_elastic.transport.slot import MPI, Outbox, Slot, chunk_count
from ps_elastic.wire import HEADER_BYTES, Place, pack, reply_bytes, size_of, unpack

INLINE_BYTES = 1 << 15  # models up to here travel behind the reply's header
_TEXT_BYTES = 1 << 16  # longest farewell
_CONTROL, _REPLY, _MODEL, _PUSH = 1, 2, 1000, 10_000
_TAGS = 1000  # per bucket: most chunks of a frame
_POLLED_S = 50e-6, 2e-3  # shortest and longest sleep where a message comes without a ring
_LOOK_S = 0.1  # between two calls of `look`
_RUNG_S = 25e-3, 100e-3  # and where it rings: only a wake that was lost would be late by that


class _End:
    """What both ends share: slots to receive into, sends that have not left yet, and how they wait.

    links: what joins the ranks, None for messages and polling. peers: the ranks that may send here. look: called
    every 0.1 s where a rank is slow to take something in; it may raise.
    """

    look: Callable[[], None] = staticmethod(lambda: None)

    def __init__(
        self, comm: MPI.Comm, layout: bytes, spins: int, patience_s: float, links: Links | None, peers: Iterable[int]
    ) -> None:
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._comm, self._layout, self._spins, self._patience_s = comm, layout, spins, patience_s
        self._bells = bells = links.bells if links else None
        self._probes, self._heard = 0, 0.0  # since the last message, and when there were so many that sleeping began
        self._all_ring = bells is not None and all(peer in bells for peer in peers)
        self._slots: list[Slot] = []
        self._outboxes: list[Outbox] = []
        self._requests: list[MPI.Prequest] = []
        self._places: list[tuple[Slot, int]] = []
        self._ready: deque[tuple[int, Message]] = deque()
        self._sending: set[Outbox] = set()

    def recv(self, timeout: float) -> tuple[int, Message] | None:
        """The next message and its source, or None after `timeout` seconds: spin first, then sleep."""
        if not self._ready:
            self._probe()
        if not self._ready and not timeout:
            self._probe()  # Testsome tells of an arrival only when it is called again
        started = 0.0
        while not self._ready:
            self._probes += 1
            if self._probes > self._spins or not timeout:
                now = time.monotonic()
                started = started or now
                if now - started >= timeout:
                    return None
                self._heard = self._heard or now
                self._rest(now - self._heard, timeout - (now - started))
            self._probe()
        self._probes, self._heard = 0, 0.0
        return self._ready.popleft()

    def _rest(self, waited: float, most: float) -> None:
        """Sleep for at most `most` seconds: until the bell rings, or in proportion to the time `waited` so far.

        So a message that does not ring is late by a few percent, and little is done while nothing happens. What has
        not left yet needs us to look after it, as large messages may travel in many pieces.
        """
        idle = self.idle()
        shortest, longest = _RUNG_S if self._all_ring and idle else _POLLED_S
        sleep = min(most, longest, max(shortest, 0.1 * waited))
        if self._bells is None:
            time.sleep(sleep)
        else:
            if not idle:
                self._nudge()
            self._bells.sleep(sleep, self._arrived)
        self._probe()  # Testsome tells of an arrival only when it is called again

    def _arrived(self) -> bool:
        self._probe()
        self._probe()
        return bool(self._ready)

    def _nudge(self) -> None:
        """Let those who sleep take in the next piece of what is under way to them."""
        if self._bells is not None:
            for outbox in self._sending:
                self._bells.ring(outbox.dest)

    def flush(self) -> None:
        """Return when everything sent has left. Raises Stalled where a rank takes nothing in for `patience_s`."""
        for outbox in tuple(self._sending):
            self._left(outbox)

    def idle(self) -> bool:
        """Whether everything sent has left."""
        for outbox in tuple(self._sending):
            if outbox.left():
                self._sending.remove(outbox)
        return not self._sending

    def close(self) -> None:
        """Take the posted receives back when everything sent has left."""
        self.flush()
        _End.flush(self)
        self.free()

    def free(self) -> None:
        """Take the posted receives back; nothing may be under way."""
        for slot in self._slots:
            slot.free()
        for outbox in self._outboxes:
            outbox.free()

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

    def _outbox(self, dest: int, tag: int, memory: np.ndarray | None = None) -> Outbox:
        self._outboxes.append(Outbox(self._comm, dest, tag, memory))
        return self._outboxes[-1]

    def _send(self, outbox: Outbox, data: np.ndarray) -> None:
        outbox.start(data)
        if not outbox.left():  # a short message leaves at once, and nobody need look after it again
            self._sending.add(outbox)

    def _left(self, outbox: Outbox) -> None:
        """Return when what was last sent there has left, so that its memory may change."""
        if outbox in self._sending:  # not Waitall, from which neither a signal nor a deadline gets us out
            self._until(outbox.left, outbox.dest)
            self._sending.remove(outbox)

    def _until(self, done: Callable[[], bool], dest: int) -> None:
        """Return when `dest` has done its part. Raises Stalled where that takes more than `patience_s`."""
        probes, started, looked = 0, 0.0, 0.0
        while not done():
            probes += 1
            if probes <= self._spins:
                continue
            now = time.monotonic()
            started, looked = started or now, looked or now
            if now - started > self._patience_s:
                raise Stalled(f"rank {dest} took nothing in for {self._patience_s:.0f} s")
            if now - looked > _LOOK_S:
                looked = now
                self.look()
            if self._bells is None:
                time.sleep(_POLLED_S[0])
            else:
                self._bells.ring(dest)
                self._bells.sleep(_POLLED_S[0], done)


class ServerEnd(_End):
    """Rank 0's end. frames: most bytes that each bucket's frame can take; model_bytes: of the flat model.

    spins: probes before it sleeps. patience_s: how long a rank may take nothing in before Stalled is raised.
    model: where the server's model (d,) is to live so that workers of this host see it; None without shared windows.
    pipeline: pushes that a worker may leave unanswered.
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
        links: Links | None = None,
        pipeline: int = 0,
    ) -> None:
        super().__init__(comm, layout, spins, patience_s, links, range(1, comm.Get_size()))
        _refuse_untaggable(comm, frames, model_bytes)
        self._windows = windows = links.windows if links else None
        self.model = windows.model() if windows else None
        self._far = Place.APART if model_bytes > INLINE_BYTES else Place.INLINE
        self._near = Place.SHARED if self._far or (windows and (windows.in_place or windows.torn)) else Place.INLINE
        self._given: dict[int, int] = {}  # worker that shares memory -> how many models it was given there
        self._taken: dict[int, memoryview] = {}  # and how many of them it is done with, where that matters
        self._read: dict[int, list[Slot]] = {}  # worker -> where its push lies until it is answered
        self._shared: dict[Slot, np.ndarray] = {}  # where a push is a header -> the frame in the worker's window
        self._control: set[int] = set()
        self._replies: dict[int, deque[tuple[Outbox, Outbox]]] = {}  # worker -> for heads, for models that go apart
        for worker in range(1, self.size):
            near = windows is not None and worker in windows.workers
            shared = windows.frames(worker) if windows and near else ()
            for i, nbytes in enumerate(frames):
                memory = aligned(HEADER_BYTES if near else nbytes, HEADER_BYTES)
                slot = self._add(Slot(comm, worker, _PUSH + i * _TAGS, memory))
                if shared:
                    self._shared[slot] = shared[i]
            if windows and near:
                self._given[worker] = 0
                if not windows.torn:
                    self._taken[worker] = windows.taken(worker)
            self._replies[worker] = deque()
            for _ in range(pipeline + 1):
                head = aligned(_reply_bytes(model_bytes, frames), HEADER_BYTES)
                self._replies[worker].append((self._outbox(worker, _REPLY, head), self._outbox(worker, _MODEL)))
        for worker in range(1, self.size):  # after the pushes: of two arrivals a push is looked at before an Ask
            control = self._add(Slot(comm, worker, _CONTROL, aligned(HEADER_BYTES + _TEXT_BYTES)))
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
            else:  # a model of an earlier version, or of this worker alone
                place = Place.APART
        packed = pack(message, self._layout, head.memory, model=place)
        if self._windows is not None:
            self._windows.sync()
        self._send(head, packed.head)
        if packed.apart is not None:
            self._send(body, packed.apart.view(np.uint8))
        if self._bells is not None:
            self._bells.ring(dest)

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
        for worker, taken in self._taken.items():
            if taken[0] != self._given[worker]:
                self._until(partial(self._is_done, worker), worker)

    def _is_done(self, worker: int) -> bool:
        self._probe()  # what others send meanwhile must not stop them
        return self._taken[worker][0] == self._given[worker]

    def _lives_there(self, model: np.ndarray) -> bool:
        assert self.model is not None
        return bool(model.__array_interface__["data"] == self.model.__array_interface__["data"])


class WorkerEnd(_End):
    """A worker's end. memory: the model (d,) and the gradient (d,), float32, that lie in the transport's buffers.

    in_place: a push is the gradient itself, in one bucket, so that it is sent from where it is; not where a worker may
    leave `pipeline` pushes unanswered, whose memory must not be that of the model and the gradient under way.
    reads_in_place: the model is the server's own, not to be written to. Where views are torn, a reply's model is the
    server's own too, and the worker copies it into its own, which the server sees.
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
        links: Links | None = None,
        pipeline: int = 0,
    ) -> None:
        super().__init__(comm, layout, spins, patience_s, links, (0,))
        _refuse_untaggable(comm, frames, model_bytes)
        windows = links.windows if links else None
        self._windows = windows if windows and self.rank in windows.workers else None
        self.reads_in_place = self._windows is not None and self._windows.in_place
        if self._windows is not None:
            self._frames, self._count = [self._windows.frames(self.rank)], self._windows.taken(self.rank)
        else:
            self._frames = [[aligned(nbytes, HEADER_BYTES) for nbytes in frames] for _ in range(pipeline + 1)]
        self._pushes = [
            [self._outbox(0, _PUSH + i * _TAGS, frame) for i, frame in enumerate(turn)] for turn in self._frames
        ]
        self._control = self._asks = self._outbox(0, _CONTROL, aligned(HEADER_BYTES + _TEXT_BYTES))
        if pipeline:
            self._asks = self._outbox(0, _PUSH, aligned(HEADER_BYTES))  # behind its pushes: some may not be there yet
        self._head = self._add(Slot(comm, 0, _REPLY, aligned(_reply_bytes(model_bytes, frames), HEADER_BYTES)))
        self._body: Slot | None = None
        torn = self._windows is not None and self._windows.torn
        if self._windows is not None and (self.reads_in_place or torn):
            self._model = self._windows.model()
        else:
            received = aligned(model_bytes)
            self._model = received.view(np.float32)
            if model_bytes > INLINE_BYTES:
                self._body = self._add(Slot(comm, 0, _MODEL, received))
        in_place = in_place and not pipeline
        gradient = self._frames[0][0][HEADER_BYTES : HEADER_BYTES + model_bytes] if in_place else aligned(model_bytes)
        model = aligned(model_bytes).view(np.float32) if pipeline else self._model
        if self._windows is not None and torn:
            model = self._windows.copy(self.rank)
        self.memory = model, gradient.view(np.float32)
        self._seen = 0  # models of the server's that were given to us in shared memory
        self._taken = True
        self._post()

    def send(self, dest: int, message: Message) -> None:
        if not (isinstance(message, PushMessage) and message.bucket):  # else the model may still be computed on
            self._post()
        if isinstance(message, PushMessage):
            outbox = self._pushes[message.step % len(self._pushes)][message.bucket]
        else:
            outbox = self._asks if isinstance(message, Ask) else self._control
        self._left(outbox)
        assert outbox.memory is not None
        data = pack(message, self._layout, outbox.memory).head
        if self._windows is not None and isinstance(message, PushMessage):
            self._windows.sync()
            data = data[:HEADER_BYTES]  # the rest is where the server reads it
        self._send(outbox, data)
        if self._bells is not None:
            self._bells.ring(dest)

    def recv(self, timeout: float) -> tuple[int, Message] | None:
        self._post()
        return super().recv(timeout)

    def flush(self) -> None:
        self._post()
        super().flush()

    def _post(self) -> None:
        """Be ready for the next reply. Its predecessor was read before the worker sends or receives anything more."""
        if self._taken:
            self._taken = False
            self._head.start()
            if self._body:
                self._body.start()
            if self.reads_in_place:
                self._done()

    def _done(self) -> None:
        """Let the server change the models that we were given in shared memory."""
        if self._windows is not None:
            self._windows.sync()
            self._count[0] = self._seen
        if self._bells is not None:
            self._bells.ring(0)

    def _look(self, slot: Slot) -> None:
        if not self._head.has_first():
            return
        head, body, source = self._head.memory, self._body, self._head.name
        nbytes, place = size_of(head, self._layout, source)
        if nbytes > head.size or (place == Place.APART and body is None):
            raise WireError(f"{source}: {nbytes} bytes, expected at most {head.size}")
        if place == Place.SHARED and self._windows is None:
            raise WireError(f"{source}: a model in shared memory, expected one in messages")
        if not self._head.complete(nbytes) or (place == Place.APART and body and not body.complete(body.memory.size)):
            return
        if place == Place.SHARED and self._windows:
            self._windows.sync()
            self._seen += 1
            if not (self.reads_in_place or self._windows.torn):
                self._model[:] = self._windows.model()
                self._done()
        model = None if place == Place.INLINE else self._model
        self._ready.append((0, unpack(head, self._layout, source, model)))
        self._taken = True


def _reply_bytes(model_bytes: int, frames: Sequence[int]) -> int:
    return reply_bytes(model_bytes if model_bytes <= INLINE_BYTES else 0, len(frames))


def _refuse_untaggable(comm: MPI.Comm, frames: Sequence[int], model_bytes: int) -> None:
    """Raise PlatformError where the tags of two messages would meet, or this MPI has none so high."""
    most, highest = chunk_count(max(frames)), _PUSH + len(frames) * _TAGS
    allowed = comm.Get_attr(MPI.TAG_UB) or 0
    if most > _TAGS or chunk_count(model_bytes) > _PUSH - _MODEL or highest > allowed:
        raise PlatformError(
            f"{len(frames)} buckets of up to {most} chunks need more tags than there are ({_TAGS} a bucket, "
            f"{allowed} in all): make the buckets fewer or the chunks (PS_ELASTIC_CHUNK_BYTES) larger"
        )
