"""The tests of the law are tested: each of these faults, put into the code for a while, must be found."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType

import pytest
from hypothesis import given

from ps_elastic.policies import Policy
from tests import test_decide, test_events, test_ledger, test_policies
from tests.law.cases import CASES, pipeline_of
from tests.law.mutation import mutated
from tests.law.schedule import ONE_PASS, draws, play, workers
from tests.law.walker import walk

STORIES = (test_ledger, test_decide, test_policies, test_events)
Mutant = tuple[str, str, str]  # module, what is there, what stands there instead

# What the walk and the random schedules must find alone: for a rule that nobody has told a story of.
BEHAVIOUR: list[Mutant] = [
    ("noting", "    if step <= seat.seen:\n        return", "    if step < seat.seen:\n        return"),
    ("noting", "    ledger.waiting[worker] = None\n    if ledger.own_views", "    if ledger.own_views"),
    ("noting", "        ledger.ref(push.id)\n    ledger.advance(seat)\n", "        ledger.ref(push.id)\n"),
    ("noting", "ledger.containing[push.id] = (view.own_push,)", "pass"),
    ("noting", 'if worker in ledger.waiting:\n        return "waiting"', "if False:\n        return None"),
    ("noting", "if step <= seat.seen:  # less", "if step < seat.seen:  # less"),
    ("noting", "if seat.assigned > seat.seen:  # else", "if True:  # else"),
    ("noting", "        seat.seen = seat.assigned = step\n", "        seat.seen = step\n"),
    ("noting", "seat = ledger.gone.pop(worker, None) or Seat()", "seat = Seat()"),
    ("noting", "    seat.clock = ledger.slowest\n", "    pass\n"),
    ("noting", "    ledger.waiting.pop(worker, None)\n", "    pass\n"),
    ("noting", "for kept in (seat.last, seat.newest):", "for kept in (seat.newest,):"),
    ("noting", "for kept in (seat.last, seat.newest):", "for kept in (seat.last,):"),
    ("noting", "    seat.last = seat.newest = None\n", "    pass\n"),
    ("taking", "            ledger.unref(seat.newest)\n", "            pass\n"),
    ("taking", "            seat.newest = None\n", "            pass\n"),
    ("noting", "    ledger.at_clock[seat.clock] -= 1\n    ledger.settle_slowest()", "    ledger.settle_slowest()"),
    ("noting", "ledger.at_clock[seat.clock] -= 1\n    ledger.settle_slowest()", "ledger.at_clock[seat.clock] -= 1"),
    ("noting", "    seat.seen = seat.assigned\n", "    pass\n"),
    ("noting", "ledger.travelled += answer.moved", "ledger.travelled = answer.moved"),
    ("noting", "    ledger.unmeasured.pop(answer.push, None)\n", "    pass\n"),
    ("noting", "travelled=ledger.travelled - answer.distance", "travelled=answer.distance"),
    ("taking", "            del ledger.waiting[worker]\n", "            pass\n"),
    ("noting", "    del ledger.waiting[worker]\n    job", "    job"),
    ("noting", "ledger.done, ledger.wake_at = True, None", "ledger.done = True"),
    ("noting", "    for push in tuple(ledger.debts):\n        ledger.close_debt(push)", "    pass"),
    ("taking", "_open_debt(ledger, term, term.weight / total)", "_open_debt(ledger, term, term.weight)"),
    ("taking", "            if previous is not None:", "            if previous is None:"),
    ("taking", "    ledger.ref(stand_in)\n", "    pass\n"),
    ("taking", "    ledger.unref(ledger.debts.pop(missing).stand_in)\n", "    ledger.debts.pop(missing)\n"),
    ("ledger", "        self.unref(self.debts.pop(push).stand_in)\n", "        self.debts.pop(push)\n"),
    ("ledger", "            self.ref(own_push)\n", "            pass\n"),
    ("ledger", "        if own_push is not None:\n            self.unref(own_push)", "        pass"),
    ("ledger", "        if push in self.debts:\n            self.close_debt(push)", "        pass"),
    ("ledger", "        if push not in self._refs:\n", "        if True:\n"),
    ("ledger", "            if push not in self.held:\n", "            if True:\n"),
    ("ledger", "            del self._refs[push]\n", "            pass\n"),
    ("decide", "    if start_job(ledger, push.id.worker):\n", "    if False:\n"),
    ("decide", "        yield _Again((push.id.worker,))\n", "        yield Release((push.id.worker,))\n"),
    ("decide", '        return None, (Drop(push.id, "done"), Release((push.id.worker,)))', "        return None, ()"),
    ("decide", "        actions.append(Release(tuple(ledger.waiting)))", "        pass"),
    ("decide", "    ledger.wake_at = None\n", "    pass\n"),
    ("decide", "ledger.now < ledger.wake_at", "False"),
    ("decide", "        return None, (_Again((event.worker,)),)", "        return None, ()"),
    ("policies.synchronous", "        if ledger.held and not ledger.computing:\n", "        if False:\n"),
    ("policies.first_k", "            yield Release((push.id.worker,))", "            pass"),
    ("policies.first_k", "min(self.k, len(ledger.workers))", "self.k"),
    (
        "policies.stale_synchronous",
        "        yield from self._release(ledger)\n\n    def _release",
        "        return ()\n\n    def _release",
    ),
    (
        "policies.stale_synchronous",
        "            yield from self._release(ledger)\n",
        "            yield Release((worker,))\n",
    ),
]

# What only a story knows: numbers that a rule promises, and what the ledger refuses.
PROMISES: list[Mutant] = [
    ("taking", "seat.assigned - seat.seen < ledger.jobs", "seat.assigned - seat.seen <= ledger.jobs"),
    ("taking", "elif not 0 < seat.assigned", "elif not 0 <= seat.assigned"),
    ("taking", "if not 0 < step.share <= 1:", "if not 0 < step.share:"),
    ("taking", " or step != ledger.amend(missing)", ""),
    ("taking", "elif term.push in used or not ledger.is_kept(term.push):", "elif not ledger.is_kept(term.push):"),
    ("taking", "missing not in ledger.views or missing in ledger.debts", "missing not in ledger.views"),
    ("noting", "if push.base != (version := ledger.views[push.id].version):", "if False:"),
    ("taking", "    if ledger.owed:\n", "    if False:\n"),
    ("taking", "stuck = len(ledger.waiting) == len(ledger.workers) and", "stuck = False and"),
    ("ledger", "return share * (self.applied.coast", "return (self.applied.coast"),
    ("decide", "    check_stalled(ledger)\n", "    pass\n"),
    ("decide", "    ledger.acts.clear()\n", "    pass\n"),
    ("decide", "        ledger.closed.clear()\n", "        pass\n"),
    ("decide", "            check_answered(ledger)\n", "            pass\n"),
    ("decide", "    if now > ledger.now:\n        ledger.now = now", "    ledger.now = now"),
    ("policies.synchronous", "        if ledger.computing:\n            return\n", ""),
    ("policies.first_k", 'yield Drop(push.id, "late")', "pass"),
    ("policies.asynchronous", "share=1 / len(ledger.workers)", "share=1"),
    ("policies.stale_synchronous", "share=1 / len(ledger.workers)", "share=1"),
    ("policies.stale_synchronous", "elif ledger.clock(worker) - ledger.slowest <= self.bound:", "else:"),
    (
        "policies.stale_synchronous",
        "if ledger.clock(w) - ledger.slowest <= self.bound",
        "if ledger.clock(w) <= self.bound",
    ),
    ("policies.stale_synchronous", "elif ledger.clock(worker) - ledger", "elif ledger.clock(worker) + ledger"),
    ("decide", "        return None, (Release((event.worker,)),)\n", "        pass\n"),
    ("decide", '        return "done", ()\n', "        pass\n"),
    ("taking", "        total = 1.0\n", "        pass\n"),
    ("taking", '        raise PolicyError("an empty Step")', "        pass"),
    ("policies.first_k", "push.base < ledger.version", "push.base < ledger.version - 1"),
    ("policies.first_k", "len(ledger.held) >= min(", "len(ledger.held) > min("),
    ("events", "for push in sorted(pushes)", "for push in pushes"),
]


# What the walk and the schedules of workers that run ahead must find.
RUN_AHEAD: list[Mutant] = [
    ("runahead", "            del self.given[older]\n", "            pass\n"),
    ("runahead", "push.step <= reply and push not in missing", "push.step <= reply"),
    ("runahead", "push.step <= reply and push not in missing", "push not in missing"),
    ("runahead", "            del self.flying[push]\n", "            pass\n"),
    ("runahead", "            yield push\n", "            yield from ()\n"),
    ("noting", "            ledger.ref(contained)\n", "            pass\n"),
    ("noting", "    course.flying[push.id] = None\n", "    pass\n"),
    ("noting", "if step - course.told <= ledger.pipeline:", "if step - course.told < ledger.pipeline:"),
    ("noting", "if step - course.told <= ledger.pipeline:", "if True:"),
    ("ledger", "        course.told = seat.seen\n", "        course.told = seat.assigned\n"),
    ("ledger", "[p for p in course.flying if p in self.held]", "[p for p in course.flying]"),
    ("ledger", "[p for p in course.flying if p in self.held]", "[]"),
    ("ledger", "if seat.assigned == seat.seen:\n            for", "if True:\n            for"),
    ("noting", "seat.seen = seat.assigned = course.told + ledger.pipeline + 1", "pass"),
    ("noting", "    for unneeded in course.flying:\n        ledger.unref(unneeded)\n", ""),
    ("taking", " and not ledger.views", ""),
    ("noting", "        ledger.send_on(worker, seat, course.given[reply])\n", "        pass\n"),
    ("noting", "course.given[reply])", "course.given[course.told])"),
]


def stories() -> Iterator[tuple[str, Callable[[], object]]]:
    for module in STORIES:
        for name, value in vars(module).items():
            if isinstance(value, FunctionType) and name.startswith("test_"):
                yield name, value


def walks() -> Iterator[tuple[str, Callable[[], object]]]:
    for case, make in CASES.items():
        yield f"walk of {case}", partial(walk, make, workers=2, pushes=2)
        yield f"schedules of {case}", partial(schedules, make)
    for case, make in CASES.items():
        yield f"walk of {case} with a fault", partial(walk, make, workers=2, pushes=2, faults=1)


def walks_ahead() -> Iterator[tuple[str, Callable[[], object]]]:
    cases = {case: make for case, make in CASES.items() if pipeline_of(make)}
    for case, make in cases.items():
        yield f"walk of {case}", partial(walk, make, workers=1, pushes=4)
    for case, make in cases.items():
        yield f"schedules of {case}", partial(schedules, make)


def schedules(make: Callable[[], Policy]) -> None:
    @ONE_PASS
    @given(workers, draws)
    def check(workers: int, draws: list[int]) -> None:
        play(make, workers, draws)

    check()


def finder(checks: Iterator[tuple[str, Callable[[], object]]]) -> str | None:
    """The name of the first check that fails."""
    for name, check in checks:
        try:
            check()
        except (Exception, pytest.fail.Exception):
            return name
    return None


def found(mutant: Mutant, checks: Iterator[tuple[str, Callable[[], object]]]) -> bool:
    module, old, new = mutant
    with mutated(importlib.import_module(f"ps_elastic.{module}"), old, new):
        return finder(checks) is not None


@pytest.mark.parametrize("mutant", [*BEHAVIOUR, *RUN_AHEAD], ids=str)
def test_a_mutant_is_of_the_code_as_it_is(mutant: Mutant) -> None:
    module, old, new = mutant
    with mutated(importlib.import_module(f"ps_elastic.{module}"), old, new):
        pass


@pytest.mark.parametrize("mutant", PROMISES, ids=str)
def test_a_story_finds(mutant: Mutant) -> None:
    assert found(mutant, stories())


@pytest.mark.parametrize("mutant", BEHAVIOUR[::40], ids=str)
def test_walks_and_schedules_find(mutant: Mutant) -> None:
    assert found(mutant, walks())


@pytest.mark.parametrize("mutant", RUN_AHEAD, ids=str)
def test_walks_and_schedules_of_workers_that_run_ahead_find(mutant: Mutant) -> None:
    assert found(mutant, walks_ahead())


@pytest.mark.slow
@pytest.mark.parametrize("mutant", BEHAVIOUR[1 :: 1 if "PS_ELASTIC_EVERY_MUTANT" in os.environ else 3], ids=str)
def test_walks_and_schedules_find_more(mutant: Mutant) -> None:
    assert found(mutant, walks())


def test_nothing_is_found_in_the_code_as_it_is() -> None:
    assert finder(stories()) is None
