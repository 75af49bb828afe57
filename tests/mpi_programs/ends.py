"""Both ends of the transport, without server or worker: `mpirun -n 2 python ends.py FILE`.

Every check is a function that both ranks run; FILE gets a list of those that passed with each way to join the ranks.
The first that fails ends the job with its traceback: the other rank waits for what does not come, and what it sends
later would be received where an end was that is gone.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ps_elastic.errors import PlatformError, Stalled, WireError
from ps_elastic.transport import buffers
from ps_elastic.transport import endpoint as common
from ps_elastic.transport.host import find_host
from ps_elastic.transport.links import Links, join
from ps_elastic.transport.messages import Ask, Farewell, PushMessage, Reply
from ps_elastic.transport.server_endpoint import ServerEndpoint
from ps_elastic.transport.windows import WindowSizes
from ps_elastic.transport.wire import HEADER_BYTES, Place, pack
from ps_elastic.transport.worker_endpoint import WorkerEndpoint

WORLD = buffers.MPI.COMM_WORLD
RANK = WORLD.Get_rank()
LAYOUT = b"the layout, 32 bytes of a digest"
PATIENCE_S = 20.0
LITTLE_S = 0.6  # where patience is to end
# how the ranks are joined; every check is made with each of them
MODES = ("polling", "doorbells", "shared", "in place")
mode = MODES[0]
joined: list[Links] = []


def ends(
    floats: int,
    frames: list[int] | None = None,
    in_place: bool = True,
    vectors: Sequence[int] = (),
    patience_s: float = PATIENCE_S,
) -> ServerEndpoint | WorkerEndpoint:
    """This rank's end, and what joins it to the other, to be freed when the check is over."""
    frames, links = frames or [HEADER_BYTES + 4 * floats], None
    if mode != "polling":
        transport = "messages" if mode == "doorbells" else "shared"
        links = join(WORLD, transport, 1, WindowSizes(frames, 4 * floats, in_place=mode == "in place"))
        joined.append(links)
        links.spins = 3
    traffic = common.Traffic(LAYOUT, frames, 4 * floats, 3, patience_s, links, vectors=vectors)
    if RANK == 0:
        return ServerEndpoint(WORLD, traffic)
    return WorkerEndpoint(WORLD, traffic, in_place=in_place)


def model_of(end: ServerEndpoint | WorkerEndpoint, floats: int, value: float = 0.0) -> np.ndarray:
    """The server's model, where its transport wants it."""
    found = end.model if isinstance(end, ServerEndpoint) else None
    model = np.empty(floats, np.float32) if found is None else found
    if RANK == 0:
        model[:] = value
    return model


def tell(word: str) -> None:
    """Tell the other rank by a file: a message would let MPI work."""
    _file_of(word).touch()


def until_told(word: str) -> None:
    limit = time.monotonic() + 20.0
    while not _file_of(word).exists():
        assert time.monotonic() < limit, word
        time.sleep(0.005)


def _file_of(word: str) -> Path:
    return Path(sys.argv[1]).with_suffix(f".{mode}.{word}")


def expect(end: ServerEndpoint | WorkerEndpoint, kind: type):
    source, message = end.recv(20.0) or (None, None)
    assert source == 1 - RANK and type(message) is kind, (source, message)
    return message


def round_trip(end: ServerEndpoint | WorkerEndpoint, model: np.ndarray, step: int) -> None:
    if isinstance(end, ServerEndpoint):
        end.send(1, Reply(1, step, step, model))
        end.flush()
        push = expect(end, PushMessage)
        assert push.step == step + 1 and (push.arrays[0] == step).all(), push
        model += 1
    else:
        reply = expect(end, Reply)
        assert reply.step == step and (reply.model == step).all(), reply
        end.memory[1][:] = step
        end.send(0, PushMessage(1, step + 1, step, (end.memory[1],)))


