"""A worker's end of the transport; what both ends share: endpoint.py."""

from __future__ import annotations

from collections.abc import Callable

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
from ps_elastic.transport.messages import Ask, Message, PushMessage
from ps_elastic.transport.mpi import MPI
from ps_elastic.transport.wire import HEADER_BYTES, Place, pack, padded, size_of, unpack
from ps_elastic.vectors.memory import aligned


class WorkerEndpoint(Endpoint):
    """A worker's end. memory: the model (d,) and the gradient (d,), float32, that lie in the transport's buffers.

    in_place: a push is the gradient itself, in one bucket, so that it is sent from where it is; not where a worker may
    leave `pipeline` pushes unanswered, whose memory must not be that of the model and the gradient under way.
    compares: the worker compares the model of a reply with the one that it computed on. On the server's host the first
    is the server's own, `apart` from the memory of the second, until the worker says that it has `taken` it.
    reads_in_place: the model is the server's own, not to be written to. With `views: torn`, a reply's model is the
    server's own too, and the worker copies it into its own, which the server sees unless workers write. help: called
    again and again while it waits, for work that the server has for those who do.
    """

    help: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self, comm: MPI.Comm, traffic: Traffic, *, in_place: bool, compares: bool = False) -> None:
        super().__init__(comm, traffic, (0,))
        frames, model_bytes, pipeline = traffic.frames, traffic.model_bytes, traffic.pipeline
        windows = traffic.links.windows if traffic.links else None
        self._windows = windows if windows and self.rank in windows.workers else None
        self.reads_in_place = self._windows is not None and self._windows.in_place
        self._writes = self._windows is not None and self._windows.written > 0  # so that headers go alone, in frames
        if self._windows is not None:
            self._count = self._windows.taken(self.rank)
        self._vectors: dict[int, SendBuffer] = {}  # of the buckets that are sent apart from their header
        if self._windows is not None and not self._writes:
            self._frames = [self._windows.frames(self.rank)]
        else:
            far = traffic.vectors if self._windows is None else ()
            alone = [nbytes if goes_apart(nbytes) else 0 for nbytes in far] or [0] * len(frames)
            inside = [nbytes - padded(other) for nbytes, other in zip(frames, alone, strict=True)]
            self._frames = [[aligned(nbytes, HEADER_BYTES) for nbytes in inside] for _ in range(pipeline + 1)]
            self._vectors = {
                i: self._send_buffer(0, PUSH + i * TAGS + VECTOR) for i, nbytes in enumerate(alone) if nbytes
            }
        self._pushes = [
            [self._send_buffer(0, PUSH + i * TAGS, frame) for i, frame in enumerate(turn)] for turn in self._frames
        ]
        self._control = self._asks = self._send_buffer(0, CONTROL, aligned(HEADER_BYTES + TEXT_BYTES))
        if pipeline:
            self._asks = self._send_buffer(
                0, PUSH, aligned(HEADER_BYTES)
            )  # behind its pushes: some may not be there yet
        self._head = self._add(
            ReceiveBuffer(comm, 0, REPLY, aligned(most_reply_bytes(model_bytes, frames), HEADER_BYTES))
        )
        self._body: ReceiveBuffer | None = None
        torn = self._windows is not None and self._windows.torn
        self.apart = self._lends = compares and self._windows is not None and not self.reads_in_place and not torn
        if self._windows is not None and (self.reads_in_place or torn):
            self._model = self._windows.model()
        else:
            received = aligned(model_bytes)
            self._model = received.view(np.float32)
            if not is_inline(model_bytes):
                self._body = self._add(ReceiveBuffer(comm, 0, MODEL, received, piece_bytes(model_bytes)))
        in_place = in_place and not pipeline and not self._writes
        gradient = self._frames[0][0][HEADER_BYTES : HEADER_BYTES + model_bytes] if in_place else aligned(model_bytes)
        model = aligned(model_bytes).view(np.float32) if pipeline or self.apart or self._writes else self._model
        if self._windows is not None and torn and not self._writes:
            model = self._windows.copy(self.rank)
        self.memory = model, gradient.view(np.float32)
        self._seen = 0  # models of the server's that were given to us in shared memory
        self._taken = self._read = True
        self._stale = False  # a model is on its way that is not that of the reply whose header is here
        self._post()

    def send(self, dest: int, message: Message) -> None:
        if not (isinstance(message, PushMessage) and message.bucket):  # else the model may still be computed on
            self._post_head()
        body = None
        if isinstance(message, PushMessage):
            send_buffer = self._pushes[message.step % len(self._pushes)][message.bucket]
            body = self._vectors.get(message.bucket)
        else:
            send_buffer = self._asks if isinstance(message, Ask) else self._control
        self._left(send_buffer)
        assert send_buffer.memory is not None
        packed = pack(message, self._layout, send_buffer.memory, place=Place.INLINE if body is None else Place.APART)
        data = packed.head
        if self._windows is not None and isinstance(message, PushMessage):
            self._windows.sync()
            if not self._writes:
                data = data[:HEADER_BYTES]  # the rest is where the server reads it
        self._send(send_buffer, data)
        nbytes = data.size
        if body is not None and packed.apart is not None:
            self._left(body)
            self._send(body, packed.apart.view(np.uint8))
            nbytes = packed.apart.nbytes
        self._ring(dest, nbytes)

    def recv(self, timeout: float) -> tuple[int, Message] | None:
        self._post()
        return super().recv(timeout)

    def flush(self) -> None:
        self._post()
        super().flush()

    def _probe(self) -> None:
        if self.help():
            self._probes = 0  # the reply is about to come
        super()._probe()

    def _post(self) -> None:
        """Be ready for the next reply and its model, as the worker does not look at the last one any more."""
        self._post_head()
        if self._read:
            self._read = False
            if self._body:
                self._body.start()

    def _post_head(self) -> None:
        """Be ready for the next reply. Its predecessor was read before the worker sends or receives anything more."""
        if self._taken:
            self._taken = False
            self._head.start()
            if self.reads_in_place:
                self._done()
            self.taken()

    def taken(self) -> None:
        """The model of the last reply was read."""
        if self._lends and self._count[0] != self._seen:
            self._done()

    def _done(self) -> None:
        """Let the server change the models that we were given in shared memory."""
        if self._windows is not None:
            self._windows.sync()
            self._count[0] = self._seen
        if self._doorbells is not None:
            self._doorbells.wake(0)

    def _look(self, slot: ReceiveBuffer) -> None:
        if not self._head.has_first():
            return
        head, body, source = self._head.memory, self._body, self._head.name
        nbytes, place, stale = size_of(head, self._layout, source)
        if nbytes > head.size or (place == Place.APART and body is None):
            raise WireError(f"{source}: {nbytes} bytes, expected at most {head.size}")
        if place == Place.SHARED and self._windows is None:
            raise WireError(f"{source}: a model in shared memory, expected one in messages")
        if not self._head.complete(nbytes):
            return
        if body and stale and not self._stale:
            if not body.complete(body.memory.size):
                return
            self._stale = True  # what came is not wanted
            body.start()
        if body and place == Place.APART and not body.complete(body.memory.size):
            return
        self._stale = False
        if place == Place.SHARED and self._windows:
            self._windows.sync()
            self._seen += 1
            if not (self.reads_in_place or self._windows.torn or self._lends):
                self._model[:] = self._windows.model()
                self._done()
        model = None if place == Place.INLINE else self._model
        if place == Place.SHARED and self._lends and self._windows:
            model = self._windows.model()
        self._ready.append((0, unpack(head, self._layout, source, model)))
        self._taken, self._read = True, self._read or place == Place.APART
