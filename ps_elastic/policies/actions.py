"""How the ledger changes by each action as the policy yields it, and the invariants that it must keep.

For decide.py alone. Each function raises PolicyError naming the policy if the action breaks an invariant.
"""

from __future__ import annotations

from math import inf, isfinite
from operator import itemgetter

from ps_elastic.errors import Stalled
from ps_elastic.policies.events import ZERO, Drop, Measure, PushId, Release, Step, Term, Wake
from ps_elastic.policies.ledger import Debt, Ledger, View

_weight = itemgetter(1)  # of a term


def take_step(ledger: Ledger, step: Step) -> None:
    if ledger.owed:
        raise ledger.unanswered()
    ledger.acts.append(step)
    terms, share, combine, apply = step
    if not terms:
        raise ledger.breach("an empty Step")
    if not 0 < share <= 1:
        raise ledger.breach(f"share {share} of a Step with {tuple(terms[0].push)}: expected 0 < share <= 1")
    ledger.owed = step
    if apply == "amend":
        _take_amend(ledger, step)
        return
    total = sum(map(_weight, terms))
    if not (0 < total < inf or (combine == "sum" and isfinite(total))):
        raise ledger.breach(f"the weights of a Step sum to {total}")
    if combine == "sum":
        total = 1.0
    held, used = ledger.held, dict[PushId, None]()
    for term in terms:
        push, weight, missing = term
        if missing is not None:
            _open_debt(ledger, term, weight / total)
        elif push in held and push not in used:
            if push in ledger.debts:
                raise ledger.breach(f"invariant 4: push {tuple(push)} had a placeholder; use ledger.amend")
            used[push] = None
        elif push in used or not ledger.is_kept(push):
            raise ledger.breach(f"invariant 1: push {tuple(push)} is used but neither held nor kept")
    if ledger.keeps_last:
        _keep_last(ledger, used)
    ledger.let_go(used)


def take_drop(ledger: Ledger, drop: Drop) -> None:
    take_note(ledger, drop)
    if drop.push not in ledger.held:
        raise ledger.breach(f"invariant 1: push {tuple(drop.push)} is dropped ({drop.reason}) but not held")
    if drop.push in ledger.debts:
        ledger.close_debt(drop.push)
    ledger.let_go((drop.push,))


def take_release(ledger: Ledger, release: Release) -> None:
    """The next push of each worker is under way now, on the model as it is, plus c * own * its last push."""
    if ledger.owed:
        raise ledger.unanswered()
    ledger.acts.append(release)
    workers, own = release
    if own and not isfinite(own):
        raise ledger.breach(f"a Release with own = {own}")
    members, waiting = ledger.workers, ledger.waiting
    for worker in workers:
        if worker not in members:
            raise ledger.breach(f"invariant 2: worker {worker} is released but not a member")
        member = members[worker]
        if worker in waiting:
            del waiting[worker]
        elif not 0 < member.assigned - member.seen < ledger.jobs:
            raise ledger.breach(
                f"invariant 2: worker {worker} is released but does not wait (its step {member.assigned} is under "
                "way, or it has not asked yet)"
            )
        if ledger.pipeline:
            ledger.answer_ahead(worker, member, own)
        else:
            own_push = ledger.keep_own(worker, member) if own else None
            member.assigned += 1
            push = PushId(worker, member.assigned)
            if member.assigned == member.seen + 1:
                member.due = push
            ledger.views[push] = View(ledger.version, own, own_push, ledger.travelled, ledger.now)
            if ledger.unmeasured is not None:
                ledger.unmeasured[push] = None
        if member.newest is not None:
            ledger.unref(member.newest)
            member.newest = None


def take_wake(ledger: Ledger, wake: Wake) -> None:
    take_note(ledger, wake)
    if not isfinite(wake.at):
        raise ledger.breach(f"a Wake at {wake.at}")
    ledger.wake_at = wake.at


def take_measure(ledger: Ledger, measure: Measure) -> None:
    take_note(ledger, measure)
    for push in measure.pushes:
        if push not in ledger.views:
            raise ledger.breach(f"the copy of push {tuple(push)} is to be measured, but the push is not under way")
    ledger.owed = list(measure.pushes)


def take_note(ledger: Ledger, action: Drop | Release | Wake | Measure) -> None:
    """Note an action for the log; that is all, or only the beginning (which is written out where there are many)."""
    if ledger.owed:
        raise ledger.unanswered()
    ledger.acts.append(action)


def check_stalled(ledger: Ledger) -> None:
    """Raise Stalled if there is nobody of whom anything could come; to be asked when nothing is under way."""
    stuck = len(ledger.waiting) == len(ledger.workers) and ledger.wake_at is None
    if stuck and ledger.workers and ledger.started and not ledger.done:
        held = ", ".join(str(tuple(push)) for push in ledger.held) or "nothing"
        raise Stalled(f"stalled at version {ledger.version}: workers {list(ledger.waiting)} all wait; held: {held}")


def _keep_last(ledger: Ledger, used: dict[PushId, None]) -> None:
    """The payload of each worker's last push that was used lives on."""
    for push in used:
        if (member := ledger.workers.get(push.worker)) is not None:
            ledger.ref(push)
            if member.last is not None:
                ledger.unref(member.last)
            member.last = push


def _open_debt(ledger: Ledger, term: Term, part: float) -> None:
    missing, stand_in = term.stands_for, term.push
    if missing is None or missing not in ledger.views or missing in ledger.debts:
        raise ledger.breach(
            f"invariant 4: {stand_in} cannot stand for {missing}, which is not under way or has a placeholder already"
        )
    alive = stand_in in ledger.held or ledger.is_kept(stand_in)
    if not alive and stand_in not in (ZERO, PushId(0, ledger.version + 1)):
        raise ledger.breach(f"invariant 1: push {tuple(stand_in)} is a placeholder but neither held nor kept")
    ledger.debts[missing] = Debt(stand_in, part, ledger.version + 1)
    ledger.ref(stand_in)


def _take_amend(ledger: Ledger, step: Step) -> None:
    missing = step.terms[0].push
    if missing not in ledger.held or missing not in ledger.debts or step != ledger.amend(missing):
        raise ledger.breach(f"invariant 4: the amend of {tuple(missing)} is not what ledger.amend gives")
    ledger.unref(ledger.debts.pop(missing).stand_in)
    ledger.let_go((missing,))
