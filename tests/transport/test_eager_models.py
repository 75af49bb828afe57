"""Whom a model may be sent while its step is being made: told by what the last replies were."""

from __future__ import annotations

from ps_elastic.transport.eager import EagerModels


def test_a_worker_is_foreseen_after_two_answers_with_the_model_of_the_step_of_its_push() -> None:
    early = EagerModels()
    for foreseen in ([], [], [1], [1]):
        assert early.begin([1]) == foreseen
        early.answered(1, newest=True)


def test_every_worker_of_a_step_counts_by_itself() -> None:
    early = EagerModels()
    for foreseen in ([], [], [2], [2]):
        assert early.begin([2, 1]) == foreseen
        early.answered(1, newest=False)
        early.answered(2, newest=True)


def test_an_older_model_or_an_answer_after_another_step_begins_the_count_anew() -> None:
    early = EagerModels()
    for _ in range(2):
        early.begin([1])
        early.answered(1, newest=True)
    assert early.begin([1]) == [1]
    assert early.begin([2]) == []  # worker 1 was not answered after its step
    early.answered(1, newest=True)  # the model of the step of worker 2
    for foreseen in ([], [], [1]):
        assert early.begin([1]) == foreseen
        early.answered(1, newest=True)
    early.begin([1])
    early.answered(1, newest=False)
    assert early.begin([1]) == []
