"""How the ledger changes by each event before the policy is asked.

For decide.py alone, but for the answers, which go straight in. A `note_` takes an event in, or says why it is ignored.
"""

from __future__ import annotations

from heapq import heappush

from ps_elastic.errors import PolicyError, WireError
from ps_elastic.policies.actions import take_release
from ps_elastic.policies.events import Applied, Measured, Push, PushId, Release, Step
from ps_elastic.policies.ledger import Ledger, Member, PipelineState


def note_push(ledger: Ledger, push: Push) -> str | None:
    """Take the push in; or say why it is ignored."""
    worker, step = id = push.id
    if worker not in ledger.workers:
        return "departed"
    member, views = ledger.workers[worker], ledger.views
    if step <= member.seen:
        return "duplicate"
    if id not in views:
        raise WireError(f"push {tuple(id)} of worker {worker} was never assigned; expected step {member.seen + 1}")
    if ledger.pipeline:
        _note_ahead(ledger, push, member)
    else:
        view = views[id]
        if push.base != view.version:
            raise WireError(f"push {tuple(id)} says base {push.base}, but its model was version {view.version}")
        while member.seen < step - 1:
            member.seen += 1
            ledger.forget(PushId(worker, member.seen))
        member.seen = step
        del views[id]
        if ledger.unmeasured is not None:
            ledger.unmeasured.pop(id, None)
        if view.own_push is not None:
            ledger.containing[id] = (view.own_push,)
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
        del at[left]
        if left == ledger.slowest:
            ledger.slowest = clock
    return None


def note_asked(ledger: Ledger, worker: int, step: int) -> str | None:
    """Return "" if the policy must be asked, "again" if the last reply must be sent again, else why it is ignored."""
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
    if ledger.pipeline:
        _end_pipeline(ledger, member)
    for kept in (member.last, member.newest):
        if kept is not None:
            ledger.unref(kept)
    member.last = member.newest = None
    at = ledger.at_clock
    at[member.clock] -= 1
    while ledger.workers and not at.get(ledger.slowest):
        at.pop(ledger.slowest, None)
        ledger.slowest += 1
    return None


def note_start(ledger: Ledger, start: Applied) -> None:
    ledger.started, ledger.applied = True, start
    ledger.waiting.update(dict.fromkeys(ledger.workers))
    take_release(ledger, Release(tuple(ledger.workers)))
    ledger.acts.clear()  # nobody ordered it


def note_applied(ledger: Ledger, answer: Applied) -> None:
    """The answer to a Step; the time stays that of the event answered: the log has no other."""
    ledger.acts.append(answer)  # its text is made when all is done: nobody waits for that
    if type(ledger.owed) is not Step:
        raise PolicyError(f"version {answer.version} was applied, but no Step awaits it")
    if answer.version != ledger.version + 1:
        raise PolicyError(f"version {answer.version} was applied after version {ledger.version}")
    ledger.owed = None
    ledger.version, ledger.applied = answer.version, answer
    ledger.travelled += answer.moved


def note_measured(ledger: Ledger, answer: Measured) -> None:
    """One of the answers to a Measure."""
    ledger.acts.append(answer)
    if not isinstance(ledger.owed, list) or answer.push not in ledger.owed:
        raise PolicyError(f"the copy of push {tuple(answer.push)} was measured, but no Measure asked for it")
    ledger.owed.remove(answer.push)
    view = ledger.views[answer.push]._replace(travelled=ledger.travelled - answer.distance)
    ledger.views[answer.push] = view
    if ledger.unmeasured is not None:
        ledger.unmeasured.pop(answer.push, None)
    heappush(ledger.measured, (view.travelled, answer.push))


def start_job(ledger: Ledger, worker: int) -> bool:
    """Let a worker that waits begin the job queued for it, if there is one."""
    member = ledger.workers[worker]
    if member.assigned == member.seen:
        return False
    del ledger.waiting[worker]
    member.due = job = PushId(worker, member.seen + 1)
    ledger.views[job] = ledger.views[job]._replace(sent_at=ledger.now)
    return True


def finish(ledger: Ledger) -> tuple[PushId, ...]:
    """Enter the end of the run; return the pushes to be discarded."""
    ledger.done, ledger.wake_at = True, None
    for push in tuple(ledger.debts):
        ledger.close_debt(push)
    return tuple(ledger.held)


def _note_ahead(ledger: Ledger, push: Push, member: Member) -> None:
    """A push of a worker that runs ahead: its metadata says which reply it was computed on."""
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
