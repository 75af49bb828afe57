"""One model down and one gradient up, each longer than an int can count: `mpirun -n 2 python payload.py`."""

from __future__ import annotations

import numpy as np

from ps_elastic.transport.endpoint import Traffic
from ps_elastic.transport.messages import PushMessage, Reply
from ps_elastic.transport.mpi import MPI
from ps_elastic.transport.server_endpoint import ServerEndpoint
from ps_elastic.transport.wire import HEADER_BYTES
from ps_elastic.transport.worker_endpoint import WorkerEndpoint

FLOATS = 550_000_000
PIECE = 1 << 22  # floats looked at together, so that the check needs no memory of its own
LAYOUT = b"the layout, 32 bytes of a digest"


def fill(vector: np.ndarray, first: int) -> None:
    for start in range(0, vector.size, PIECE):
        piece = vector[start : start + PIECE].view(np.uint32)
        piece[:] = np.arange(first + start, first + start + piece.size, dtype=np.uint32)


def check(vector: np.ndarray, first: int) -> None:
    for start in range(0, vector.size, PIECE):
        piece = vector[start : start + PIECE].view(np.uint32)
        expected = np.arange(first + start, first + start + piece.size, dtype=np.uint32)
        assert np.array_equal(piece, expected), f"in the piece at {start}"


comm = MPI.COMM_WORLD
traffic = Traffic(LAYOUT, [HEADER_BYTES + 4 * FLOATS], 4 * FLOATS, 3, 100.0)
if comm.Get_rank() == 0:
    model = np.empty(FLOATS, np.float32)
    fill(model, 1)
    server = ServerEndpoint(comm, traffic)
    server.send(1, Reply(1, 0, 0, model))
    received = server.recv(100.0)
    assert received is not None
    check(received[1].arrays[0], 7)
    server.close()
    print(received[1].arrays[0].nbytes, "bytes each way")
else:
    worker = WorkerEndpoint(comm, traffic, in_place=True)
    reply = worker.recv(100.0)
    assert reply is not None
    check(reply[1].model, 1)
    fill(worker.memory[1], 7)
    worker.send(0, PushMessage(1, 1, 0, (worker.memory[1],)))
    worker.close()
