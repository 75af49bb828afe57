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
from tests.law.cases import CASES, pipeline_of
from tests.law.mutation import mutated
from tests.law.schedule import ONE_PASS, draws, play, workers
from tests.law.walker import walk
from tests.policies import test_base, test_decide, test_events, test_ledger

STORIES = (test_ledger, test_decide, test_base, test_events)
Mutant = tuple[str, str, str]  # module, what is there, what stands there instead

# What the walk and the random schedules must find alone: for a rule that nobody has told a story of.
BEHAVIOUR: list[Mutant] = [
    ("transitions", "    if step <= member.seen:\n        return", "    if step < member.seen:\n        return"),
    ("transitions", "    ledger.waiting[worker] = None\n    at, left", "    at, left"),
    ("transitions", "    member.clock = clock = left + 1\n", "    clock = left\n"),
    ("transitions", "        if left == ledger.slowest:\n            ledger.slowest = clock\n", ""),
    ("transitions", "ledger.containing[id] = (view.own_push,)", "pass"),
    ("transitions", 'if worker in ledger.waiting:\n        return "waiting"', "if False:\n        return None"),
    ("transitions", "if step <= member.seen:  # less", "if step < member.seen:  # less"),
    ("transitions", "if member.assigned > member.seen:  # else", "if True:  # else"),
    ("transitions", "        member.seen = member.assigned = step\n", "        member.seen = step\n"),
    ("transitions", "member = ledger.gone.pop(worker, None) or Member()", "member = Member()"),
    ("transitions", "    member.clock = ledger.slowest\n", "    pass\n"),
    ("transitions", "    ledger.waiting.pop(worker, None)\n", "    pass\n"),
    ("transitions", "for kept in (member.last, member.newest):", "for kept in (member.newest,):"),
    ("transitions", "for kept in (member.last, member.newest):", "for kept in (member.last,):"),
    ("transitions", "    member.last = member.newest = None\n", "    pass\n"),
    ("actions", "            ledger.unref(member.newest)\n", "            pass\n"),
    ("actions", "            member.newest = None\n", "            pass\n"),
    (
        "transitions",
        "    at[member.clock] -= 1\n    while",
        "    while",
    ),
    (
        "transitions",
        "while ledger.workers and not at.get(ledger.slowest):",
        "while False:",
    ),
    ("transitions", "ledger.travelled += answer.moved", "ledger.travelled = answer.moved"),
    ("transitions", "        ledger.unmeasured.pop(answer.push, None)\n", "        pass\n"),
    ("transitions", "travelled=ledger.travelled - answer.distance", "travelled=answer.distance"),
    ("actions", "            del waiting[worker]\n", "            pass\n"),
    ("transitions", "    del ledger.waiting[worker]\n    member", "    member"),
    ("transitions", "ledger.done, ledger.wake_at = True, None", "ledger.done = True"),
    ("transitions", "    for push in tuple(ledger.debts):\n        ledger.close_debt(push)", "    pass"),
    ("actions", "_open_debt(ledger, term, weight / total)", "_open_debt(ledger, term, weight)"),
    ("actions", "            if member.last is not None:", "            if member.last is None:"),
    ("actions", "    ledger.ref(stand_in)\n", "    pass\n"),
    ("actions", "    ledger.unref(ledger.debts.pop(missing).stand_in)\n", "    ledger.debts.pop(missing)\n"),
    ("ledger", "        self.unref(self.debts.pop(push).stand_in)\n", "        self.debts.pop(push)\n"),
    ("ledger", "        self.ref(own_push)\n", "        pass\n"),
    ("ledger", "        if own_push is not None:\n            self.unref(own_push)", "        pass"),
    ("ledger", "        if push in self.debts:\n            self.close_debt(push)", "        pass"),
    ("ledger", "            if push not in self._refs:\n", "            if True:\n"),
    ("ledger", "            if push not in self.held:\n", "            if True:\n"),
    ("ledger", "            del self._refs[push]\n", "            pass\n"),
    ("decide", "    if start_job(ledger, push.id.worker):\n", "    if False:\n"),
    ("decide", "        yield _Again((push.id.worker,))\n", "        yield Release((push.id.worker,))\n"),
    ("decide", '            actions = Drop(event.id, "done"), Release((event.id.worker,))', "            actions = ()"),
    ("decide", "        actions.append(Release(tuple(ledger.waiting)))", "        pass"),
    ("decide", "    ledger.wake_at = None\n", "    pass\n"),
    ("decide", "ledger.now < ledger.wake_at", "False"),
    ("decide", "        return None, (_Again((event.worker,)),)", "        return None, ()"),
    ("rules.synchronous", "        if ledger.held and not ledger.computing:\n", "        if False:\n"),
    ("rules.first_k", "            yield Release((push.id.worker,))", "            pass"),
    ("rules.first_k", "min(self.k, len(ledger.workers))", "self.k"),
    ("base", "        return self.try_again(ledger)\n", "        return ()\n"),
    (
        "rules.stale_synchronous",
        "            yield from self.try_again(ledger)\n",
        "            yield Release((worker,))\n",
    ),
]

