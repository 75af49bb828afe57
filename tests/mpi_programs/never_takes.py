"""A server changes its model while rank 2 has not taken the last one: `mpirun -n 3 python never_takes.py`."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from ps_elastic.errors import Stalled
from ps_elastic.transport.endpoint import Traffic
from ps_elastic.transport.links import join
from ps_elastic.transport.messages import Reply
from ps_elastic.transport.mpi import MPI
from ps_elastic.transport.server_endpoint import ServerEndpoint
from ps_elastic.transport.windows import WindowSizes
from ps_elastic.transport.wire import HEADER_BYTES
from ps_elastic.transport.worker_endpoint import WorkerEndpoint

FLOATS = 20_000


def until(name: str) -> None:
    """Wait for a file, not a message: that would let MPI work."""
    limit = time.monotonic() + 60.0
    while not Path(name).exists():
        assert time.monotonic() < limit, name
        time.sleep(0.005)


world = MPI.COMM_WORLD
frames = [HEADER_BYTES + 4 * FLOATS]
links = join(world, "shared", 1, WindowSizes(frames, 4 * FLOATS, in_place=False))
traffic = Traffic(bytes(32), frames, 4 * FLOATS, 3, 1.0, links)
if world.Get_rank() == 0:
    server = ServerEndpoint(world, traffic)
    assert server.model is not None
    server.model[:] = 7
    for worker in (1, 2):
        server.send(worker, Reply(worker, 0, 0, server.model))
    until("taken")
    started = time.monotonic()
    try:
        server.flush()
    except Stalled as error:
        assert 1.0 <= time.monotonic() - started < 20
        print(error, flush=True)
    finally:
        Path("given up").touch()
    world.Barrier()
else:
    end = WorkerEndpoint(world, traffic, in_place=True)
    if world.Get_rank() == 2:
        until("given up")
    _, reply = end.recv(60.0) or (0, None)
    assert isinstance(reply, Reply) and np.all(reply.model == 7)
    if world.Get_rank() == 1:
        Path("taken").touch()
    world.Barrier()
