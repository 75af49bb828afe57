from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from conftest import few_or_many
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from ps_elastic.errors import WireError
from ps_elastic.transport.frame_cache import PushReader, ReplyStamp
from ps_elastic.transport.messages import (
    MOST_SETTLED,
    OUTCOMES,
    Ask,
    Farewell,
    Layer,
    Message,
    PushMessage,
    Reply,
    Settled,
)
from ps_elastic.transport.wire import HEADER_BYTES, MAX_ARRAYS, Place, pack, size_of, unpack
from ps_elastic.vectors.memory import aligned

DIGEST = bytes(range(32))
TYPES = ("<f4", "<f8", "<i4", "<i8", "|u1", "<u2", "<f2", "<u4", "|i1", "<i2")

numbers = st.floats(allow_nan=True, allow_infinity=True)
counts = st.integers(0, 2**63)
workers = st.integers(0, 2**32 - 1)
vectors = st.sampled_from(TYPES).flatmap(lambda t: arrays_of.arrays(np.dtype(t), st.integers(0, 9)))
models = arrays_of.arrays(np.dtype("<f4"), st.integers(1, 9))

pushes = st.builds(
    PushMessage,
    worker=workers,
    step=counts,
    base=counts,
    arrays=st.lists(vectors, max_size=MAX_ARRAYS - 1).map(tuple),
    bucket=st.integers(0, 2**16 - 1),
    buckets=st.integers(1, 2**16 - 1),
    samples=st.integers(0, 2**32 - 1),
    loss=st.floats(width=32),
    norm=numbers,
    payload_norm=numbers,
    residual_norm=numbers,
    waited_s=numbers,
    statistics=st.none() | models,
    ahead=st.integers(0, 255),
)
fates = st.builds(Settled, st.integers(1, 2**53), st.sampled_from(OUTCOMES), numbers, st.integers(0, 2**16))
layers = st.builds(Layer, st.integers(0, 2**53), st.sampled_from(OUTCOMES), numbers)
replies = st.builds(
    Reply,
    worker=workers,
    step=counts,
    version=counts,
    model=st.none() | models,
    outcome=st.sampled_from(OUTCOMES),
    discrepancy=numbers,
    alpha=numbers,
    weight=numbers,
    settled=st.lists(fates, max_size=5).map(tuple),
    layers=st.lists(layers, max_size=5).map(tuple),
    rate=numbers,
)
asks = st.builds(Ask, workers, counts)
farewells = st.builds(Farewell, workers, counts, st.text(max_size=30), st.integers(0, 255))


