from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_elastic.config.values import Misfit, complaint, convert, describe_type, init_types, make
from ps_elastic.errors import ConfigError
from ps_elastic.plugins import Checked, OneOf, Range, plain

if TYPE_CHECKING:
    from nowhere import Unknown


@dataclass
class Sample:
    count: int
    rate: float = 0.5
    size: int | str = "auto"
    limit: Annotated[float, "metres"] | None = None
    parts: list[int] = field(default_factory=list)
    state: Unknown = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"got {self.count}, expected >= 0", key="count")
        if self.rate <= 0:
            raise ConfigError(f"got {self.rate}, expected > 0", key="rate")
        if self.limit == 13:
            raise ValueError("no luck")


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, 3),
        (3e5, int, 300000),
        (2, float, 2.0),
        (3, float | int, 3),
        (3.5, int | float, 3.5),
        (3.0, Optional[int], 3),  # noqa: UP045
        (None, float | None, None),
        ("3", int | str, "3"),
        (True, bool | Literal["auto"], True),
        ("auto", bool | Literal["auto"], "auto"),
        ([1, 2.0], list[int], [1, 2]),
        ([1, 2], tuple[float, float], (1.0, 2.0)),
        ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
        ((1, 2), Sequence[int], [1, 2]),
        ([1, "a"], list, [1, "a"]),
        ({"a": 1}, Mapping[str, float], {"a": 1.0}),
        ({"a": [1]}, dict, {"a": [1]}),
        ("x/y", Path, Path("x/y")),
        ({"a": 1}, Any, {"a": 1}),
        ("x", object, "x"),
    ],
)
def test_a_fitting_value_takes_the_type_of_its_hint(value: Any, hint: Any, expected: Any) -> None:
    converted = convert(value, hint)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("3", int),
        (True, int),
        (True, float),
        (1, bool),
        (3.5, int),
        (float("nan"), float),
        (float("inf"), float),
        (float("inf"), int),
        (10**400, float),
        (3, str),
        (None, int),
        (1, Literal["a", "b"]),
        (True, Literal[1, 2]),
        ([1], tuple[int, int]),
        ("ab", list[str]),
        ([1, "a"], list[int]),
        ([], dict),
        (3, Path),
        ("red", Sample),
    ],
)
def test_a_value_of_another_type_is_a_misfit(value: Any, hint: Any) -> None:
    with pytest.raises(Misfit):
        convert(value, hint)


def test_the_complaint_says_what_was_got_and_what_was_expected() -> None:
    assert complaint("3", int) == "got '3', expected a whole number"
    assert complaint(True, float | None) == "got true, expected a number or null"
    assert complaint((1, 2), bool) == "got [1, 2], expected true or false"
    assert complaint("bes", Literal["best", "worst"]) == "unknown value 'bes'; nearest 'best'; known: best, worst"
    assert complaint(None, tuple[float, float]) == "got null, expected [a number, a number]"
    assert describe_type(dict[str, int]) == "a mapping to a whole number"
    assert describe_type(Sample) == "Sample"
    assert len(complaint("x" * 1000, int)) < 150


def test_types_are_read_though_a_field_of_state_names_a_type_that_is_not_there() -> None:
    types = init_types(Sample)
    assert types == {"count": int, "rate": float, "size": int | str, "limit": float | None, "parts": list[int]}


def test_a_setting_whose_type_cannot_be_read_is_named() -> None:
    made = dataclasses.make_dataclass("Odd", [("a", "Missing", 1)])
    made.__module__ = __name__
    with pytest.raises(ConfigError) as caught:
        init_types(made)
    assert caught.value.key == "a"
    assert "'Missing'" in str(caught.value)


def test_defaults_fill_in_what_is_not_given() -> None:
    made, values, problems = make(Sample, {"count": 2.0, "limit": 3})
    assert made == Sample(2, limit=3.0)
    assert values == {"count": 2, "rate": 0.5, "size": "auto", "limit": 3.0, "parts": []}
    assert problems == []


def test_every_problem_is_found_at_once() -> None:
    made, _, problems = make(Sample, {"count": 1, "rat": 1, "size": None, "parts": [1.5], "rate": -1})
    assert made == Sample(1)
    assert {problem.key for problem in problems} == {"rat", "size", "parts", "rate"}
    assert "nearest 'rate'" in next(str(problem) for problem in problems if problem.key == "rat")


