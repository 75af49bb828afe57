from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from helpers import Images, Odd, OddModel
from torch import nn

from ps_elastic.errors import ConfigError, ShapeError
from ps_elastic.vectors.layout import Bucket, Layout
from ps_elastic.vectors.memory import aligned


def test_tensors_stand_in_the_order_of_the_module_each_at_a_multiple_of_64_floats() -> None:
    layout = Layout(nn.Sequential(nn.Linear(10, 7), nn.Linear(7, 64)))
    assert [(s.name, s.shape, s.offset, s.numel) for s in layout.slots] == [
        ("0.weight", (7, 10), 0, 70),
        ("0.bias", (7,), 128, 7),
        ("1.weight", (64, 7), 192, 448),
        ("1.bias", (64,), 640, 64),
    ]
    assert (layout.size, layout.numel) == (704, 589)
    assert layout.buckets == (Bucket(0, 704),)


def test_frozen_tensors_are_left_out_and_tied_ones_counted_once() -> None:
    assert [slot.name for slot in Layout(OddModel()).slots] == [
        "scale", "frozen.bias", "twice.weight", "twice.bias", "unused.weight", "unused.bias",
        "out.weight", "out.bias",
    ]  # fmt: skip


def test_an_attached_model_lives_in_the_flat_vector_and_keeps_its_numbers() -> None:
    model = Images().model(0)
    before = [p.detach().clone() for p in model.parameters()]
    layout = Layout(model)
    x = layout.empty()
    layout.attach(model, x)
    for parameter, old, slot in zip(model.parameters(), before, layout.slots, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.data_ptr() == x[slot.offset :].data_ptr()
    x += 1
    assert all(torch.equal(p, old + 1) for p, old in zip(model.parameters(), before, strict=True))


def test_a_tied_tensor_stays_tied_when_it_is_attached() -> None:
    model = OddModel()
    layout = Layout(model)
    layout.attach(model, layout.empty())
    assert model.again.weight is model.twice.weight


def test_the_gaps_hold_zeros() -> None:
    layout = Layout(nn.Linear(3, 5))
    x = layout.empty()
    layout.attach(nn.Linear(3, 5), x)
    used = torch.zeros(layout.size, dtype=torch.bool)
    for view in layout.views(torch.arange(layout.size)).values():
        used[view.flatten()] = True
    assert int(used.sum()) == layout.numel == 20
    assert not x[~used].any()


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ("whole", [(0, 704)]),
        ("layer", [(0, 128), (128, 192), (192, 640), (640, 704)]),
        (4, [(0, 128), (128, 192), (192, 640), (640, 704)]),
        (4 * 150, [(0, 192), (192, 640), (640, 704)]),
        (4 * 650, [(0, 704)]),
        (10**9, [(0, 704)]),
    ],
)
def test_buckets_are_cut_between_tensors_as_soon_as_so_many_bytes_are_together(
    cut: str | int, expected: list[tuple[int, int]]
) -> None:
    layout = Layout(nn.Sequential(nn.Linear(10, 7), nn.Linear(7, 64)), cut)
    assert list(layout.buckets) == expected
    assert sum(bucket.numel for bucket in layout.buckets) == layout.size


@pytest.mark.parametrize("cut", ["auto", "", 0, -4])
def test_other_buckets_are_refused(cut: str | int) -> None:
    with pytest.raises(ConfigError, match="expected whole, layer or a number of bytes > 0"):
        Layout(nn.Linear(2, 2), cut)


def test_a_parameter_of_another_type_is_refused_by_name() -> None:
    with pytest.raises(ShapeError, match=r"parameter '1\.weight' is torch\.float64; expected torch\.float32"):
        Layout(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
        Layout(nn.Flatten())


def test_the_digest_tells_layouts_buckets_and_frozen_numbers_apart() -> None:
    def frozen(value: float) -> nn.Module:
        first = nn.Linear(3, 4)
        first.weight.requires_grad = False
        nn.init.constant_(first.weight, value)
        return nn.Sequential(first, nn.Linear(4, 2))

    wide, tall = nn.Linear(3, 4), nn.Linear(4, 3)
    digests = [
        Layout(wide).digest, Layout(tall).digest, Layout(wide, "layer").digest, Layout(nn.Sequential(wide)).digest,
        Layout(frozen(1.0)).digest, Layout(frozen(2.0)).digest,
    ]  # fmt: skip
    assert len(set(digests)) == len(digests)
    assert Layout(nn.Linear(3, 4)).digest == digests[0]  # numbers that are trained may differ
    assert all(len(digest) == 32 for digest in digests)


def test_the_hash_takes_every_parameter_without_padding() -> None:
    model = Odd().model(3)
    expected = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    layout = Layout(model)
    layout.attach(model, layout.empty())
    assert layout.sha256(model) == expected
    with torch.no_grad():
        model.get_parameter("frozen.weight")[0, 0] += 1
    assert layout.sha256(model) != expected


def test_a_parameter_that_is_not_contiguous_keeps_its_shape_and_numbers() -> None:
    model = nn.Conv2d(2, 3, 3)
    model.weight.data = model.weight.data.contiguous(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()
    before = model.weight.detach().clone()
    layout = Layout(model)
    layout.attach(model, layout.empty())
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("offset", [0, 8, 112])
def test_aligned_memory_starts_at_a_64_byte_boundary(offset: int) -> None:
    for nbytes in (1, 64, 1000):
        memory = aligned(nbytes, offset)
        assert memory.shape == (nbytes,) and memory.dtype == np.uint8 and not memory.any()
        assert (memory.ctypes.data + offset) % 64 == 0


def test_the_parts_of_a_layout_are_layouts_of_its_buckets() -> None:
    layout = Layout(nn.Sequential(nn.Linear(10, 7), nn.Linear(7, 64)), 500)
    parts = layout.parts()
    assert [(part.size, part.numel, len(part.slots)) for part in parts] == [(128, 70, 1), (512, 455, 2), (64, 64, 1)]
    assert [part.buckets for part in parts] == [(Bucket(0, 128),), (Bucket(0, 512),), (Bucket(0, 64),)]
    flat = torch.arange(layout.size, dtype=torch.float32)
    whole, split = layout.views(flat), {}
    for part, bucket in zip(parts, layout.buckets, strict=True):
        split |= part.views(flat[bucket.start : bucket.stop])
    assert split.keys() == whole.keys() and all(torch.equal(split[name], whole[name]) for name in whole)
