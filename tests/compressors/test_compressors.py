"""What holds for every registered compressor: a new one is tested by existing."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from ps_elastic.compressors import Compressor, ErrorFeedback, Payload, compressors
from ps_elastic.config.plugin import resolve
from ps_elastic.errors import WireError
from ps_elastic.plugins import parse_one_line
from ps_elastic.transport.messages import PushMessage
from ps_elastic.transport.wire import HEADER_BYTES, pack, unpack
from ps_elastic.vectors.memory import aligned

DIGEST = bytes(32)
MORE = ("top_k:ratio=0.1", "top_k:ratio=0.5", "top_k:ratio=1.0")  # settings besides the defaults
NAMES = [*(name for name, _ in compressors.items()), *MORE]
SIZES = (1, 64, 1000)
DRAWS = 32  # encodings over which an error is averaged, for methods that draw


@pytest.fixture(params=NAMES)
def method(request: pytest.FixtureRequest) -> Compressor:
    name, options = parse_one_line(request.param)
    plugin, problems = resolve("compressor", {"name": name, **{key: float(text) for key, text in options.items()}})
    assert not problems
    made: Compressor = plugin.build()
    return made


def working_copy(method: Compressor, numel: int, seed: int = 0) -> Compressor:
    return method.fresh(numel, torch.Generator().manual_seed(seed))


def vectors(numel: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(numel)
    gaussian = torch.randn(numel, generator=generator)
    yield gaussian
    yield gaussian**5
    yield torch.ones(numel)
    yield gaussian.sign() * 1e-20
    yield torch.where(torch.arange(numel) % 7 == 0, gaussian, torch.zeros(numel))


CASES = [(numel, kind) for numel in SIZES for kind in range(5)]


@pytest.fixture(params=CASES, ids=str)
def vector(request: pytest.FixtureRequest) -> Tensor:
    numel, kind = request.param
    return list(vectors(numel))[kind]


def test_a_payload_is_a_few_flat_contiguous_arrays_that_the_wire_carries(method: Compressor, vector: Tensor) -> None:
    n = vector.numel()
    given = vector.clone()
    payload = working_copy(method, n).encode(vector)
    assert torch.equal(vector, given)  # not modified
    assert isinstance(payload, tuple) and 1 <= len(payload) <= 3
    assert all(a.ndim == 1 and a.is_contiguous() and a.device.type == "cpu" for a in payload)
    nbytes = sum(a.numel() * a.element_size() for a in payload)
    assert nbytes <= method.max_nbytes(n)

    push = PushMessage(1, 1, 0, tuple(a.numpy() for a in payload))
    received = unpack(pack(push, DIGEST, aligned(4096 + 16 * n, HEADER_BYTES)).head, DIGEST, "rank 1")
    assert isinstance(received, PushMessage)
    across = tuple(torch.from_numpy(a) for a in received.arrays)
    here, there = working_copy(method, n), working_copy(method, n, seed=1)
    there.check(across, n)
    assert torch.equal(there.decode(across, n), here.decode(payload, n))  # by another object, after the wire


def test_what_decodes_has_the_shape_and_the_type_of_what_was_given(method: Compressor, vector: Tensor) -> None:
    n = vector.numel()
    coder = working_copy(method, n)
    decoded = coder.decode(coder.encode(vector), n)
    assert decoded.shape == (n,) and decoded.dtype == torch.float32
    assert torch.isfinite(decoded).all()


def test_number_and_types_of_the_arrays_do_not_change(method: Compressor) -> None:
    coder = working_copy(method, 1000)
    kinds = {tuple(a.dtype for a in coder.encode(vector)) for vector in vectors(1000)}
    assert len(kinds) == 1


def test_zeros_decode_to_zeros(method: Compressor) -> None:
    for n in SIZES:
        coder = working_copy(method, n)
        payload = coder.encode(torch.zeros(n))
        assert not coder.decode(payload, n).any()
        assert coder.payload_norm(payload, n) == 0


def test_one_element_survives(method: Compressor) -> None:
    coder = working_copy(method, 1)
    decoded = coder.decode(coder.encode(torch.tensor([-2.5])), 1)
    assert decoded.shape == (1,) and decoded[0] <= 0


def test_memory_that_is_not_contiguous_encodes_as_its_copy_does(method: Compressor) -> None:
    wide = torch.randn(2000, generator=torch.Generator().manual_seed(3))
    strided = wide[::2]
    assert not strided.is_contiguous()
    apart = working_copy(method, 1000).encode(strided)
    together = working_copy(method, 1000).encode(strided.contiguous())
    assert all(a.is_contiguous() and torch.equal(a, b) for a, b in zip(apart, together, strict=True))


def test_the_same_generator_gives_the_same_payload(method: Compressor, vector: Tensor) -> None:
    n = vector.numel()
    first, second = (working_copy(method, n, seed=4).encode(vector) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_accumulate_adds_the_decoded_vector_times_its_weight(method: Compressor, vector: Tensor) -> None:
    n = vector.numel()
    coder = working_copy(method, n)
    payload = coder.encode(vector)
    start = torch.linspace(-1, 1, n)
    out = start.clone()
    coder.accumulate(payload, out, -0.3)
    expected = start.double() - 0.3 * coder.decode(payload, n).double()
    assert torch.allclose(out.double(), expected, rtol=1e-6, atol=1e-6)  # two float32 roundings


def test_the_norm_of_a_payload_is_that_of_what_decodes(method: Compressor, vector: Tensor) -> None:
    n = vector.numel()
    coder = working_copy(method, n)
    payload = coder.encode(vector)
    expected = float(coder.decode(payload, n).norm())
    assert math.isclose(coder.payload_norm(payload, n), expected, rel_tol=1e-5)  # sums of up to 1000 float32


def test_the_error_is_within_the_declared_contraction(method: Compressor, vector: Tensor) -> None:
    n = vector.numel()
    gamma = method.gamma(n)
    if gamma is None:
        pytest.skip(f"{type(method).__name__} declares no contraction")
    assert 0 <= gamma < 1
    errors = []
    for seed in range(DRAWS):
        coder = working_copy(method, n, seed)
        errors.append(float((vector.double() - coder.decode(coder.encode(vector), n).double()).pow(2).sum()))
    assert np.mean(errors) <= gamma * float(vector.double().pow(2).sum()) * (1 + 1e-6)


def test_an_unbiased_method_is_right_on_average(method: Compressor) -> None:
    if method.biased:
        pytest.skip(f"{type(method).__name__} is biased")
    vector = torch.randn(64, generator=torch.Generator().manual_seed(5))
    draws = []
    for seed in range(400):
        coder = working_copy(method, 64, seed)
        draws.append(coder.decode(coder.encode(vector), 64).double())
    stacked = torch.stack(draws)
    error = (stacked.mean(0) - vector.double()).abs()
    assert (error <= 5 * stacked.std(0) / math.sqrt(len(draws)) + 1e-6).all()


def damaged(payload: Payload) -> Iterator[Payload]:
    yield ()
    yield (*payload, payload[0])
    yield payload[:-1]
    for i, array in enumerate(payload):
        for other in (array.double(), array[:-1], torch.cat([array, array])):
            yield (*payload[:i], other, *payload[i + 1 :])


@pytest.mark.parametrize("numel", [1, 1000])
def test_garbage_is_refused_before_it_is_decoded(method: Compressor, numel: int) -> None:
    coder = working_copy(method, numel)
    payload = coder.encode(torch.randn(numel, generator=torch.Generator().manual_seed(6)))
    coder.check(payload, numel)
    for bad in damaged(payload):
        with pytest.raises(WireError):
            coder.check(bad, numel)


def test_working_copies_share_no_state(method: Compressor) -> None:
    first, second = working_copy(method, 64), working_copy(method, 64)
    expected = [a.clone() for a in copy.deepcopy(second).encode(torch.ones(64))]
    first.encode(torch.randn(64, generator=torch.Generator().manual_seed(7)))
    assert all(torch.equal(a, b) for a, b in zip(second.encode(torch.ones(64)), expected, strict=True))


# Error feedback wraps any of them. Its law is algebra: what was sent plus what is kept equals what there was.


@pytest.mark.parametrize("numel", SIZES)
def test_sent_and_kept_together_are_what_was_given(method: Compressor, numel: int) -> None:
    feedback = ErrorFeedback(working_copy(method, numel), numel)
    generator = torch.Generator().manual_seed(8)
    given, sent = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    for _ in range(20):
        gradient = torch.randn(numel, generator=generator)
        given += gradient
        sent += feedback.compressor.decode(feedback.encode(gradient), numel)
    # Each of 20 additions to a residual of at most about 20 rounds once, to 2^-24 of it.
    assert torch.allclose(sent + feedback.residual, given, rtol=0, atol=20 * 20 * 2.0**-24)


def test_a_push_that_was_dropped_is_taken_back(method: Compressor) -> None:
    feedback = ErrorFeedback(working_copy(method, 100), 100)
    gradient = torch.randn(100, generator=torch.Generator().manual_seed(9))
    payload = tuple(a.clone() for a in feedback.encode(gradient.clone()))
    feedback.take_back(payload)
    assert torch.allclose(feedback.residual, gradient, atol=1e-6)


def test_what_is_taken_back_counts_in_the_step_size_it_was_made_for(method: Compressor) -> None:
    feedback = ErrorFeedback(working_copy(method, 100), 100)
    gradient = torch.randn(100, generator=torch.Generator().manual_seed(10))
    payload = tuple(a.clone() for a in feedback.encode(gradient.clone()))
    feedback.rescale(4.0)  # the step size fell to a quarter
    feedback.take_back(payload, 4.0)
    assert torch.allclose(feedback.residual, 4 * gradient, atol=1e-5)


def test_the_residual_of_a_contraction_stays_bounded(method: Compressor) -> None:
    """Stationary ||e|| <= sqrt(gamma) / (1 - sqrt(gamma)) max ||g||, pathwise for a deterministic contraction."""
    gamma = method.gamma(64)
    if gamma is None:
        pytest.skip(f"{type(method).__name__} declares no contraction")
    feedback = ErrorFeedback(working_copy(method, 64), 64)
    generator = torch.Generator().manual_seed(11)
    bound = math.sqrt(gamma) / (1 - math.sqrt(gamma))
    for _ in range(100):
        gradient = torch.randn(64, generator=generator)
        gradient /= gradient.norm()
        feedback.encode(gradient)
        assert float(feedback.residual.norm()) <= bound * (1 + 1e-5)
