"""What `bench lockfree` does on a rank beside runs of ours: Hogwild in its own processes, and writes that collide."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import torch
from torch import nn

from ps_elastic.compressors import compressors
from ps_elastic.transport.collectives import meet
from ps_elastic.transport.host import Window, find_host
from ps_elastic.transport.lock import LOCK_BYTES, RobustLock
from ps_elastic.transport.mpi import MPI
from ps_elastic.vectors.layout import Layout
from ps_elastic.worker.model_writer import ModelWriter, SharedModel

_LIMIT_S = 200.0
_OF_MPI = ("OMPI_", "PMIX_", "PRTE_", "PMI_")


def hogwild(world: MPI.Comm, cases: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """What bench/hogwild.py found of `cases`, on rank 0; the others wait."""
    if world.Get_rank():
        return None
    around = {name: value for name, value in os.environ.items() if not name.startswith(_OF_MPI)}
    command = [sys.executable, "-m", "ps_elastic.analysis.bench.hogwild", json.dumps(cases)]
    ended = subprocess.run(command, env=around, stdout=subprocess.PIPE, check=True, timeout=_LIMIT_S)
    found: list[dict[str, Any]] = json.loads(ended.stdout)
    return found


def lost(world: MPI.Comm, parameters: int, writes: int, compressor: str, writing: str) -> float | None:
    """The share of what all workers wrote at the same time, on the same entries, that is not there; on rank 0.

    Every worker adds 1 to each entry that `compressor` (a name) sends of a vector of ones, `writes` times.
    """
    host, rank = find_host(world), world.Get_rank()
    layout = Layout(nn.Linear(parameters, 1, bias=False))
    window = Window(host, 0 if rank else 4 * layout.size + LOCK_BYTES)
    memory = window.of(0)
    x = torch.from_numpy(memory[LOCK_BYTES:].view(np.float32))
    lock = RobustLock(memory[:LOCK_BYTES], _LIMIT_S)
    if not rank:
        x.zero_()
        lock.make()
    meet(world)
    made = compressors.load(compressor)()
    payload = made.encode(torch.ones(layout.size))
    if rank:
        held = lock if writing == "lock" else contextlib.nullcontext()
        writer = ModelWriter(SharedModel(x, held, np.zeros(1)), layout.empty(), layout, measures=False)
        for _ in range(writes):
            writer.write(0, made, payload, -1.0, reads=False)
    meet(world)
    sent = float(made.decode(payload, layout.size).double().sum()) * writes * (world.Get_size() - 1)
    share = None if rank else 1 - float(x.double().sum()) / sent
    meet(world)
    del x, lock, memory
    window.free()
    host.comm.Free()
    return share
