from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest

from ps_elastic.config.faults import (
    Crash,
    Delay,
    Duplicate,
    Faults,
    Join,
    Leave,
    LostPush,
    LostReply,
    Pause,
    Plan,
    Slow,
)
from ps_elastic.config.load import check, load
from ps_elastic.config.values import make_section
from ps_elastic.errors import ConfigError


def plan(seed: int = 0, **entries: Any) -> Plan:
    return Plan(Faults(**{kind: tuple(entry) for kind, entry in entries.items()}), seed)


def test_nothing_goes_wrong_unless_it_is_said() -> None:
    none = plan()
    assert not none.faults
    assert (none.factor(1, 1, 0.0), none.end(1, 2.0, 3.0), none.delay("push", 1, 1, 0.0)) == (1, 5.0, 0)
    assert not none.happens("lost_push", 1, 1, 0.0)
    assert none.happenings(4) == []


def test_a_slow_worker_takes_the_product_of_all_factors() -> None:
    slow = plan(slow=[Slow(workers=2, factor=3.0), Slow(workers=(2, 3), factor=2.0, steps=(5,))])
    assert [slow.factor(worker, 5, 0.0) for worker in (1, 2, 3)] == [1, 6.0, 2.0]
    assert slow.factor(2, 4, 0.0) == 3.0


def test_a_fault_happens_in_its_window_alone() -> None:
    lost = plan(lost_push=[LostPush(from_s=2.0, until_s=4.0)])
    assert [lost.happens("lost_push", 1, 1, now) for now in (1.9, 2.0, 3.9, 4.0)] == [False, True, True, False]


def test_a_fault_happens_at_its_steps_alone() -> None:
    lost = plan(lost_reply=[LostReply(steps=(0, 3))])
    assert [lost.happens("lost_reply", 1, step, 0.0) for step in (0, 1, 3)] == [True, False, True]
    assert not lost.happens("lost_push", 1, 3, 0.0)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_chance_is_met_and_the_seed_decides(seed: int) -> None:
    def drawn(seed: int) -> list[bool]:
        lost = plan(seed, lost_push=[LostPush(chance=0.2)])
        return [lost.happens("lost_push", 1, step, 0.0) for step in range(20_000)]

    assert fmean(drawn(seed)) == pytest.approx(0.2, abs=0.02)
    assert drawn(seed) == drawn(seed)
    assert drawn(seed) != drawn(seed + 1)


def test_what_happens_to_a_worker_does_not_depend_on_the_others() -> None:
    alone, both = (plan(duplicate=[Duplicate(chance=0.5)]) for _ in range(2))
    expected = [alone.happens("duplicate", 2, step, 0.0) for step in range(50)]
    found = []
    for step in range(50):
        both.happens("duplicate", 1, step, 0.0)
        found.append(both.happens("duplicate", 2, step, 0.0))
    assert found == expected
    assert True in expected and False in expected


def test_a_delay_is_of_pushes_or_of_replies_and_delays_add() -> None:
    delayed = plan(delay=[Delay(delay_s=1.0), Delay(delay_s=2.0), Delay(delay_s=4.0, of="reply")])
    assert (delayed.delay("push", 1, 1, 0.0), delayed.delay("reply", 1, 1, 0.0)) == (3.0, 4.0)


@pytest.mark.parametrize(
    ("begins", "duration", "ends"),
    [
        (0.0, 1.0, 1.0),  # over before the pause
        (0.0, 3.0, 7.0),  # the pause from 2 to 6 lies in it
        (3.0, 1.0, 7.0),  # begins in the pause
        (6.0, 1.0, 7.0),  # begins at its end
        (1.0, 6.0, 12.0),  # runs into the second one, from 10 to 11
    ],
)
def test_a_pause_puts_off_the_end(begins: float, duration: float, ends: float) -> None:
    paused = plan(pause=[Pause(workers=1, at_s=10.0, for_s=1.0), Pause(workers=1, at_s=2.0, for_s=4.0)])
    assert paused.end(1, begins, duration) == ends
    assert paused.end(2, begins, duration) == begins + duration


