"""The server's and a worker's loop, on a clock and an endpoint that follow a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ps_elastic.errors import Stalled, WireError
from ps_elastic.runtime.loops import awaited, serve, work
from ps_elastic.transport.messages import Ask, Farewell, Message, PushMessage, Reply
from ps_elastic.worker.worker import Worker


class Script:
    """An endpoint whose messages come at their times; waiting moves the clock, nothing else does."""

    rank, size = 0, 3

    def __init__(self, *coming: tuple[float, int, Message], busy_until: float = 0.0) -> None:
        self.now, self.coming, self.busy_until = 0.0, list(coming), busy_until
        self.sent: list[tuple[float, int, Message]] = []
        self.timeouts: list[float] = []
        self.flushes = 0
        self.reads: list[float] = []  # when the model of a reply was read

    def clock(self) -> float:
        return self.now

    def send(self, dest: int, message: Message) -> None:
        self.sent.append((self.now, dest, message))

    def recv(self, timeout: float) -> tuple[int, Message] | None:
        self.timeouts.append(timeout)
        if self.coming and self.coming[0][0] <= self.now + timeout:
            at, source, message = self.coming.pop(0)
            self.now = max(self.now, at)
            return source, message
        self.now += timeout
        return None

    def taken(self) -> None:
        self.reads.append(self.now)

    def flush(self) -> None:
        self.flushes += 1

    def idle(self) -> bool:
        return self.now >= self.busy_until


class Counter:
    """A server of workers 1 and 2 that answers each push at once, and is finished when both have said farewell."""

    def __init__(self) -> None:
        self.ledger = SimpleNamespace(workers={1: None, 2: None}, waiting={}, version=7)
        self.wake_at: float | None = None
        self.ticks: list[float] = []
        self.gone: set[int] = set()

    @property
    def finished(self) -> bool:
        return len(self.gone) == 2

    def start(self, now: float) -> Iterator[tuple[int, Reply]]:
        yield from ((worker, Reply(worker, 0, 0, None)) for worker in (1, 2))

    def receive(self, message: Message, now: float) -> Iterator[tuple[int, Reply]]:
        if isinstance(message, Farewell):
            self.gone.add(message.worker)
        if isinstance(message, PushMessage):
            yield message.worker, Reply(message.worker, message.step, 8, None)

    def tick(self, now: float) -> Iterator[tuple[int, Reply]]:
        self.ticks.append(now)
        if self.wake_at is not None and now >= self.wake_at:
            self.wake_at = None
        yield from ()


def push(at: float, worker: int, step: int = 1) -> tuple[float, int, Message]:
    return at, worker, PushMessage(worker, step, 0, ())


def farewells(at: float) -> list[tuple[float, int, Message]]:
    return [(at, worker, Farewell(worker, 1)) for worker in (1, 2)]


def run(script: Script, server: Any = None, **changed: Any) -> list[str]:
    """Serve to the end; return the warnings."""
    warnings: list[str] = []
    settings = {"warning_s": 30.0, "deadline_s": 300.0, "on_turn": lambda now: None, **changed}
    serve(server or Counter(), script, script.clock, warn=warnings.append, **settings)
    return warnings


def test_the_server_sends_what_it_has_to_say_until_all_are_gone():
    script = Script(push(1.0, 2), *farewells(2.0))
    assert run(script) == []
    assert [(at, dest, message.step) for at, dest, message in script.sent] == [(0, 1, 0), (0, 2, 0), (1, 2, 1)]


def test_the_server_looks_up_ten_times_a_second_and_when_the_rule_wants_to_be_woken():
    server = Counter()
    server.wake_at = 0.33
    turns: list[float] = []
    script = Script(*farewells(0.5))
    run(script, server, on_turn=turns.append)
    assert max(script.timeouts) == 0.1
    assert server.ticks == pytest.approx([0.1, 0.2, 0.3, 0.33, 0.43])
    assert turns == pytest.approx([0.1, 0.2, 0.3, 0.33, 0.43, 0.5])


def test_while_messages_come_the_server_looks_up_every_ten_milliseconds():
    turns: list[float] = []
    pushes = [push(0.003 * i, 2, i) for i in range(1, 11)]
    run(Script(*pushes, *farewells(0.5)), on_turn=turns.append)
    assert turns[:3] == pytest.approx([0.012, 0.024, 0.13])


def test_a_silence_is_told_once_and_again_after_the_next_push():
    warnings = run(Script(push(70.0, 2), *farewells(110.0)))
    assert warnings == [
        "no push for 30 s; awaited: workers [1, 2]; waiting: []; version 7",
        "no push for 30 s; awaited: workers [1, 2]; waiting: []; version 7",
    ]


def test_without_a_push_the_run_ends_by_its_deadline_naming_who_is_awaited():
    server = Counter()
    server.ledger.waiting = {2: None}
    script = Script(push(5.0, 2))
    with pytest.raises(Stalled, match=r"no push for 300 s; awaited: workers \[1\]; waiting: \[2\]; version 7"):
        run(script, server)
    assert script.now == pytest.approx(305, abs=0.2)


def test_asking_again_is_not_a_sign_of_life():
    script = Script(*[(60.0 * i, 2, Ask(2, 1)) for i in range(1, 100)])
    with pytest.raises(Stalled, match="no push for 300 s"):
        run(script)
    assert script.now < 301


def test_who_has_said_farewell_is_not_awaited():
    assert awaited(Counter(), {1}) == "awaited: workers [2]; waiting: []; version 7"
    with pytest.raises(Stalled, match=r"awaited: workers \[2\];"):
        run(Script((1.0, 1, Farewell(1, 1))))


class Labourer:
    """Worker 1: a push takes `step_s` of the script's time; `pipeline` of them may be unanswered while it goes on."""

    unanswered, may_go_on = Worker.unanswered, Worker.may_go_on

    def __init__(self, script: Script, step_s: float = 1.0, pipeline: int = 0) -> None:
        self.rank, self.step, self.told, self.script, self.step_s = 1, 0, -1, script, step_s
        self.pipeline = pipeline
        self.noted: list[tuple[int, float, float]] = []

    def load(self, reply: Reply) -> bool:
        self.told = reply.step
        return reply.model is not None

    def push(self, emit: Callable[[PushMessage], None]) -> None:
        self.script.now += self.step_s
        self.step += 1
        for bucket in (1, 0):
            emit(PushMessage(1, self.step, 0, (), bucket, 2))

    def note(self, reply: Reply, t_s: float, send_s: float, wait_s: float) -> None:
        self.noted.append((reply.step, t_s, wait_s))