def small_and_large_models_and_chunks_arrive_whole() -> None:
    for floats, chunk_bytes in ((64, 1 << 30), (20_000, 1 << 30), (64, 128), (20_000, 4096), (20_032, 1 << 16)):
        buffers.CHUNK_BYTES = chunk_bytes
        end = ends(floats)
        model = model_of(end, floats)
        for step in range(5):
            round_trip(end, model, step)
        end.close()
        WORLD.Barrier()
    buffers.CHUNK_BYTES = 1 << 30


def a_push_in_place_is_sent_from_where_the_gradient_lies() -> None:
    end = ends(20_000)
    if isinstance(end, WorkerEndpoint):
        frame = end._frames[0][0]
        assert end.memory[1].ctypes.data == frame.ctypes.data + HEADER_BYTES
        assert end.memory[1].ctypes.data % 64 == 0 and frame.size == HEADER_BYTES + end.memory[1].nbytes
        assert HEADER_BYTES < 128
    end.close()


def the_steady_state_allocates_nothing_of_the_size_of_the_model() -> None:
    end = ends(300_000)
    model = model_of(end, 300_000)
    for step in range(5):
        round_trip(end, model, step)
    tracemalloc.start()
    for step in range(5, 25):
        if isinstance(end, ServerEndpoint):
            end.send(1, Reply(1, step, step, model))
            end.flush()
            expect(end, PushMessage)
        else:
            expect(end, Reply)
            end.send(0, PushMessage(1, step + 1, step, (end.memory[1],)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000, peak  # the model has 1,200,000 bytes
    end.close()


def buckets_travel_apart() -> None:
    end = ends(1000, [HEADER_BYTES + 400, HEADER_BYTES + 3600], in_place=False)
    if isinstance(end, ServerEndpoint):
        end.send(1, Reply(1, 0, 0, model_of(end, 1000)))
        parts = sorted((expect(end, PushMessage) for _ in range(2)), key=lambda part: part.bucket)
        assert [part.arrays[0].size for part in parts] == [100, 900]
        assert np.concatenate([part.arrays[0] for part in parts]).tolist() == list(range(1000))
    else:
        expect(end, Reply)
        values = np.arange(1000, dtype=np.float32)
        for i, piece in enumerate((values[:100], values[100:])):
            end.send(0, PushMessage(1, 1, 0, (piece,), i, 2))
    end.flush()
    end.close()


CUT = (64, 20_000, 60_064)  # floats: behind its header, and two in messages of their own
VECTORS = [4 * numel for numel in CUT]
FRAMES = [HEADER_BYTES + 4 * numel + 64 * (i == 0) for i, numel in enumerate(CUT)]  # statistics go with bucket 0


def large_buckets_leave_from_the_gradient_and_small_ones_behind_their_header() -> None:
    for chunk_bytes in (1 << 30, 4096):
        buffers.CHUNK_BYTES = chunk_bytes
        end = ends(sum(CUT), FRAMES, in_place=False, vectors=VECTORS)
        starts = np.cumsum([0, *CUT]).tolist()
        for step in range(1, 5):
            if isinstance(end, ServerEndpoint):
                parts = {message.bucket: message for message in (expect(end, PushMessage) for _ in CUT)}
                there = np.concatenate([parts[i].arrays[0] for i in range(3) if parts[i].arrays])
                wanted = np.arange(sum(CUT), dtype=np.float32) + step
                if step == 3:  # its worker was cut off before it came to the second
                    assert parts[1].arrays == ()
                    wanted = np.delete(wanted, slice(starts[1], starts[2]))
                assert (there == wanted).all() and parts[0].statistics.tolist() == [step] * 4
                end.send(1, Reply(1, step, step, None))
            else:
                apart = mode in ("polling", "doorbells")
                assert [frame.size < 1000 for frame in end._frames[0]] == [True, apart, apart]
                end.memory[1][:] = np.arange(sum(CUT)) + step
                for i in (2, 1, 0):
                    part = () if (i, step) == (1, 3) else (end.memory[1][starts[i] : starts[i + 1]],)
                    statistics = None if i else np.full(4, step, np.float32)
                    end.send(0, PushMessage(1, step, step - 1, part, i, 3, statistics=statistics))
                assert expect(end, Reply).step == step
        end.close()
        WORLD.Barrier()
    buffers.CHUNK_BYTES = 1 << 30


def a_header_without_its_bucket_is_no_push_and_stops_nothing() -> None:
    if mode not in ("polling", "doorbells"):
        return
    end = ends(sum(CUT), FRAMES, in_place=False, vectors=VECTORS)
    push = PushMessage(1, 1, 0, (np.ones(CUT[1], np.float32),), 1, 3)
    if isinstance(end, ServerEndpoint):
        started = time.monotonic()
        assert end.recv(0.3) is None and time.monotonic() - started < 20
        WORLD.Barrier()
        assert expect(end, PushMessage).arrays[0].tolist() == push.arrays[0].tolist()
    else:
        packed = pack(push, LAYOUT, np.zeros(HEADER_BYTES, np.uint8), place=Place.APART)
        WORLD.Send([packed.head, buffers.MPI.BYTE], 0, common.PUSH + common.TAGS)
        WORLD.Barrier()
        WORLD.Send([packed.apart, buffers.MPI.BYTE], 0, common.PUSH + common.TAGS + common.VECTOR)
    end.close()


def a_bucket_of_another_size_than_its_header_says_is_refused() -> None:
    if mode not in ("polling", "doorbells"):
        return
    end = ends(sum(CUT), FRAMES, in_place=False, vectors=VECTORS)
    if isinstance(end, ServerEndpoint):
        try:
            end.recv(20.0)
        except WireError as error:
            assert f"got one of {VECTORS[1]} bytes apart from its header, expected 80 bytes" in str(error), error
        else:
            raise AssertionError("nothing was refused")
    else:
        packed = pack(
            PushMessage(1, 1, 0, (np.ones(20, np.float32),), 1, 3), LAYOUT, np.zeros(256, np.uint8), place=Place.APART
        )
        WORLD.Send([packed.head, buffers.MPI.BYTE], 0, common.PUSH + common.TAGS)
        WORLD.Send([np.zeros(VECTORS[1], np.uint8), buffers.MPI.BYTE], 0, common.PUSH + common.TAGS + common.VECTOR)
    end.close()


# What the rule does with each push, when its worker was answered at once twice: it goes on with the model of the step;
# waits for another step; goes on with an older model; stops.
STORY = (
    "newest",
    "newest",
    "newest",
    "newest",
    "later",
    "newest",
    "newest",
    "newest",
    "older",
    "newest",
    "newest",
    "stop",
)


def a_model_that_leaves_with_its_step_is_that_of_the_reply_or_thrown_away() -> None:
    if mode == "in place":  # where no worker is ever given an older model
        return
    floats = 1_000_000  # in pieces
    end = ends(floats)
    model, older, ahead = model_of(end, floats), np.full(floats, -1, np.float32), 0
    for step, fate in enumerate(STORY, 1):
        if isinstance(end, WorkerEndpoint):
            end.send(0, PushMessage(1, step, step - 1, (end.memory[1],)))
            reply = expect(end, Reply)
            wanted = {"newest": reply.version, "later": reply.version, "older": -1}
            assert reply.step == step
            if fate == "stop":
                assert reply.model is None
            else:
                assert (reply.model == wanted[fate]).all(), (step, fate, reply.model, wanted)
            end.taken()
            continue
        expect(end, PushMessage)
        for repeated in range(2 if fate == "later" else 1):
            end.flush()
            tell = end.begin_step([1], model)
            if tell is not None:
                ahead += 1
                assert not repeated, "it has not been told yet that the first is stale"
            for start in range(0, floats, 65_536):
                model[start : start + 65_536] += 1
                if tell is not None:
                    tell(min(start + 65_536, floats))
        given = {"newest": model, "later": model, "older": older, "stop": None}[fate]
        end.send(1, Reply(1, step, int(model[0]), given))
    if isinstance(end, ServerEndpoint):
        assert ahead == (7 if mode in ("polling", "doorbells") else 0), ahead
    end.close()


def of_two_arrivals_the_push_is_looked_at_before_the_ask() -> None:
    end = ends(64)
    if isinstance(end, ServerEndpoint):
        until_told("both sent")
        expect(end, PushMessage)
        expect(end, Ask)
    else:
        end.send(0, PushMessage(1, 1, 0, (end.memory[1],)))
        end.send(0, Ask(1, 1))
        tell("both sent")
        end.flush()
    end.close()


def a_farewell_brings_its_text() -> None:
    end = ends(64)
    if isinstance(end, ServerEndpoint):
        assert expect(end, Farewell) == Farewell(1, 7, "what a pity \N{DOG FACE}", 3)
    else:
        end.send(0, Farewell(1, 7, "what a pity \N{DOG FACE}", 3))
        end.flush()
    end.close()


def foreign_bytes_are_refused_by_the_rank_they_came_from() -> None:
    for junk, complaint in (  # of a push in shared memory the header there is what is read
        (np.full(HEADER_BYTES, 65, np.uint8), "starts with b'AAAA'"),
        (np.zeros(8, np.uint8), "starts with"),
    ):
        end = ends(64)
        WORLD.Barrier()
        if isinstance(end, ServerEndpoint):
            try:
                end.recv(20.0)
            except WireError as error:
                complaint = "starts with" if mode in ("shared", "in place") else complaint
                assert f"rank 0: message from rank 1: {complaint}" in str(error), error
            else:
                raise AssertionError("nothing was refused")
        else:
            WORLD.Send([junk, buffers.MPI.BYTE], 0, common.PUSH)
        end.close()


def a_wait_ends_in_time() -> None:
    end = ends(64)
    started = time.monotonic()
    assert end.recv(0.1) is None
    assert 0.1 <= time.monotonic() - started < 20
    end.close()


def a_rank_that_takes_nothing_in_is_told_by_name() -> None:
    floats = 3_000_000
    end = ends(floats, patience_s=LITTLE_S)
    WORLD.Barrier()
    if isinstance(end, WorkerEndpoint):
        tell("out of the barrier")
        until_told("given up")  # neither receives nor lets MPI work
        assert expect(end, Reply).model[-1] == 1
        end.flush()
    else:
        until_told("out of the barrier")  # else the other may take it in while it leaves that
        end.send(1, Reply(1, 0, 0, model_of(end, floats, 1)))
        assert end.model is not None or not end.idle()
        started, under_way = time.monotonic(), list(end._sending)
        try:
            end.flush()
        except Stalled as error:
            assert str(error) == "rank 1 took nothing in for 1 s", error
            assert LITTLE_S <= time.monotonic() - started < LITTLE_S + 20
        else:
            raise AssertionError("it left")
        finally:
            tell("given up")
        while not all(send_buffer.left() for send_buffer in under_way):
            pass
    WORLD.Barrier()
    end.free()


def a_message_that_has_left_leaves_the_end_idle() -> None:
    end = ends(1_000_000)
    if isinstance(end, ServerEndpoint):
        end.send(1, Reply(1, 0, 0, model_of(end, 1_000_000, 1)))
        end.flush()
        assert end.idle()
    else:
        expect(end, Reply)
    end.close()


def ranks_of_one_host_find_each_other_and_count_their_cores() -> None:
    host = find_host(WORLD)
    assert host.ranks == (0, 1)
    assert 1 <= host.cores <= (os.cpu_count() or 1)
    assert host._replace(cores=2).crowded(1) is False and host._replace(cores=3.5).crowded(2) is True
    host.comm.Free()


def who_sleeps_is_woken_by_the_bell_and_no_wake_is_lost() -> None:
    if mode == "polling":
        return
    usual, common._RUNG_S = common._RUNG_S, (15.0, 15.0)  # so long that nothing but a bell ends a sleep in time
    try:
        for floats in (64, 20_000):  # the model behind the header, and apart
            end = ends(floats)
            model = model_of(end, floats)
            for step in range(500):
                started = time.monotonic()
                round_trip(end, model, step)
                assert time.monotonic() - started < 10, f"round {step}"
            end.close()
            WORLD.Barrier()
    finally:
        common._RUNG_S = usual


def a_worker_that_waits_is_asked_for_help_and_gets_its_reply() -> None:
    end, asked = ends(64), 0
    if isinstance(end, WorkerEndpoint):

        def help() -> bool:
            nonlocal asked
            asked += 1
            return asked == 2

        end.help = help
        started = time.monotonic()
        assert end.recv(0.2) is None and 0.2 <= time.monotonic() - started < 10
        waited, asked = asked, 0
        assert waited >= 2
        end.send(0, Ask(1, 1))
        assert expect(end, Reply).step == 1 and asked
    else:
        model = model_of(end, 64, 1)
        expect(end, Ask)
        if end._doorbells is not None:
            doorbells, limit = end._doorbells, time.monotonic() + 20.0
            while not doorbells.is_asleep(1):
                assert time.monotonic() < limit
                time.sleep(0.005)
            doorbells.wake(1)
        end.send(1, Reply(1, 1, 1, model))
    end.close()


def one_who_is_slow_is_looked_after() -> None:
    looks = []
    end = ends(3_000_000, patience_s=20.0)
    if isinstance(end, ServerEndpoint):

        def look() -> None:
            looks.append(1)
            tell("looked")

        end.look = look
        model = model_of(end, 3_000_000, 1)
        until_told("ready")
        started = time.monotonic()
        end.send(1, Reply(1, 0, 0, model))
        end.flush()
        assert 1 <= len(looks) <= 1 + (time.monotonic() - started) / 0.1, looks  # every 0.1 s
    else:
        tell("ready")  # a receive that is posted after the model was offered may take it in by itself: no look is made
        until_told("looked")
        expect(end, Reply)
    end.close()


def more_chunks_than_tags_are_refused() -> None:
    buffers.CHUNK_BYTES = 128
    try:
        ends(100_000)
    except PlatformError as error:
        assert "1 buckets of up to 3126 chunks need more tags than there are (500 a bucket" in str(error), error
    else:
        raise AssertionError("accepted")
    finally:
        buffers.CHUNK_BYTES = 1 << 30


CHECKS: list[Callable[[], None]] = [
    small_and_large_models_and_chunks_arrive_whole,
    a_push_in_place_is_sent_from_where_the_gradient_lies,
    the_steady_state_allocates_nothing_of_the_size_of_the_model,
    buckets_travel_apart,
    large_buckets_leave_from_the_gradient_and_small_ones_behind_their_header,
    a_header_without_its_bucket_is_no_push_and_stops_nothing,
    a_bucket_of_another_size_than_its_header_says_is_refused,
    a_model_that_leaves_with_its_step_is_that_of_the_reply_or_thrown_away,
    of_two_arrivals_the_push_is_looked_at_before_the_ask,
    a_farewell_brings_its_text,
    foreign_bytes_are_refused_by_the_rank_they_came_from,
    a_wait_ends_in_time,
    a_rank_that_takes_nothing_in_is_told_by_name,
    a_message_that_has_left_leaves_the_end_idle,
    ranks_of_one_host_find_each_other_and_count_their_cores,
    who_sleeps_is_woken_by_the_bell_and_no_wake_is_lost,
    a_worker_that_waits_is_asked_for_help_and_gets_its_reply,
    one_who_is_slow_is_looked_after,
    more_chunks_than_tags_are_refused,
]


def main() -> None:
    assert "torch" not in sys.modules, "the transport must not import torch: threads are set before it is"
    global mode
    for mode in MODES:
        for check in CHECKS:
            try:
                check()
            except Exception:
                print(f"rank {RANK}, {mode}: {traceback.format_exc()}", file=sys.stderr, flush=True)
                WORLD.Abort(1)
            WORLD.Barrier()
            while joined:
                joined.pop().free()
    if RANK == 0:
        Path(sys.argv[1]).write_text(json.dumps([check.__name__ for check in CHECKS]))


if __name__ == "__main__":
    main()