def test_who_comes_and_goes_is_told_in_the_order_of_time() -> None:
    told = plan(crash=[Crash(workers=(2, 1), at_s=3.0, noticed_s=2.0)], join=[Join(5, 1.0)], leave=[Leave("all", 4.0)])
    assert [tuple(happening) for happening in told.happenings(5)] == [
        (1.0, "join", 5),
        (3.0, "crash", 2),
        (3.0, "crash", 1),
        *[(4.0, "leave", worker) for worker in range(1, 6)],
        (5.0, "notice", 2),
        (5.0, "notice", 1),
    ]


def test_one_entry_may_stand_without_a_list() -> None:
    one, problems = make_section(Faults, {"slow": {"workers": 2, "factor": 3}})
    assert one == Faults(slow=(Slow(workers=2, factor=3.0),)) and not problems
    assert make_section(Faults, {"slow": [{"workers": 2, "factor": 3}]}) == (one, [])
    assert make_section(Faults, {"duplicate": {}, "slow": None}) == (Faults(duplicate=(Duplicate(),)), [])


def test_a_listed_step_is_met_once() -> None:
    lost = plan(lost_reply=[LostReply(steps=(3,))])
    assert [lost.happens("lost_reply", 1, 3, 0.0) for _ in range(2)] == [True, False]
    assert lost.happens("lost_reply", 2, 3, 0.0)


def test_what_is_shown_reads_back_the_same() -> None:
    source = {"task": "quadratic", "faults": {"crash": {"workers": [1, 2], "at_s": 3}, "delay": [{"of": "reply"}, {}]}}
    config = load(source, simulated=True)
    assert config.faults.to_dict()["delay"][0]["of"] == "reply"
    assert load(config.to_dict(), simulated=True) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("faults.crush={workers: 1}", "faults.crush: unknown key 'crush'; nearest 'crash'"),
        ("faults.crash={worker: 1}", "faults.crash.worker: unknown key 'worker'; nearest 'workers'"),
        ("faults.lost_push=[{chance: 0.1}, {chance: 2}]", "faults.lost_push.1.chance: got 2.0"),
        ("faults.lost_push=3", "faults.lost_push: got 3, expected a mapping of keys, or a list of them"),
        ("faults.lost_push=[3]", "faults.lost_push.0: got 3, expected a mapping of keys"),
        ("faults=3", "faults: got 3, expected a mapping of keys"),
        ("faults.slow={factor: 0}", "faults.slow.factor: got 0.0, expected a number > 0"),
        ("faults.slow={from_s: 3, until_s: 2}", "faults.slow.until_s: got 2.0, expected null, or later than from_s"),
        ("faults.pause={for_s: 0}", "faults.pause.for_s: got 0.0, expected a number of seconds > 0"),
        ("faults.delay={of: model}", "faults.delay.of: unknown value 'model'"),
        ("faults.crash={workers: 0}", "faults.crash.workers: got 0, expected all, or ranks >= 1"),
        ("faults.crash={workers: some}", "faults.crash.workers: got 'some'"),
    ],
)
def test_a_wrong_entry_is_refused_by_its_dotted_key(override: str, message: str) -> None:
    errors = check({"task": "quadratic"}, [override])
    assert any(message in str(error) for error in errors), [str(error) for error in errors]


def test_real_runs_refuse_faults_by_name() -> None:
    with pytest.raises(ConfigError, match="faults happen in `ps-elastic simulate` only"):
        load({"task": "quadratic"}, ["faults.slow={workers: 1}"])


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (Faults(slow=(Slow(workers=4),)), r"faults.slow.0.workers: got 4, expected ranks from 1 to 3"),
        (Faults(join=(Join(),)), r"faults.join.0.workers: got 'all', expected the ranks that join"),
        (Faults(join=(Join(workers=6),)), r"faults.join: got ranks \[6\], expected all from 4 to the last"),
    ],
)
def test_a_rank_that_never_takes_part_is_refused(faults: Faults, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        faults.check(3)


def test_new_ranks_follow_the_last_and_gone_ones_may_come_back() -> None:
    assert Faults(join=(Join(workers=(5, 4)), Join(workers=2)), slow=(Slow(workers=5),)).check(3) == 2
    assert Faults().check(3) == 0
