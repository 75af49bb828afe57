"""Two ranks that send to and fro: rank 0 prints one JSON line with what `doctor` asks about.

Run under mpirun as `python -m ps_elastic.transport.ping`. Keys: library, size, and with two ranks or more latency_us
(one way, 8 bytes) and bandwidth_bytes_per_s (8 MB); medians, so that a loaded host does not spoil them.
"""

from __future__ import annotations

import json
from statistics import median
from time import perf_counter

import numpy as np
from mpi4py import MPI

SMALL, LARGE = 8, 8_000_000  # bytes


def main() -> None:
    world = MPI.COMM_WORLD
    found: dict[str, object] = {"library": MPI.Get_library_version().strip().split("\n")[0], "size": world.size}
    if world.size > 1:
        small, large = round_trips_s(world, SMALL, 500), round_trips_s(world, LARGE, 10)
        if world.rank == 0:
            found["latency_us"] = 1e6 * median(small) / 2
            found["bandwidth_bytes_per_s"] = 2 * LARGE / median(large)
    if world.rank == 0:
        print(json.dumps(found), flush=True)


def round_trips_s(world: MPI.Comm, nbytes: int, rounds: int, peer: int = 1) -> list[float]:
    """The times of `rounds` round trips from rank 0 to rank `peer` and back, on these two; nothing on other ranks."""
    buffer = np.zeros(nbytes, np.uint8)
    times = []
    for _ in range(rounds):
        started = perf_counter()
        if world.rank == 0:
            world.Send(buffer, peer)
            world.Recv(buffer, peer)
        elif world.rank == peer:
            world.Recv(buffer, 0)
            world.Send(buffer, 0)
        else:
            break
        times.append(perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
