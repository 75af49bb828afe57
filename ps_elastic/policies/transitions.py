"""How the ledger changes: by each event before the rule is asked, and by each action as the rule yields it.

For decide.py alone, but for the answers, which go straight in. A `note_` function takes an event in, or says why it is
ignored; a `take_` function lets an action take effect, or raises PolicyError where it breaks a law.
"""

from __future__ import annotations

import math
from heapq import heappush
from operator import itemgetter

from ps_elastic.errors import PolicyError, Stalled, WireError
from ps_elastic.policies.events import ZERO, Applied, Drop, Measure, Measured, Push, PushId, Release, Step, Term, Wake
from ps_elastic.policies.ledger import Debt, Ledger, Member, PipelineState, View

_weight = itemgetter(1)  # of a term


def note_push(ledger: Ledger, push: Push) -> str | None:
    """Take the push in; or say why it is ignored."""
    worker, step = id = push.id
    member = ledger.workers.get(worker)
    if member is None:
        return "departed"
    if step <= member.seen:
        return "duplicate"
    if id not in ledger.views:
        raise WireError(f"push {tuple(id)} of worker {worker} was never assigned; expected step {member.seen + 1}")
    if ledger.pipeline:
        _note_ahead(ledger, push, member)
    else:
        if push.base != (version := ledger.views[id].version):
            raise WireError(f"push {tuple(id)} says base {push.base}, but its view was version {version}")
        for lost in range(member.seen + 1, step):
            ledger.forget(PushId(worker, lost))
        member.seen = step
        own_push = ledger.views.pop(id).own_push
        ledger.unmeasured.pop(id, None)
        if own_push is not None:
            ledger.containing[id] = (own_push,)
        if ledger.own_views:
            member.newest = id
            ledger.ref(id)
    ledger.held[id] = push
    ledger.waiting[worker] = None
    at, left = ledger.at_clock, member.clock
    member.clock = clock = left + 1
    at[clock] = at[clock] + 1 if clock in at else 1
    at[left] -= 1
    if not at[left]:
        ledger.settle_slowest()
    return None


def note_asked(ledger: Ledger, worker: int, step: int) -> str | None:
    """Return "" if the rule must be asked, "again" if the last reply must be sent again, else why it is ignored."""
    member = ledger.workers.get(worker)
    if member is None:
        return "departed"
    if worker in ledger.waiting:
        return "waiting"
    if step > (member.seen if member.pipeline_state.given else member.assigned):  # who runs ahead loses nothing
        raise WireError(f"worker {worker} asks after step {step}; it was assigned {member.assigned}")
    if member.assigned > member.seen:  # else it has just joined
        if step <= member.seen:  # less than `seen` from one that came back, and does not know its earlier steps
            return "again"
        for lost in range(member.seen + 1, member.assigned + 1):
            ledger.forget(PushId(worker, lost))
        member.seen = member.assigned = step
    ledger.waiting[worker] = None
    return ""


def note_joined(ledger: Ledger, worker: int, step: int) -> str | None:
    if worker in ledger.workers:
        return "member"
    member = ledger.gone.pop(worker, None) or Member()
    member.clock = ledger.slowest
    member.seen = member.assigned = max(member.assigned, step)
    member.pipeline_state = PipelineState(member.seen)
    ledger.workers[worker] = member
    ledger.at_clock[member.clock] = ledger.at_clock.get(member.clock, 0) + 1
    return None


def note_left(ledger: Ledger, worker: int) -> str | None:
    member = ledger.workers.pop(worker, None)
    if member is None:
        return "departed"
    ledger.gone[worker] = member
    ledger.waiting.pop(worker, None)
    for lost in range(member.seen + 1, member.assigned + 1):
        ledger.forget(PushId(worker, lost))
    member.seen = member.assigned
    if ledger.pipeline:
        _end_pipeline(ledger, member)
    for kept in (member.last, member.newest):
        if kept is not None:
            ledger.unref(kept)
    member.last = member.newest = None
    ledger.at_clock[member.clock] -= 1
    ledger.settle_slowest()
    return None


def note_start(ledger: Ledger, start: Applied) -> None:
    ledger.started, ledger.applied = True, start
    ledger.waiting.update(dict.fromkeys(ledger.workers))
    take_release(ledger, Release(tuple(ledger.workers)))


def note_applied(ledger: Ledger, answer: Applied) -> None:
    """The answer to a Step; the time stays that of the event answered: the log has no other."""
    if ledger.log is not None:
        ledger.acts.append(answer)
    if type(ledger.owed) is not Step:
        raise PolicyError(f"version {answer.version} was applied, but no Step awaits it")
    if answer.version != ledger.version + 1:
        raise PolicyError(f"version {answer.version} was applied after version {ledger.version}")
    ledger.owed = None
    ledger.version, ledger.applied = answer.version, answer
    ledger.travelled += answer.moved


def note_measured(ledger: Ledger, answer: Measured) -> None:
    """One of the answers to a Measure."""
    if ledger.log is not None:
        ledger.acts.append(answer)
    if not isinstance(ledger.owed, list) or answer.push not in ledger.owed:
        raise PolicyError(f"view {tuple(answer.push)} was measured, but no Measure asked for it")
    ledger.owed.remove(answer.push)
    view = ledger.views[answer.push]._replace(travelled=ledger.travelled - answer.distance)
    ledger.views[answer.push] = view
    ledger.unmeasured.pop(answer.push, None)
    heappush(ledger.measured, (view.travelled, answer.push))


