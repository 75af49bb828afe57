from __future__ import annotations

import json
import math

import pytest

from ps_elastic.policies.events import (
    ZERO,
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
    Term,
    Wake,
    Woke,
    actions_text,
    event_of,
    event_text,
)

EVENTS: list[Event] = [
    Push(PushId(2, 7), 3, 0.1, 1e-300, 2.5e8, 1024, "update"),
    Push(PushId(1, 1), 0, norm=math.inf),
    Asked(2, 0),
    Joined(4),
    Left(4),
    Woke(),
    Done(),
    Applied(5, 0.1 + 0.2, 0.1, 1.5, 1.9, 1e-9),
    Measured(PushId(3, 1), 2 / 3),
]


def read(text: str) -> dict[str, object]:
    return json.loads("{" + text + "}")


def test_every_event_reads_back_the_same() -> None:
    for event in EVENTS:
        assert event_of(read(event_text(event))) == event


def test_a_push_is_written_with_the_names_of_the_record() -> None:
    push = Push(PushId(2, 7), 3, 0.5, 0.25, 0.125, 16)
    assert event_text(push) == (
        '"event": "push", "worker": 2, "step": 7, "base": 3, "norm": 0.5, "payload_norm": 0.25, '
        '"residual_norm": 0.125, "nbytes": 16, "units": "gradient"'
    )


def test_a_push_with_an_infinite_norm_has_the_same_keys_in_the_same_order() -> None:
    finite, infinite = (read(event_text(Push(PushId(1, 2), 3, norm))) for norm in (1.0, math.inf))
    assert list(finite) == list(infinite)
    assert infinite == {**finite, "norm": math.inf}


def test_an_unknown_event_and_a_missing_field_are_named() -> None:
    with pytest.raises(ValueError, match="unknown event 'pushed'"):
        event_of({"event": "pushed"})
    with pytest.raises(ValueError, match="event 'asked' lacks 'step'"):
        event_of({"event": "asked", "worker": 1})
    with pytest.raises(ValueError, match="event 'push' lacks 'worker'"):
        event_of({"event": "push", "step": 1})


def test_every_action_and_answer_is_written_as_the_record_states() -> None:
    stand_in = Term(ZERO, 2, stands_for=PushId(2, 5))
    texts: dict[Action | Applied | Measured, list[object]] = {
        Step((Term(PushId(1, 4)), stand_in), 0.25): [
            "step",
            [[1, 4, 1, None], [0, 0, 2, [2, 5]]],
            0.25,
            "mean",
            "step",
        ],
        Step((Term(PushId(1, 1)),), 1, "sum", "amend"): ["step", [[1, 1, 1.0, None]], 1, "sum", "amend"],
        Drop(PushId(3, 1), 'norm > "limit"'): ["drop", 3, 1, 'norm > "limit"'],
        Release((2, 1), 0.5): ["release", [2, 1], 0.5],
        Wake(12.5): ["wake", 12.5],
        Measure((PushId(1, 2), PushId(2, 2))): ["measure", [[1, 2], [2, 2]]],
        Applied(3, 0.1, 0.2, 0.3, 0.4, 0.5): ["applied", 3, 0.1, 0.2, 0.3, 0.4, 0.5],
        Measured(PushId(2, 2), 0.1): ["measured", 2, 2, 0.1],
    }
    for action, expected in texts.items():
        assert json.loads(actions_text([action])) == expected
    assert json.loads(f"[{actions_text(texts)}]") == list(texts.values())
    assert actions_text([]) == ""
    assert json.loads(actions_text([Applied(3, math.inf)]))[1:3] == [3, math.inf]


def test_numbers_are_written_so_that_they_read_back_the_same() -> None:
    for share in (1 / 3, 0.1, 5e-324, 1.0):
        assert json.loads(actions_text([Step((Term(PushId(1, 1), share),), share)]))[2] == share


def test_a_mean_is_added_in_worker_and_step_order_whatever_the_order_of_arrival() -> None:
    step = Step.mean([PushId(3, 1), PushId(1, 2), PushId(1, 1)], share=0.5)
    assert [term.push for term in step.terms] == [(1, 1), (1, 2), (3, 1)]
    assert (step.share, step.combine, step.apply) == (0.5, "mean", "step")
    assert all(term.weight == 1 and term.stands_for is None for term in step.terms)
