"""Tensors that share memory: in one flat vector each would have a place of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def overlaps(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    """Pairs of names whose tensors have a number in common; (name, name) where one has a number in two places."""
    by_storage: defaultdict[int, list[tuple[int, int, str, Tensor]]] = defaultdict(list)
    for name, tensor in tensors:
        if tensor.layout is torch.strided and tensor.numel() and not tensor.is_meta:
            start = tensor.data_ptr()
            by_storage[tensor.untyped_storage().data_ptr()].append((start, start + _reach(tensor), name, tensor))
    for members in by_storage.values():
        members.sort(key=lambda member: member[0])
        for i, (start, stop, name, tensor) in enumerate(members):
            if not _is_dense(start, stop, tensor) and _places(tensor).unique().numel() < tensor.nbytes:
                yield name, name
            for begin, end, other, beside in members[i + 1 :]:
                if begin >= stop:
                    break
                dense = _is_dense(start, stop, tensor) and _is_dense(begin, end, beside)
                if dense or bool(torch.isin(_places(tensor), _places(beside)).any()):
                    yield name, other


def _reach(tensor: Tensor) -> int:
    """Bytes from its first to the end of its last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _is_dense(start: int, stop: int, tensor: Tensor) -> bool:
    return tensor.is_contiguous() and stop - start == tensor.nbytes


def _places(tensor: Tensor) -> Tensor:
    """The address of every byte of it."""
    steps = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        steps = steps.unsqueeze(-1) + stride * torch.arange(size)
    width = tensor.element_size()
    return (tensor.data_ptr() + width * steps.reshape(-1, 1) + torch.arange(width)).reshape(-1)