def reply(at: float, step: int, *, stop: bool = False) -> tuple[float, int, Message]:
    return at, 0, Reply(1, step, step, None if stop else ())


def labour(script: Script, ask_again_s: float = 60.0, deadline_s: float = 600.0, pipeline: int = 0) -> Labourer:
    worker = Labourer(script, pipeline=pipeline)
    work(worker, script, script.clock, ask_again_s=ask_again_s, deadline_s=deadline_s)  # type: ignore[arg-type]
    return worker


def test_a_worker_sends_every_bucket_of_a_push_for_each_reply_and_then_takes_its_leave():
    script = Script(reply(0.0, 0), reply(3.0, 1), reply(4.5, 2, stop=True))
    worker = labour(script)
    assert [(at, message.step, getattr(message, "bucket", None)) for at, _, message in script.sent] == [
        (1.0, 1, 1), (1.0, 1, 0), (4.0, 2, 1), (4.0, 2, 0), (4.5, 2, None),
    ]  # fmt: skip
    assert script.sent[-1][2] == Farewell(1, 2)
    assert script.flushes == 1
    assert script.reads == [0.0, 3.0, 4.5]  # before it computes: the server may wait for it
    assert worker.noted == [(0, 0.0, 0.0), (1, 3.0, 2.0), (2, 4.5, 0.5)]


def test_a_worker_goes_on_while_few_enough_pushes_are_unanswered_and_leaves_when_all_are_answered():
    script = Script(
        reply(0.0, 0), reply(3.5, 1), reply(3.6, 1), reply(4.0, 2, stop=True), reply(7.0, 3, stop=True),
    )  # fmt: skip
    worker = labour(script, pipeline=1)
    pushes = [(at, message.step) for at, _, message in script.sent if getattr(message, "bucket", 0) == 0]
    assert pushes == [(1.0, 1), (2.0, 2), (4.5, 3), (7.0, 3)]  # it waits with two unanswered; the last is the farewell
    assert script.sent[-1][2] == Farewell(1, 3)
    assert worker.noted == [(0, 0.0, 0.0), (1, 3.5, 1.5), (2, 4.5, 0.0), (3, 7.0, 2.5)]


def test_a_second_copy_of_an_earlier_reply_is_ignored():
    script = Script(reply(0.0, 0), reply(0.5, 0), reply(0.6, 0), reply(2.0, 1, stop=True))
    assert [step for step, _, _ in labour(script).noted] == [0, 1]


def test_a_worker_without_a_reply_asks_again_and_again():
    script = Script(reply(0.0, 0), reply(10.0, 1, stop=True))
    labour(script, ask_again_s=3.0)
    asked = [(at, message) for at, _, message in script.sent if isinstance(message, Ask)]
    assert [message for _, message in asked] == [Ask(1, 1)] * 2
    assert [at for at, _ in asked] == [5.0, 9.0]  # the clock ticks in seconds, so after more than three come four


def test_a_worker_does_not_ask_while_its_push_is_still_leaving():
    script = Script(reply(0.0, 0), reply(10.0, 1, stop=True), busy_until=8.0)
    labour(script, ask_again_s=1.0)
    assert min(at for at, _, message in script.sent if isinstance(message, Ask)) == 8.0


def test_a_worker_gives_up_on_a_server_that_never_answers():
    with pytest.raises(Stalled, match="worker 1: no reply from the server for 601 s"):
        labour(Script(reply(0.0, 0)))


def test_a_worker_refuses_what_is_not_a_reply():
    with pytest.raises(WireError, match="worker 1 got a Ask"):
        labour(Script((0.0, 0, Ask(1, 0))))