def packed(message: Message, **options: Any) -> np.ndarray:
    return pack(message, DIGEST, aligned(1 << 16, HEADER_BYTES), **options).head


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, nan included."""
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


@settings(deadline=None)
@given(pushes | replies | asks | farewells)
def test_every_kind_of_message_comes_back_as_it_was(message: Message) -> None:
    frame = packed(message)
    assert size_of(frame, DIGEST, "rank 1") == (frame.size, Place.INLINE, False)
    assert same(unpack(frame, DIGEST, "rank 1"), message)


@settings(deadline=None)
@given(replies)
def test_a_model_may_follow_apart(reply: Reply) -> None:
    sent = pack(reply, DIGEST, aligned(1 << 16), place=Place.APART)
    assert (sent.apart is None) == (reply.model is None)
    assert size_of(sent.head, DIGEST, "rank 0")[:2] == (sent.head.size, reply.model is not None)
    assert sent.head.size == HEADER_BYTES + 32 * len(reply.settled) + 24 * len(reply.layers)
    assert same(unpack(sent.head, DIGEST, "rank 0", sent.apart), reply)


@settings(deadline=None)
@given(pushes)
def test_the_first_array_of_a_push_may_go_apart(push: PushMessage) -> None:
    sent = pack(push, DIGEST, aligned(1 << 16, HEADER_BYTES), place=Place.APART)
    size = size_of(sent.head, DIGEST, "rank 1")
    assert sent.apart is (push.arrays[0] if push.arrays else None)
    assert size.nbytes == sent.head.size and not size.stale
    if sent.apart is None:
        assert size.place == Place.INLINE
        assert same(unpack(sent.head, DIGEST, "rank 1"), push)
        return
    assert size.place == Place.APART
    assert sent.head.size + (sent.apart.nbytes + 7) // 8 * 8 == packed(push).size
    received = sent.apart.view(np.uint8)
    assert same(unpack(sent.head, DIGEST, "rank 1", received), push)
    for other in (None, np.zeros(sent.apart.nbytes + 1, np.uint8)):
        with pytest.raises(
            WireError, match=f"rank 1: got .* apart from its header, expected {sent.apart.nbytes} bytes"
        ):
            unpack(sent.head, DIGEST, "rank 1", other)


def test_a_push_that_says_that_an_array_is_apart_names_one() -> None:
    head = packed(PushMessage(1, 1, 0, ()))
    head[6] |= 32
    with pytest.raises(WireError, match="rank 1: an array apart, expected with one named in the header"):
        size_of(head, DIGEST, "rank 1")


@pytest.mark.parametrize("model", [None, np.zeros(5, np.float32)])
@pytest.mark.parametrize("place", [Place.APART, Place.SHARED])
def test_a_reply_says_that_what_came_ahead_of_it_is_stale(model: Any, place: Place) -> None:
    for stale in (False, True):
        sent = pack(Reply(1, 2, 3, model), DIGEST, aligned(1 << 16), place=place, stale=stale)
        assert size_of(sent.head, DIGEST, "rank 0").stale == stale
        assert same(unpack(sent.head, DIGEST, "rank 0", model), Reply(1, 2, 3, model))


def test_the_header_takes_112_bytes() -> None:
    assert HEADER_BYTES == 112 < 128
    assert packed(Ask(1, 2)).size == 112
    assert packed(Reply(1, 2, 3, None)).size == 112


def test_the_first_bytes_are_as_the_table_says() -> None:
    push = PushMessage(7, 5, 4, (np.ones(3, np.float32),), 1, 2, 32, 0.5, 1.5, 2.5, 3.5, 4.5)
    head = packed(push).tobytes()
    assert head[:8] == b"PSEL" + bytes([3, 1, 0, 0])
    assert struct.unpack("<IHH", head[8:16]) == (7, 1, 2)
    assert struct.unpack("<QQ", head[16:32]) == (5, 4)
    assert struct.unpack("<4d", head[32:64]) == (1.5, 2.5, 3.5, 4.5)
    assert struct.unpack("<If", head[64:72]) == (32, 0.5)
    assert head[72:80] == DIGEST[:8]
    assert struct.unpack("<4Q", head[80:112]) == (1 << 56 | 3, 0, 0, 0)
    assert head[112:] == np.ones(3, "<f4").tobytes() + bytes(4)


def test_arrays_are_views_of_the_frame_and_start_at_multiples_of_8_bytes() -> None:
    push = PushMessage(1, 1, 0, (np.arange(3, dtype=np.int8), np.arange(5, dtype=np.float32)))
    frame = packed(push)
    received = unpack(frame, DIGEST, "rank 1")
    assert isinstance(received, PushMessage)
    offsets = [array.ctypes.data - frame.ctypes.data for array in received.arrays]
    assert offsets == [112, 120]
    frame[120:140] = 0
    assert not received.arrays[1].any()


def test_an_array_already_in_its_place_is_not_copied() -> None:
    buffer = aligned(1 << 10, HEADER_BYTES)
    gradient = buffer[HEADER_BYTES : HEADER_BYTES + 40].view(np.float32)
    gradient[:] = 3
    head = pack(PushMessage(1, 1, 0, (gradient,)), DIGEST, buffer).head
    gradient[0] = 4
    received = unpack(head, DIGEST, "rank 1")
    assert isinstance(received, PushMessage) and received.arrays[0][0] == 4


def test_as_many_fates_as_one_reply_tells_fit() -> None:
    told = tuple(Settled(i, "dropped", math.nan) for i in range(MOST_SETTLED))
    received = unpack(packed(Reply(1, 2, 3, np.zeros(4, np.float32), settled=told)), DIGEST, "rank 0")
    assert isinstance(received, Reply) and len(received.settled) == MOST_SETTLED


FRAME = packed(PushMessage(1, 1, 0, (np.arange(4, dtype=np.int32), np.ones(4, np.float32))))


def changed(at: int, value: int) -> np.ndarray:
    frame = FRAME.copy()
    frame[at] = value
    return frame


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (changed(0, 0), "rank 9: starts with b'\\x00SEL', expected b'PSEL'"),
        (changed(4, 1), "rank 9: wire version 1, expected 3"),
        (changed(5, 77), "rank 9: unknown kind of message 77"),
        (changed(72, 9), "rank 9: layout 0901020304050607, expected 0001020304050607: another model or buckets"),
        (changed(87, 200), "rank 9: unknown array type 200"),
        (changed(87, 0), "rank 9: unknown array type 0"),
        (changed(80, 5), "rank 9: got 144 bytes, expected 152"),
        (FRAME[:100], "rank 9: got 100 bytes, expected a header of 112"),
        (FRAME[:-8], "rank 9: got 136 bytes, expected 144"),
        (FRAME[:0], "rank 9: got 0 bytes, expected a header of 112"),
    ],
)
def test_what_is_no_message_of_ours_is_refused_by_name(frame: np.ndarray, message: str) -> None:
    with pytest.raises(WireError) as error:
        unpack(frame, DIGEST, "rank 9")
    assert str(error.value) == message


def test_another_layout_is_refused() -> None:
    with pytest.raises(WireError, match="another model or buckets"):
        unpack(FRAME, bytes(32), "rank 1")


def test_too_many_arrays_and_unknown_types_are_not_sent() -> None:
    with pytest.raises(WireError, match="5 arrays in a message; expected at most 4"):
        packed(PushMessage(1, 1, 0, (np.zeros(1, np.float32),) * 5))
    with pytest.raises(WireError, match="an array of complex64 cannot be sent"):
        packed(PushMessage(1, 1, 0, (np.zeros(1, np.complex64),)))


damages = st.lists(st.tuples(st.integers(5, 2000), st.integers(0, 255)), min_size=1)


@few_or_many(100, 300)
def test_a_damaged_frame_is_a_message_or_a_wire_error_and_nothing_else(count: int) -> None:
    @settings(max_examples=count, deadline=None)
    @given(pushes | replies | asks | farewells, damages)
    def check(message: Message, damage: list[tuple[int, int]]) -> None:
        frame = packed(message).copy()
        for at, value in damage:
            frame[at % frame.size] = value
        try:
            unpack(frame, DIGEST, "rank 1")
        except WireError as error:
            assert str(error).startswith("rank 1: ")

    check()


def read(reader: PushReader | None, frame: np.ndarray) -> Message | str:
    """What is in the frame, or why it is refused."""
    try:
        return unpack(frame, DIGEST, "rank 1") if reader is None else reader.read()
    except WireError as error:
        return str(error)


@few_or_many(60, 300)
def test_a_frame_read_again_and_again_is_what_unpack_finds_in_it(count: int) -> None:
    @settings(max_examples=count, deadline=None)
    @given(st.data(), pushes)
    def check(data: st.DataObject, push: PushMessage) -> None:
        frame = aligned(1 << 12, HEADER_BYTES)
        reader = PushReader(frame, DIGEST, "rank 1")
        for _ in range(4):
            same_form = pushes.map(lambda other: other._replace(arrays=push.arrays, statistics=push.statistics))
            pack(data.draw(same_form | pushes | asks | farewells), DIGEST, frame)
            for at, value in data.draw(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=2)):
                frame[at] = value
            for _ in range(2):
                assert same(read(reader, frame), read(None, frame))

    check()


def test_arrays_of_a_frame_read_again_are_the_same_views_of_it() -> None:
    frame = aligned(1 << 10, HEADER_BYTES)
    reader = PushReader(frame, DIGEST, "rank 1")
    found = []
    for step in (1, 2):
        pack(PushMessage(1, step, 0, (np.full(3, step, np.float32),)), DIGEST, frame)
        found.append(reader.read())
        assert isinstance(found[-1], PushMessage) and found[-1].arrays[0].tolist() == [step] * 3
    assert found[0].arrays is found[1].arrays
    pack(PushMessage(1, 3, 0, (np.full(4, 3, np.float32),)), DIGEST, frame)
    assert reader.read().arrays[0].tolist() == [3] * 4


@settings(deadline=None)
@given(st.lists(replies, min_size=1, max_size=4), st.sampled_from([Place.INLINE, Place.SHARED]), st.integers(1, 9))
def test_a_stamped_reply_has_the_bytes_of_a_packed_one(given: list[Reply], place: Place, entries: int) -> None:
    stamp = ReplyStamp(aligned(1 << 12, HEADER_BYTES), DIGEST, entries, place)
    model = np.arange(entries, dtype=np.float32)
    for reply in given:
        reply = reply if reply.model is None else reply._replace(model=model)
        usual = pack(reply, DIGEST, aligned(1 << 12, HEADER_BYTES), place=place).head
        stamped = stamp.write(reply)
        assert stamped.size == usual.size
        assert same(unpack(stamped, DIGEST, "rank 0", model), unpack(usual, DIGEST, "rank 0", model))
        assert stamped[: HEADER_BYTES + 4 * entries].tobytes() == usual[: HEADER_BYTES + 4 * entries].tobytes()
