"""What MPI itself takes: bare loops over mpi4py that move the same bytes. Rank 0 serves, as in a run of ours."""

from __future__ import annotations

import time

import numpy as np
import torch

from ps_elastic.transport.mpi import MPI
from ps_elastic.vectors.memory import aligned

_LR = 1e-3


def ping_pong(world: MPI.Comm, nbytes: int, rounds: int) -> list[float]:
    """The times of `rounds` round trips of `nbytes` each way, on rank 1; nothing on others."""
    return _round_trips(world, aligned(nbytes), rounds)


def exchange(world: MPI.Comm, floats: int, rounds: int) -> list[float]:
    """As `ping_pong`; in between rank 0 makes one SGD update, x -= lr g, of so many floats."""
    x, g = torch.zeros(floats), torch.zeros(floats)
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        if world.Get_rank() == 0:
            world.Recv(g.numpy(), 1)
            x.add_(g, alpha=-_LR)
            world.Send(x.numpy(), 1)
        elif world.Get_rank() == 1:
            world.Send(g.numpy(), 0)
            world.Recv(x.numpy(), 0)
            times.append(time.perf_counter() - started)
    return times


def echo(world: MPI.Comm, nbytes: int, messages: int) -> float | None:
    """Messages a second that rank 0 sends back, from all others, `messages` from each; None on others."""
    buffer = aligned(nbytes)
    if world.Get_rank():
        _round_trips(world, buffer, messages, first=world.Get_rank())
        return None
    started = time.perf_counter()
    _answer(world, buffer, messages * (world.Get_size() - 1))
    return messages * (world.Get_size() - 1) / (time.perf_counter() - started)


def blocking_server(world: MPI.Comm, nbytes: int, messages: int, away_s: float) -> float | None:
    """The share of a core that rank 0 takes to answer by blocking calls, with others that sleep `away_s` in between."""
    buffer = aligned(nbytes)
    if world.Get_rank():
        for _ in range(messages):
            time.sleep(away_s)
            world.Send(buffer, 0)
            world.Recv(buffer, 0)
        return None
    started, cpu = time.perf_counter(), time.process_time()
    _answer(world, buffer, messages * (world.Get_size() - 1))
    return (time.process_time() - cpu) / (time.perf_counter() - started)


def _answer(world: MPI.Comm, buffer: np.ndarray, messages: int) -> None:
    status = MPI.Status()
    for _ in range(messages):
        world.Recv(buffer, MPI.ANY_SOURCE, status=status)
        world.Send(buffer, status.Get_source())


def _round_trips(world: MPI.Comm, buffer: np.ndarray, rounds: int, first: int = 1) -> list[float]:
    """Rank `first` sends to rank 0, which sends back; the times, on rank `first`."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        if world.Get_rank() == first:
            world.Send(buffer, 0)
            world.Recv(buffer, 0)
            times.append(time.perf_counter() - started)
        elif world.Get_rank() == 0:
            world.Recv(buffer, first)
            world.Send(buffer, first)
    return times
