"""Other ways to make the same synchronous steps on the ranks of workers, each at its best; rank 0 takes no part.

Every function returns the seconds of each of `steps` steps, on the workers; an empty list on rank 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ps_elastic.analysis.bench.tasks import Perceptron
from ps_elastic.transport.mpi import MPI
from ps_elastic.vectors.layout import Layout

_BLOCK = 1 << 17  # floats: model, gradient and momentum of a block stay in cache
LR, MOMENTUM = 0.01, 0.9


def local(world: MPI.Comm, task: dict[str, Any], steps: int) -> list[float]:
    """No exchange: every worker for itself, at the same time."""
    if world.Get_rank() == 0:
        return []
    return _loop(world, task, steps, lambda model: (model, _own_step(model)))


def ddp(world: MPI.Comm, task: dict[str, Any], steps: int, meeting_point: str) -> list[float]:
    """torch's DistributedDataParallel over gloo. meeting_point: a file that does not exist, of this phase alone."""
    if world.Get_rank() == 0:
        return []

    def prepare(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
        shared = DistributedDataParallel(model, gradient_as_bucket_view=True)
        return shared, _own_step(shared)

    where = f"file://{Path(meeting_point).absolute()}"
    distributed.init_process_group("gloo", where, rank=world.Get_rank() - 1, world_size=world.Get_size() - 1)
    try:
        return _loop(world, task, steps, prepare)
    finally:
        distributed.destroy_process_group()


def allreduce(world: MPI.Comm, task: dict[str, Any], steps: int) -> list[float]:
    """One MPI Allreduce of the flat gradient, then the mean and the update in one pass, block by block."""
    workers = world.Split(0 if world.Get_rank() else MPI.UNDEFINED, world.Get_rank())
    if world.Get_rank() == 0:
        return []
    times = _loop(world, task, steps, lambda model: (model, _flat_step(model, workers)))
    workers.Free()
    return times


def _loop(
    world: MPI.Comm,
    task: dict[str, Any],
    steps: int,
    prepare: Callable[[nn.Module], tuple[nn.Module, Callable[[], None]]],
) -> list[float]:
    """prepare: what to call in place of the model, and what follows each backward."""
    made = Perceptron(**task)
    model, update = prepare(made.model(0).train())
    batches = made.batches(world.Get_rank(), world.Get_size() - 1, 0)
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        made.loss(model, next(batches)).backward()
        update()
        times.append(time.perf_counter() - started)
    return times


def _own_step(model: nn.Module) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, fused=True)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def _flat_step(model: nn.Module, workers: MPI.Comm) -> Callable[[], None]:
    layout = Layout(model)
    x, g, momentum = layout.empty(), layout.empty(), layout.empty()
    layout.attach(model, x)
    for parameter, view in zip(model.parameters(), layout.views(g).values(), strict=True):
        parameter.register_post_accumulate_grad_hook(_moving_to(view))
    cuts = [vector.split(_BLOCK) for vector in (x, g, momentum)]
    first = [True]

    def update() -> None:
        workers.Allreduce(MPI.IN_PLACE, g.numpy())
        for part, gradient, moment in zip(*cuts, strict=True):
            torch._fused_sgd_(
                [part], [gradient.div_(workers.Get_size())], [moment], weight_decay=0.0, momentum=MOMENTUM, lr=LR,
                dampening=0.0, nesterov=False, maximize=False, is_first_step=first[0],
            )  # fmt: skip
        first[0] = False

    return update


def _moving_to(view: Tensor) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        view.copy_(parameter.grad)
        parameter.grad = None

    return move
