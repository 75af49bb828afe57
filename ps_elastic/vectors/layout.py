"""One flat float32 vector for all parameters of a model, one for their gradients, and the buckets they travel in.

Each tensor starts at a multiple of 64 floats and the gaps hold zeros, so that torch's fused kernels, which
treat the last few entries of a tensor apart, give the bits of the plain ones whatever the blocks are.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ps_elastic.errors import ConfigError, ShapeError
from ps_elastic.vectors.memory import aligned
from ps_elastic.vectors.overlap import overlaps

ALIGN = 64  # floats


class Slot(NamedTuple):
    """Where a tensor lives in the flat vector; offset and numel in floats."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int


class Bucket(NamedTuple):
    """A contiguous part of the flat vector that travels as one frame; in floats."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


class Layout:
    """The places of a model's trainable parameters, in the order of the module; tied tensors once, frozen and empty
    ones not.

    slots, buckets; size: floats with padding; numel: floats without; digest: 32 bytes, equal where two ranks
    may exchange vectors (names, shapes, buckets, and the numbers of the frozen parameters).
    """

    def __init__(self, model: nn.Module, buckets: str | int = "whole") -> None:
        refuse_shared_memory(model)
        slots, offset, digest = [], 0, hashlib.sha256()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                digest.update(name.encode() + _bytes(parameter).numpy().tobytes())
                continue
            if parameter.dtype != torch.float32:
                raise ShapeError(
                    f"parameter '{name}' is {parameter.dtype}; expected torch.float32 of what is trained: cast it in "
                    "`model` (`.float()`), or freeze it there (`requires_grad_(False)`)"
                )
            if not parameter.numel():  # there is nothing to train, and no bucket to put it in
                digest.update(repr((name, tuple(parameter.shape))).encode())
                continue
            slots.append(Slot(name, tuple(parameter.shape), offset, parameter.numel()))
            offset += -(-parameter.numel() // ALIGN) * ALIGN
        if not slots:
            raise ConfigError("the model has no parameter that requires a gradient", key="task")
        self.slots, self.size = tuple(slots), offset
        self.numel = sum(slot.numel for slot in slots)
        self.buckets = tuple(cut(self.slots, self.size, buckets))
        digest.update(repr((self.slots, self.buckets)).encode())
        self.digest = digest.digest()

    def parts(self) -> tuple[Layout, ...]:
        """A layout of each bucket, in one bucket."""
        return tuple(map(self._part, self.buckets))

    def _part(self, bucket: Bucket) -> Layout:
        part = copy.copy(self)
        inside = [slot for slot in self.slots if bucket.start <= slot.offset < bucket.stop]
        part.slots = tuple(slot._replace(offset=slot.offset - bucket.start) for slot in inside)
        part.size, part.numel = bucket.numel, sum(slot.numel for slot in inside)
        part.buckets = (Bucket(0, part.size),)
        return part

    def empty(self) -> Tensor:
        """A new (size,) float32 vector of zeros, its memory starting at a 64-byte boundary."""
        return torch.from_numpy(aligned(4 * self.size).view(np.float32))

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Name -> view of `flat` (size,) in the tensor's shape."""
        return {s.name: flat[s.offset : s.offset + s.numel].view(s.shape) for s in self.slots}

    def attach(self, model: nn.Module, flat: Tensor, *, fill: bool = True) -> None:
        """Let the model's trainable parameters live in `flat` from now on; `fill` copies them there first."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, view in self.views(flat).items():
                if fill:
                    view.copy_(parameters[name])
                parameters[name].data = view

    def sha256(self, model: nn.Module) -> str:
        """SHA-256 of all parameters, frozen ones too, as little-endian float32 in the order of the module."""
        digest = hashlib.sha256()
        for parameter in model.parameters():
            numbers = torch.view_as_real(parameter) if parameter.is_complex() else parameter
            array = numbers.detach().float().contiguous().cpu().numpy().astype("<f4", copy=False)
            digest.update(array.reshape(-1).data)
        return digest.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    """What a tensor of any type holds, as uint8 on the CPU."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)


def refuse_shared_memory(model: nn.Module) -> None:
    """Raise ConfigError, by name, for a trained parameter whose memory a parameter or buffer beside it has too."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for first, second in overlaps((*model.named_parameters(), *model.named_buffers())):
        if first == second and first in trained:
            raise ConfigError(
                f"parameter '{first}' has several entries in one place of memory, as `expand` makes them; "
                "expected memory for each: `.clone()` it",
                key="task",
            )
        if first in trained or second in trained:
            raise ConfigError(
                f"'{first}' and '{second}' share memory without being one parameter, and would be trained apart; "
                "expected the same Parameter object in both places (`b.weight = a.weight`), or memory for each: "
                "`.clone()` one",
                key="task",
            )


def cut(slots: Sequence[Slot], size: int, buckets: str | int) -> Iterator[Bucket]:
    """Cut between tensors: everything at once, a tensor each, or as soon as `buckets` bytes are together."""
    if buckets == "whole":
        yield Bucket(0, size)
        return
    if not (buckets == "layer" or (isinstance(buckets, int) and buckets > 0)):
        raise ConfigError(f"got {buckets!r}, expected whole, layer or a number of bytes > 0", key="buckets")
    limit = 0 if isinstance(buckets, str) else buckets
    start = 0
    for stop in [slot.offset for slot in slots[1:]] + [size]:
        if 4 * (stop - start) >= limit or stop == size:
            yield Bucket(start, stop)
            start = stop


def statistics_of(model: nn.Module) -> list[Tensor]:
    """The floating-point buffers of the model's BatchNorms, in the order of the module."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for buffer in module.buffers(recurse=False)
        if buffer.is_floating_point()
    ]


def load_statistics(model: nn.Module, statistics: dict[int, np.ndarray]) -> None:
    """Fill the model's running statistics with the mean over the workers' (s,) vectors, in worker order."""
    if not statistics:
        return
    mean = torch.from_numpy(np.mean([statistics[worker] for worker in sorted(statistics)], axis=0, dtype=np.float64))
    start = 0
    for buffer in statistics_of(model):
        buffer.copy_(mean[start : start + buffer.numel()].view_as(buffer))
        start += buffer.numel()
