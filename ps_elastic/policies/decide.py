"""The one door to the ledger: an event goes in, the rule's actions come out, each already in effect."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ps_elastic.errors import PolicyError
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
    action_text,
    event_text,
    repeated,
)
from ps_elastic.policies.ledger import Ledger
from ps_elastic.policies.transitions import (
    check_answered,
    check_stalled,
    finish,
    note_applied,
    note_asked,
    note_joined,
    note_left,
    note_measured,
    note_push,
    start_job,
    take_drop,
    take_measure,
    take_release,
    take_step,
    take_wake,
)

Decision = tuple["Action | None", tuple[PushId, ...]]


def decide(policy: Policy, ledger: Ledger, event: Event, now: float) -> Iterator[Decision]:
    """Note `event` at once, and return the iterator of (action, payloads that nobody needs any more).

    The caller carries out each action before it takes the next, answers a Step by calling `decide` with its
    Applied and a Measure with its Measured, and exhausts the iterator. `(None, freed)` means that the event alone
    freed payloads. Events that change nothing (a duplicate, an early Woke) are logged and never reach the rule.

    Raises PolicyError (the rule broke a law), Stalled (law 3), WireError (the event cannot be).
    """
    if type(event) in (Applied, Measured) and ledger.started:
        if ledger.log is not None:
            ledger.acts.append(event)  # type: ignore[arg-type]
        _ANSWERS[type(event)](ledger, event)  # the time stays that of the event answered: the log has no other
        return iter(())
    if now > ledger.now:
        ledger.now = now
    try:
        ignored, actions = _NOTES[type(event)](policy, ledger, event)
    except PolicyError as error:
        raise _blame(policy, event, error) from None
    return _run(policy, ledger, event, now, ignored, actions)


def _run(
    policy: Policy, ledger: Ledger, event: Event, now: float, ignored: str | None, actions: Iterable[Action]
) -> Iterator[Decision]:
    ledger.acts.clear()
    acts, freed, log = ledger.acts, ledger.freed, ledger.log
    try:
        if freed:
            yield None, _taken(freed)
        for action in actions:
            take = _TAKES.get(type(action))
            if take is None:
                raise PolicyError(f"yielded {action!r}; expected a Step, Drop, Release, Wake or Measure")
            if log is not None:
                acts.append(action)  # its text is made when all is done: nobody waits for that
            take(ledger, action)
            yield action, (_taken(freed) if freed else ())
            check_answered(ledger)
    except PolicyError as error:
        raise _blame(policy, event, error) from None
    finally:
        if log is not None:
            log(_line(ledger, event, now, ignored))
        ledger.closed.clear()
    check_stalled(ledger)


def _line(ledger: Ledger, event: Event, now: float, ignored: str | None) -> str:
    extra = f', "ignored": "{ignored}"' if ignored else ""
    if ledger.layerwise:
        index, count = ledger.bucket
        opening = f', "buckets": {count}' if type(event) is Applied else ""
        extra = f', "bucket": {index}{opening}{extra}'
    if ledger.closed:
        extra += f', "closed": {[list(push) for push in ledger.closed]}'
    actions = ", ".join(map(action_text, ledger.acts))
    return f'{{{event_text(event)}, "t_s": {repeated(now)}, "rank": 0, "actions": [{actions}]{extra}}}'


def _taken(ids: list[PushId]) -> tuple[PushId, ...]:
    taken = tuple(ids)
    ids.clear()
    return taken


def _blame(policy: Policy, event: Event, error: PolicyError) -> PolicyError:
    return PolicyError(f"rule {type(policy).__name__} on {event}: {error}")


def _on_push(policy: Policy, ledger: Ledger, push: Push) -> tuple[str | None, Iterable[Action]]:
    ignored = note_push(ledger, push)
    if ignored:
        return ignored, ()
    if ledger.done:
        return None, (Drop(push.id, "done"), Release((push.id.worker,)))
    if ledger.jobs > 1:
        return None, _next_job_first(policy, push, ledger)
    return None, policy.on_push(push, ledger)


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
    return None, actions


def _on_start(policy: Policy, ledger: Ledger, event: Applied) -> tuple[str | None, Iterable[Action]]:
    note_applied(ledger, event)
    return None, policy.on_start(ledger)


class _Again(Release):
    """A Release whose view the ledger already holds: a queued job begins, or a lost reply is sent again."""


_NOTES: dict[type, Any] = {
    Push: _on_push,
    Asked: _on_asked,
    Joined: _on_joined,
    Left: _on_left,
    Woke: _on_woke,
    Done: _on_done,
    Applied: _on_start,
}
_ANSWERS: dict[type, Any] = {Applied: note_applied, Measured: note_measured}
_TAKES: dict[type, Any] = {
    Step: take_step,
    Drop: take_drop,
    Release: take_release,
    Wake: take_wake,
    Measure: take_measure,
    _Again: lambda ledger, action: None,
}