# What only a story knows: numbers that a rule promises, and what the ledger refuses.
PROMISES: list[Mutant] = [
    ("actions", "member.assigned - member.seen < ledger.jobs", "member.assigned - member.seen <= ledger.jobs"),
    ("actions", "elif not 0 < member.assigned", "elif not 0 <= member.assigned"),
    ("actions", "if not 0 < share <= 1:", "if not 0 < share:"),
    ("actions", " or step != ledger.amend(missing)", ""),
    ("actions", "elif push in used or not ledger.is_kept(push):", "elif not ledger.is_kept(push):"),
    ("actions", "missing not in ledger.views or missing in ledger.debts", "missing not in ledger.views"),
    ("transitions", "if push.base != view.version:", "if False:"),
    ("actions", "stuck = len(ledger.waiting) == len(ledger.workers) and", "stuck = False and"),
    ("ledger", "return share * (self.applied.coast", "return (self.applied.coast"),
    ("decide", "            check_stalled(ledger)\n", "            pass\n"),
    ("decide", "    ledger.acts.clear()\n", "    pass\n"),
    ("decide", "        ledger.closed.clear()\n", "        pass\n"),
    ("decide", "        if ledger.owed:\n            raise", "        if False:\n            raise"),
    ("actions", "    if ledger.owed:\n        raise ledger.unanswered()\n    ledger.acts.append(step)", ""),
    ("actions", "    if ledger.owed:\n        raise ledger.unanswered()\n    ledger.acts.append(release)", ""),
    ("actions", "    if ledger.owed:\n        raise ledger.unanswered()\n    ledger.acts.append(action)", ""),
    ("decide", "    if now > ledger.now:\n        ledger.now = now", "    ledger.now = now"),
    ("rules.synchronous", "        if ledger.computing:\n            return ()\n", ""),
    ("rules.first_k", 'yield Drop(push.id, "late")', "pass"),
    ("rules.asynchronous", "1 / len(ledger.workers)", "1"),
    ("rules.stale_synchronous", "share=1 / len(ledger.workers)", "share=1"),
    ("rules.stale_synchronous", "elif ledger.clock(worker) - ledger.slowest <= self.bound:", "else:"),
    (
        "rules.stale_synchronous",
        "if ledger.clock(w) - ledger.slowest <= self.bound",
        "if ledger.clock(w) <= self.bound",
    ),
    ("rules.stale_synchronous", "elif ledger.clock(worker) - ledger", "elif ledger.clock(worker) + ledger"),
    ("decide", "        return None, (Release((event.worker,)),)\n", "        pass\n"),
    ("decide", '        return "done", ()\n', "        pass\n"),
    ("actions", "        total = 1.0\n", "        pass\n"),
    ("actions", '        raise ledger.breach("an empty Step")', "        pass"),
    ("rules.first_k", "push.base < ledger.version", "push.base < ledger.version - 1"),
    ("rules.first_k", "len(ledger.held) >= min(", "len(ledger.held) > min("),
    ("events", "map(Term, sorted(pushes))", "map(Term, pushes)"),
]


# What the walk and the schedules of workers that run ahead must find.
RUN_AHEAD: list[Mutant] = [
    ("ledger", "            del self.given[older]\n", "            pass\n"),
    ("ledger", "push.step <= reply and push not in missing", "push.step <= reply"),
    ("ledger", "push.step <= reply and push not in missing", "push not in missing"),
    ("ledger", "            del self.flying[push]\n", "            pass\n"),
    ("ledger", "            yield push\n", "            yield from ()\n"),
    ("transitions", "            ledger.ref(contained)\n", "            pass\n"),
    ("transitions", "    pipeline_state.flying[push.id] = None\n", "    pass\n"),
    (
        "transitions",
        "if step - pipeline_state.told <= ledger.pipeline:",
        "if step - pipeline_state.told < ledger.pipeline:",
    ),
    ("transitions", "if step - pipeline_state.told <= ledger.pipeline:", "if True:"),
    ("ledger", "        pipeline_state.told = member.seen\n", "        pipeline_state.told = member.assigned\n"),
    ("ledger", "[p for p in pipeline_state.flying if p in self.held]", "[p for p in pipeline_state.flying]"),
    ("ledger", "[p for p in pipeline_state.flying if p in self.held]", "[]"),
    ("ledger", "if member.assigned == member.seen:\n            for", "if True:\n            for"),
    ("transitions", "member.seen = member.assigned = pipeline_state.told + ledger.pipeline + 1", "pass"),
    ("transitions", "    for unneeded in pipeline_state.flying:\n        ledger.unref(unneeded)\n", ""),
    ("decide", "        if not ledger.views:\n", "        if True:\n"),
    ("transitions", "        ledger.send_on(worker, member, pipeline_state.given[reply])\n", "        pass\n"),
    ("transitions", "pipeline_state.given[reply])", "pipeline_state.given[pipeline_state.told])"),
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
    with mutated(importlib.import_module(f"ps_elastic.policies.{module}"), old, new):
        return finder(checks) is not None


@pytest.mark.parametrize("mutant", [*BEHAVIOUR, *RUN_AHEAD], ids=str)
def test_a_mutant_is_of_the_code_as_it_is(mutant: Mutant) -> None:
    module, old, new = mutant
    with mutated(importlib.import_module(f"ps_elastic.policies.{module}"), old, new):
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


@pytest.mark.timeout(1200)  # a mutant that few schedules show is looked for long, on a busy machine for minutes
@pytest.mark.slow
@pytest.mark.parametrize("mutant", BEHAVIOUR[1 :: 1 if "PS_ELASTIC_EVERY_MUTANT" in os.environ else 3], ids=str)
def test_walks_and_schedules_find_more(mutant: Mutant) -> None:
    assert found(mutant, walks())


def test_nothing_is_found_in_the_code_as_it_is() -> None:
    assert finder(stories()) is None