def start_job(ledger: Ledger, worker: int) -> bool:
    """Let a worker that waits begin the job queued for it, if there is one."""
    member = ledger.workers[worker]
    if member.assigned == member.seen:
        return False
    del ledger.waiting[worker]
    job = PushId(worker, member.seen + 1)
    ledger.views[job] = ledger.views[job]._replace(sent_at=ledger.now)
    return True


def finish(ledger: Ledger) -> tuple[PushId, ...]:
    """Enter the end of the run; return the pushes to be dropped."""
    ledger.done, ledger.wake_at = True, None
    for push in tuple(ledger.debts):
        ledger.close_debt(push)
    return tuple(ledger.held)


def _note_ahead(ledger: Ledger, push: Push, member: Member) -> None:
    """A push of a worker that runs ahead: its header says which reply it was computed on."""
    pipeline_state, (worker, step) = member.pipeline_state, push.id
    reply = pipeline_state.named(push, ledger.pipeline)
    ledger.take_view(push.id)
    for unneeded in pipeline_state.leave_behind(reply):
        ledger.unref(unneeded)
    if pipeline_state.flying:
        ledger.containing[push.id] = tuple(pipeline_state.flying)
        for contained in pipeline_state.flying:
            ledger.ref(contained)
    pipeline_state.flying[push.id] = None
    ledger.ref(push.id)
    member.seen = step
    if step - pipeline_state.told <= ledger.pipeline:
        ledger.send_on(worker, member, pipeline_state.given[reply])


def _end_pipeline(ledger: Ledger, member: Member) -> None:
    """The worker is gone; what it has sent may still come, and is not taken in."""
    pipeline_state = member.pipeline_state
    if pipeline_state.given:
        member.seen = member.assigned = pipeline_state.told + ledger.pipeline + 1
    for unneeded in pipeline_state.flying:
        ledger.unref(unneeded)
    member.pipeline_state = PipelineState()


def take_step(ledger: Ledger, step: Step) -> None:
    terms, share, combine, apply = step
    if not terms:
        raise PolicyError("an empty Step")
    if not 0 < share <= 1:
        raise PolicyError(f"share {share} of a Step with {tuple(terms[0].push)}: expected 0 < share <= 1")
    ledger.owed = step
    if apply == "amend":
        _take_amend(ledger, step)
        return
    total = sum(map(_weight, terms))
    if not (math.isfinite(total) and (total > 0 or combine == "sum")):
        raise PolicyError(f"the weights of a Step sum to {total}")
    if combine == "sum":
        total = 1.0
    held, used = ledger.held, dict[PushId, None]()
    for term in terms:
        push, weight, missing = term
        if missing is not None:
            _open_debt(ledger, term, weight / total)
        elif push in held and push not in used:
            if push in ledger.debts:
                raise PolicyError(f"law 4: push {tuple(push)} is owed; repay it with ledger.amend")
            used[push] = None
        elif push in used or not ledger.is_kept(push):
            raise PolicyError(f"law 1: push {tuple(push)} is used but neither held nor kept")
    if ledger.keeps_last:
        _keep_last(ledger, used)
    ledger.let_go(used)


def take_drop(ledger: Ledger, drop: Drop) -> None:
    if drop.push not in ledger.held:
        raise PolicyError(f"law 1: push {tuple(drop.push)} is dropped ({drop.reason}) but not held")
    if drop.push in ledger.debts:
        ledger.close_debt(drop.push)
    ledger.let_go((drop.push,))


def take_release(ledger: Ledger, release: Release) -> None:
    """Let the next push of each worker be under way, on the model as it is, plus c * own * its last push."""
    workers, own = release
    if own and not math.isfinite(own):
        raise PolicyError(f"a Release with own = {own}")
    for worker in workers:
        member = ledger.workers.get(worker)
        if member is None:
            raise PolicyError(f"law 2: worker {worker} is released but not a member")
        if worker in ledger.waiting:
            del ledger.waiting[worker]
        elif not 0 < member.assigned - member.seen < ledger.jobs:
            raise PolicyError(
                f"law 2: worker {worker} is released but does not wait (its step {member.assigned} is under way, "
                "or it has not asked yet)"
            )
        if ledger.pipeline:
            ledger.answer_ahead(worker, member, own)
        else:
            own_push = ledger.keep_own(worker, member) if own else None
            member.assigned += 1
            member.due = push = PushId(worker, member.assigned)
            ledger.views[push] = View(ledger.version, own, own_push, ledger.travelled, ledger.now)
            ledger.unmeasured[push] = ledger.travelled
        if member.newest is not None:
            ledger.unref(member.newest)
            member.newest = None


def take_wake(ledger: Ledger, wake: Wake) -> None:
    if not math.isfinite(wake.at):
        raise PolicyError(f"a Wake at {wake.at}")
    ledger.wake_at = wake.at


def take_measure(ledger: Ledger, measure: Measure) -> None:
    for push in measure.pushes:
        if push not in ledger.views:
            raise PolicyError(f"view {tuple(push)} is to be measured but not under way")
    ledger.owed = list(measure.pushes)


def check_stalled(ledger: Ledger) -> None:
    stuck = len(ledger.waiting) == len(ledger.workers) and ledger.wake_at is None and not ledger.views
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
    ledger.let_go((missing,))
