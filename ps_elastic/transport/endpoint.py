"""Messages over MPI: receives posted before they are needed, no pickle, no allocation in the steady state.

Upwards a push in one piece is one message: the gradient itself stands right behind the header and is sent from there.
Of buckets, a large one that is the gradient itself follows its header as a message of its own, from the gradient into
the server's memory; what is small, or encoded, stands behind its header. Downwards a small model travels behind the
reply's header; a larger one is messages of its own, from the server's model into the worker's. So no large vector is
copied at either end. A long message is cut (buffers.py), chunk i under tag + i; a model into pieces, which may leave
before the reply, while the step goes on that makes the rest (eager.py). A worker with k pushes without reply has
k + 1 frames, and the server as many headers for it: the one due next is that of a push that was answered, so nobody
waits for the other to take a message in; models are received beside the one that is computed on. (Designs and figures:
docs/evidence/performance.md.)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ps_elastic.errors import PlatformError, Stalled
from ps_elastic.transport import buffers as slots
from ps_elastic.transport.buffers import ReceiveBuffer, SendBuffer, chunk_count
from ps_elastic.transport.links import Links
from ps_elastic.transport.messages import Message
from ps_elastic.transport.mpi import MPI
from ps_elastic.transport.wire import reply_bytes

INLINE_BYTES = 1 << 15  # models up to here travel behind the reply's header
TEXT_BYTES = 1 << 16  # longest exit message
CONTROL, REPLY, MODEL, PUSH = 1, 2, 1000, 10_000
TAGS = 1000  # per bucket: most chunks of a frame
VECTOR = TAGS // 2  # and from here, above those of its frame, of a vector that is apart
_LEAST_PIECE, _MOST_PIECES = 1 << 20, 32  # of a model: pieces of less cost more than they gain
_EAGER_BYTES = 4000  # what MPI takes over when it is started, beside its own header
_MANY = 8  # at a time: MPI may have left others for the next time that it is asked
_DUE = 3  # for what was rung for: Testsome tells of an arrival only when it is called again
_POLLED_S = 50e-6, 2e-3  # shortest and longest sleep where a message comes without a ring
_LOOK_S = 0.1  # between two calls of `look`
_RUNG_S = 25e-3, 100e-3  # and where it rings: only a wake that was lost would be late by that


class Traffic(NamedTuple):
    """What goes to and fro between the server and its workers, and how this rank waits for it.

    layout: its digest. frames: most bytes that each bucket's frame can take. model_bytes: of the flat model.
    spins: probes before it sleeps. patience_s: how long a rank may take nothing in before Stalled is raised.
    links: what joins the ranks, None for messages and polling. pipeline: pushes that a worker may leave unanswered.
    vectors: bytes of each bucket that is the gradient itself, to be sent from where it is; none: no such.
    """

    layout: bytes
    frames: Sequence[int]
    model_bytes: int
    spins: int
    patience_s: float
    links: Links | None = None
    pipeline: int = 0
    vectors: Sequence[int] = ()


class Endpoint:
    """What both ends share: slots to receive into, sends that have not left yet, and how they wait.

    peers: the ranks that may send here. look: called every 0.1 s where a rank is slow to take something in; it may
    raise.
    """

    look: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, comm: MPI.Comm, traffic: Traffic, peers: Iterable[int]) -> None:
        refuse_untaggable(comm, traffic.frames, traffic.model_bytes)
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._comm, self._layout = comm, traffic.layout
        self._spins, self._patience_s = traffic.spins, traffic.patience_s
        self._doorbells = doorbells = traffic.links.doorbells if traffic.links else None
        self._probes, self._heard = 0, 0.0  # since the last message, and when there were so many that sleeping began
        self._all_ring = doorbells is not None and all(peer in doorbells for peer in peers)
        self._slots: list[ReceiveBuffer] = []
        self._send_buffers: list[SendBuffer] = []
        self._requests: list[MPI.Prequest] = []
        self._places: list[tuple[ReceiveBuffer, int]] = []
        self._ready: deque[tuple[int, Message]] = deque()
        self._sending: set[SendBuffer] = set()  # what may not leave unless it is looked after
        self._due = 0  # times that MPI is to be asked for what was rung for

    def recv(self, timeout: float) -> tuple[int, Message] | None:
        """The next message and its source, or None after `timeout` seconds: spin first, then sleep."""
        if not self._ready:
            self._probe()
        if not self._ready and not timeout:
            self._probe()
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
        self._sending = {send_buffer for send_buffer in self._sending if not send_buffer.left()}
        idle = not self._sending
        shortest, longest = _RUNG_S if self._all_ring and idle else _POLLED_S
        sleep = min(most, longest, max(shortest, 0.1 * waited))
        if self._doorbells is None:
            time.sleep(sleep)
        else:
            if not idle:
                self._nudge()
            self._doorbells.sleep(sleep, self._arrived)
        self._due = _DUE
        self._probe()

    def _arrived(self) -> bool:
        self._probe()
        self._probe()
        return bool(self._ready)

    def _nudge(self) -> None:
        """Let those who sleep take in the next piece of what is under way to them."""
        if self._doorbells is not None:
            for send_buffer in self._sending:
                self._doorbells.ring(send_buffer.dest)

    def taken(self) -> None:
        """The model of the last reply was read, and may change: nobody waits for that here."""

    def flush(self) -> None:
        """Return when everything sent has left. Raises Stalled where a rank takes nothing in for `patience_s`."""
        for send_buffer in self._send_buffers:
            self._left(send_buffer)

    def idle(self) -> bool:
        """Whether everything sent has left."""
        return all(send_buffer.left() for send_buffer in self._send_buffers)

    def close(self) -> None:
        """Take the posted receives back when everything sent has left."""
        self.flush()
        Endpoint.flush(self)
        self.free()

    def free(self) -> None:
        """Take the posted receives back; nothing may be under way."""
        for slot in self._slots:
            slot.free()
        for send_buffer in self._send_buffers:
            send_buffer.free()

    def _add(self, slot: ReceiveBuffer) -> ReceiveBuffer:
        self._slots.append(slot)
        for i, request in enumerate(slot.requests):
            self._requests.append(request)
            self._places.append((slot, i))
        return slot

    def _probe(self) -> None:
        """Take in what has come, if MPI tells of it; where all ring, it is asked only when somebody did."""
        if self._all_ring and not self._sending:
            assert self._doorbells is not None
            if self._doorbells.rung():
                self._due = _DUE
            elif not self._due:
                return
            self._due -= 1
        arrived = MPI.Request.Testsome(self._requests) or ()
        if arrived:
            self._due = _DUE if len(arrived) >= _MANY else 0
        for index in arrived:
            slot, chunk = self._places[index]
            slot.arrived(chunk)
            self._look(slot)

    def _ring(self, dest: int, nbytes: int) -> None:
        """Tell `dest`, if it is on this host, that so much was sent to it in a piece."""
        if self._doorbells is not None:
            self._doorbells.ring(dest, long=nbytes > _EAGER_BYTES)

    def _look(self, slot: ReceiveBuffer) -> None:
        raise NotImplementedError

    def _send_buffer(self, dest: int, tag: int, memory: np.ndarray | None = None, chunk_bytes: int = 0) -> SendBuffer:
        self._send_buffers.append(SendBuffer(self._comm, dest, tag, memory, chunk_bytes))
        return self._send_buffers[-1]

    def _send(self, send_buffer: SendBuffer, data: np.ndarray) -> None:
        send_buffer.start(data)
        # Not asked about now: where ranks outnumber cores, MPI's Test gives the core away.
        if data.size > _EAGER_BYTES or send_buffer.memory is None:
            self._sending.add(send_buffer)

    def _left(self, send_buffer: SendBuffer) -> None:
        """Return when what was last sent there has left, so that its memory may change."""
        if not send_buffer.left():  # not Waitall, from which neither a signal nor a deadline gets us out
            self._until(send_buffer.left, send_buffer.dest)
        self._sending.discard(send_buffer)

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
            if self._doorbells is None:
                time.sleep(_POLLED_S[0])
            else:
                self._doorbells.ring(dest)
                self._doorbells.sleep(_POLLED_S[0], done)


def is_inline(model_bytes: int) -> bool:
    """Whether a model of so many bytes travels behind the reply's header."""
    return model_bytes <= INLINE_BYTES


