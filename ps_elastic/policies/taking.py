"""How each action of a rule takes effect in the ledger, and the laws that it must keep; for `decide` alone.

A breach raises PolicyError by law (see ledger.py) and push.
"""

from __future__ import annotations

import math

from ps_elastic.errors import PolicyError, Stalled
from ps_elastic.policies.events import ZERO, Drop, Measure, PushId, Release, Step, Term, Wake
from ps_elastic.policies.ledger import Debt, Ledger


def take_step(ledger: Ledger, step: Step) -> None:
    if not step.terms:
        raise PolicyError("an empty Step")
    if not 0 < step.share <= 1:
        raise PolicyError(f"share {step.share} of a Step with {tuple(step.terms[0].push)}: expected 0 < share <= 1")
    if step.apply == "amend":
        _take_amend(ledger, step)
    else:
        _take_terms(ledger, step)
    ledger.owed = step


def take_drop(ledger: Ledger, drop: Drop) -> None:
    if drop.push not in ledger.held:
        raise PolicyError(f"law 1: push {tuple(drop.push)} is dropped ({drop.reason}) but not held")
    if drop.push in ledger.debts:
        ledger.close_debt(drop.push)
    ledger.let_go(drop.push)


def take_release(ledger: Ledger, release: Release) -> None:
    if not math.isfinite(release.own):
        raise PolicyError(f"a Release with own = {release.own}")
    for worker in release.workers:
        seat = ledger.workers.get(worker)
        if seat is None:
            raise PolicyError(f"law 2: worker {worker} is released but not a member")
        if worker in ledger.waiting:
            del ledger.waiting[worker]
        elif not 0 < seat.assigned - seat.seen < ledger.jobs:
            raise PolicyError(
                f"law 2: worker {worker} is released but does not wait (its step {seat.assigned} is under way, "
                "or it has not asked yet)"
            )
        ledger.assign(worker, release.own)
        if seat.newest is not None:
            ledger.unref(seat.newest)
            seat.newest = None


def take_wake(ledger: Ledger, wake: Wake) -> None:
    if not math.isfinite(wake.at):
        raise PolicyError(f"a Wake at {wake.at}")
    ledger.wake_at = wake.at


def take_measure(ledger: Ledger, measure: Measure) -> None:
    for push in measure.pushes:
        if push not in ledger.views:
            raise PolicyError(f"view {tuple(push)} is to be measured but not under way")
    ledger.owed = list(measure.pushes)


def check_answered(ledger: Ledger) -> None:
    if ledger.owed:
        raise PolicyError(f"the server left {ledger.owed} unanswered")


def check_stalled(ledger: Ledger) -> None:
    stuck = len(ledger.waiting) == len(ledger.workers) and ledger.wake_at is None and not ledger.views
    if stuck and ledger.workers and ledger.started and not ledger.done:
        held = ", ".join(str(tuple(push)) for push in ledger.held) or "nothing"
        raise Stalled(f"stalled at version {ledger.version}: workers {list(ledger.waiting)} all wait; held: {held}")


def _take_terms(ledger: Ledger, step: Step) -> None:
    total = sum([term.weight for term in step.terms])
    if not (math.isfinite(total) and (total > 0 or step.combine == "sum")):
        raise PolicyError(f"the weights of a Step sum to {total}")
    if step.combine == "sum":
        total = 1.0
    used: dict[PushId, None] = {}
    for term in step.terms:
        if term.stands_for is not None:
            _open_debt(ledger, term, term.weight / total)
        elif term.push in ledger.held and term.push not in used:
            if term.push in ledger.debts:
                raise PolicyError(f"law 4: push {tuple(term.push)} is owed; repay it with ledger.amend")
            used[term.push] = None
        elif term.push in used or not ledger.is_kept(term.push):
            raise PolicyError(f"law 1: push {tuple(term.push)} is used but neither held nor kept")
    for push in used:
        if ledger.keeps_last and (seat := ledger.workers.get(push.worker)) is not None:
            previous, seat.last = seat.last, push
            ledger.ref(push)
            if previous is not None:
                ledger.unref(previous)
        ledger.let_go(push)


def _open_debt(ledger: Ledger, term: Term, part: float) -> None:
    missing, stand_in = term.stands_for, term.push
    if missing is None or missing not in ledger.views or missing in ledger.debts:
        raise PolicyError(f"law 4: {stand_in} cannot stand for {missing}, which is not under way or already owed")
    alive = stand_in in ledger.held or ledger.is_kept(stand_in)
    if not alive and stand_in not in (ZERO, PushId(0, ledger.version + 1)):
        raise PolicyError(f"law 1: push {tuple(stand_in)} is a stand-in but neither held nor kept")
    ledger.debts[missing] = Debt(stand_in, part, ledger.version + 1)
    ledger.ref(stand_in)


def _take_amend(ledger: Ledger, step: Step) -> None:
    missing = step.terms[0].push
    if missing not in ledger.held or missing not in ledger.debts or step != ledger.amend(missing):
        raise PolicyError(f"law 4: the amend of {tuple(missing)} is not what its debt owes")
    ledger.unref(ledger.debts.pop(missing).stand_in)
    ledger.let_go(missing)
