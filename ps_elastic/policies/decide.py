"""The one door to the ledger: an event goes in, the policy's actions come out, each in effect before it asks for more.

Who carries the actions out does so in a loop of its own:

    actions = begin(policy, ledger, event, now)
    try:
        for action in actions:
            take(ledger, action)
            ...  # carry it out; answer a Step by its Applied, a Measure by each Measured
    except BaseException:
        end(ledger, broken_off=True)
        raise
    end(ledger)

`ledger.freed` has the payloads that nobody needs any more, after `begin` and after each action, until it is emptied.
`decide` is that loop as an iterator, for those who are not in a hurry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ps_elastic.errors import PolicyError
from ps_elastic.policies.actions import (
    check_stalled,
    take_drop,
    take_measure,
    take_note,
    take_release,
    take_step,
    take_wake,
)
from ps_elastic.policies.base import Policy
from ps_elastic.policies.events import (
    Action,
    Applied,
    Asked,
    Done,
    Drop,
    Event,
    Joined,
    Left,
    Measure,
    Measured,
    Push,
    PushId,
    Release,
    Step,
    Wake,
    Woke,
)
from ps_elastic.policies.ledger import Ledger
from ps_elastic.policies.transitions import (
    finish,
    note_applied,
    note_asked,
    note_joined,
    note_left,
    note_measured,
    note_push,
    note_start,
    start_job,
)

Decision = tuple["Action | None", tuple[PushId, ...]]


def begin(policy: Policy, ledger: Ledger, event: Event, now: float) -> Iterable[Action]:
    """Note `event`, which is no answer, and return what the policy orders; each is to be taken before the next.

    Events that change nothing (a duplicate, an early Woke) are logged and never reach the policy. Raises WireError (the
    event cannot be); and, like what it returns, PolicyError naming the policy.
    """
    if now > ledger.now:
        ledger.now = now
    ledger.turn = policy, event, now, None
    try:
        if type(event) is not Push:
            ignored, actions = _NOTES[type(event)](policy, ledger, event)
        elif ignored := note_push(ledger, event):
            actions = ()
        elif ledger.done:
            actions = Drop(event.id, "done"), Release((event.id.worker,))
        elif ledger.jobs > 1:
            actions = _next_job_first(policy, event, ledger)
        else:
            actions = policy.on_push(event, ledger)
    except PolicyError as error:
        raise ledger.breach(str(error)) from None
    if ignored:
        ledger.turn = policy, event, now, ignored
    return actions if type(actions) is tuple else _blaming(ledger, actions)


def take(ledger: Ledger, action: Action) -> None:
    """Let an action take effect. Raises PolicyError naming the policy if it breaks an invariant."""
    TAKES[type(action)](ledger, action)


def end(ledger: Ledger, *, broken_off: bool = False) -> None:
    """Every action of the event was carried out, or an error ended that: its line is written.

    Raises PolicyError if an answer is missing, and Stalled (invariant 3), unless it was `broken_off`.
    """
    if ledger.log is not None:
        _, event, now, ignored = ledger.turn
        extra = f', "ignored": "{ignored}"' if ignored else ""
        if ledger.layerwise:
            index, count = ledger.bucket
            opening = f', "buckets": {count}' if type(event) is Applied else ""
            extra = f', "bucket": {index}{opening}{extra}'
        if ledger.closed:
            extra += f', "closed": {[list(push) for push in ledger.closed]}'
        ledger.log((event, now, tuple(ledger.acts), extra))
    ledger.acts.clear()
    if ledger.closed:
        ledger.closed.clear()
    if not broken_off:
        if ledger.owed:
            raise ledger.unanswered()
        if not ledger.views:
            check_stalled(ledger)
    ledger.turn = None


def decide(policy: Policy, ledger: Ledger, event: Event, now: float) -> Iterator[Decision]:
    """Note `event`, which came at `now` seconds, at once, and return the iterator of (action, payloads freed).

    Payloads are freed, by their PushId, if nobody needs them any more; `(None, freed)`: the event alone freed them.
    The caller carries out each action before it takes the next, answers a Step by calling `decide` with its
    Applied and a Measure with a Measured for each of its pushes, and exhausts the iterator.

    Raises, at once or from the iterator, PolicyError (the policy broke an invariant, or an answer is missing or was
    not asked for), Stalled (every worker waits and no Wake is pending) and WireError (the event cannot be).
    """
    if type(event) in ANSWERS and ledger.started:
        ANSWERS[type(event)](ledger, event)
        return iter(())
    return _decisions(ledger, begin(policy, ledger, event, now))


def _decisions(ledger: Ledger, actions: Iterable[Action]) -> Iterator[Decision]:
    freed = ledger.freed
    try:
        if freed:
            yield None, _taken(freed)
        for action in actions:
            take(ledger, action)
            yield action, (_taken(freed) if freed else ())
    except BaseException:
        end(ledger, broken_off=True)
        raise
    end(ledger)


def _taken(ids: list[PushId]) -> tuple[PushId, ...]:
    taken = tuple(ids)
    ids.clear()
    return taken


def _blaming(ledger: Ledger, actions: Iterable[Action]) -> Iterator[Action]:
    """What the policy orders, while it is asked for more: an error of its own names it."""
    try:
        yield from actions
    except PolicyError as error:
        raise ledger.breach(str(error)) from None


def _next_job_first(policy: Policy, push: Push, ledger: Ledger) -> Iterator[Action]:
    if start_job(ledger, push.id.worker):
        yield _Again((push.id.worker,))
    yield from policy.on_push(push, ledger)


def _on_asked(policy: Policy, ledger: Ledger, event: Asked) -> tuple[str | None, Iterable[Action]]:
    ignored = note_asked(ledger, event.worker, event.step)
    if ignored == "again":
        return None, (_Again((event.worker,)),)
    if ignored:
        return ignored, ()
    if ledger.done:
        return None, (Release((event.worker,)),)
    return None, policy.on_ask(event.worker, ledger)


def _on_joined(policy: Policy, ledger: Ledger, event: Joined) -> tuple[str | None, Iterable[Action]]:
    ignored = note_joined(ledger, event.worker, event.step)
    return ignored, () if ignored or ledger.done else policy.on_join(event.worker, ledger)


def _on_left(policy: Policy, ledger: Ledger, event: Left) -> tuple[str | None, Iterable[Action]]:
    ignored = note_left(ledger, event.worker)
    return ignored, () if ignored or ledger.done else policy.on_leave(event.worker, ledger)


def _on_woke(policy: Policy, ledger: Ledger, event: Woke) -> tuple[str | None, Iterable[Action]]:
    if ledger.wake_at is None or ledger.now < ledger.wake_at:
        return "early", ()
    ledger.wake_at = None
    return None, policy.on_wake(ledger)


def _on_done(policy: Policy, ledger: Ledger, event: Done) -> tuple[str | None, Iterable[Action]]:
    if ledger.done:
        return "done", ()
    actions: list[Action] = [Drop(push, "done") for push in finish(ledger)]
    if ledger.waiting:
        actions.append(Release(tuple(ledger.waiting)))
    return None, tuple(actions)


def _on_start(policy: Policy, ledger: Ledger, event: Applied) -> tuple[str | None, Iterable[Action]]:
    note_start(ledger, event)
    return None, policy.on_start(ledger)


class _Again(Release):
    """A Release of a model that was assigned already: a queued job begins, or a lost reply is sent again."""


_NOTES: dict[type, Callable[[Policy, Ledger, Any], tuple[str | None, Iterable[Action]]]] = {
    Asked: _on_asked,
    Joined: _on_joined,
    Left: _on_left,
    Woke: _on_woke,
    Done: _on_done,
    Applied: _on_start,
}
ANSWERS: dict[type, Callable[[Ledger, Any], None]] = {Applied: note_applied, Measured: note_measured}


def _unknown(ledger: Ledger, action: object) -> None:
    raise ledger.breach(f"yielded {action!r}; expected a Step, Drop, Release, Wake or Measure")


class _Takes(dict[type, Callable[[Ledger, Any], None]]):
    """How an action takes effect, by its class: what `take` looks up, for those who are in a hurry."""

    def __missing__(self, kind: type) -> Callable[[Ledger, Any], None]:
        return _unknown


TAKES = _Takes(
    {Step: take_step, Drop: take_drop, Release: take_release, Wake: take_wake, Measure: take_measure, _Again: take_note}
)