def piece_bytes(model_bytes: int) -> int:
    """How much of a model of so many bytes is sent at a time; a multiple of 4."""
    return min(slots.CHUNK_BYTES, max(_LEAST_PIECE, 4 * -(-model_bytes // (4 * _MOST_PIECES))))


def goes_apart(nbytes: int) -> bool:
    """Whether a bucket that is the gradient itself, so many bytes, follows its header from where it is.

    To copy a smaller one behind its header takes no longer than a second message.
    """
    return nbytes > INLINE_BYTES


def most_reply_bytes(model_bytes: int, frames: Sequence[int]) -> int:
    """Most bytes of a reply, without a model that follows apart."""
    return reply_bytes(model_bytes if is_inline(model_bytes) else 0, len(frames))


def refuse_untaggable(comm: MPI.Comm, frames: Sequence[int], model_bytes: int) -> None:
    """Raise PlatformError where the tags of two messages would meet, or this MPI has none so high."""
    most, highest = chunk_count(max(frames), slots.CHUNK_BYTES), PUSH + len(frames) * TAGS
    allowed = comm.Get_attr(MPI.TAG_UB) or 0
    if most > VECTOR or chunk_count(model_bytes, piece_bytes(model_bytes)) > PUSH - MODEL or highest > allowed:
        raise PlatformError(
            f"{len(frames)} buckets of up to {most} chunks need more tags than there are ({VECTOR} a bucket, "
            f"{allowed} in all): make the buckets fewer or the chunks (PS_ELASTIC_CHUNK_BYTES) larger"
        )