def test_a_missing_setting_is_required_by_name_and_type() -> None:
    made, _, problems = make(Sample, {})
    assert made is None
    assert [str(problem) for problem in problems] == ["count: required: a whole number"]


def test_a_required_setting_out_of_range_is_told_once() -> None:
    made, _, problems = make(Sample, {"count": -1})
    assert made is None
    assert [str(problem) for problem in problems] == ["count: got -1, expected >= 0"]


def test_a_plain_value_error_of_the_class_is_a_problem_of_the_section() -> None:
    made, _, problems = make(Sample, {"count": 1, "limit": 13})
    assert made is None
    assert [(problem.key, problem.message) for problem in problems] == [("", "no luck")]


def test_a_default_of_another_type_than_stated_is_refused() -> None:
    made = dataclasses.make_dataclass("Odd", [("bound", int, 0.5)])
    assert [problem.key for problem in make(made, {})[2]] == ["bound"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.tuples(inner)
    )
)
def test_plain_leaves_no_tuple(value: Any) -> None:
    def tuples(item: Any) -> bool:
        return isinstance(item, tuple) or (isinstance(item, list) and any(map(tuples, item)))

    assert not tuples(plain(value))


@given(st.integers(-(2**53), 2**53))
def test_a_whole_float_and_its_integer_are_the_same_setting(number: int) -> None:
    assert convert(float(number), int) == convert(number, int) == number


@dataclass
class Ranged:
    share: Annotated[float, Range("a number from 0 to 1")] = 0.5
    size: Annotated[int | Literal["auto"] | None, Range("a number of bytes > 4 and < 2^10, or auto")] = "auto"
    pairs: tuple[tuple[Annotated[float, Range("numbers >= -1.5")], float], ...] = ()
    part: Annotated[float, Range("0 < part <= 1")] = 1.0
    several: Annotated[tuple[int, ...], Range("at least one number, each > 0")] = (1,)
    colour: Annotated[str, OneOf("red, green or blue")] = "red"

    def __post_init__(self) -> None:
        assert 0 <= self.share <= 1, "asked of numbers in their range alone"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("share", 1, None),
        ("share", 1.5, "got 1.5, expected a number from 0 to 1"),
        ("share", -1, "got -1.0, expected a number from 0 to 1"),
        ("share", "x", "got 'x', expected a number"),
        ("size", None, None),
        ("size", 1023, None),
        ("size", 4, "got 4, expected a number of bytes > 4 and < 2^10, or auto"),
        ("size", 1024, "got 1024, expected a number of bytes > 4 and < 2^10, or auto"),
        ("pairs", [[0, -1.5]], None),
        ("part", 0, "got 0.0, expected 0 < part <= 1"),
        ("part", 1.5, "got 1.5, expected 0 < part <= 1"),
        ("several", [], "got [], expected at least one number, each > 0"),
        ("several", [1, 0], "got [1, 0], expected at least one number, each > 0"),
        ("colour", "blue", None),
        ("colour", "gree", "got 'gree', expected red, green or blue"),
        ("pairs", [[0, 0], [0, -2]], "got [[0.0, 0.0], [0.0, -2.0]], expected numbers >= -1.5"),
    ],
)
def test_a_range_is_read_from_its_words_and_refuses_with_them(key: str, value: Any, message: str | None) -> None:
    made, values, problems = make(Ranged, {key: value})
    assert [(problem.key, problem.message) for problem in problems] == ([] if message is None else [(key, message)])
    assert message is None or values == vars(Ranged())
    assert isinstance(made, Ranged)


def test_what_is_made_without_a_configuration_is_within_its_ranges_too() -> None:
    @dataclass
    class Made(Checked):
        share: Annotated[float, Range("a number from 0 to 1")] = 0.5

    assert Made(share=1).share == 1
    with pytest.raises(ConfigError, match="share: got 2, expected a number from 0 to 1"):
        Made(share=2)


def test_a_range_without_a_bound_is_its_authors_mistake() -> None:
    with pytest.raises(ValueError, match="no bound is stated in 'a large number'"):
        Range("a large number")
