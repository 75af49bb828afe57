from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from ps_elastic.runtime.auto_buckets import SMALLEST, Choice, Line, Pace, choose, late_s
from ps_elastic.vectors.layout import Bucket, Layout

FREE = Line(0.0, 0.0)


def layers(count: int, width: int = 256) -> Layout:
    """`count` layers of 256 KiB."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))
    return Layout(model)


def pace(ready: tuple[float, ...], leaving: Line = FREE, arriving: Line = FREE) -> Pace:
    return Pace(ready, leaving, arriving, 4.0)


def test_a_line_goes_through_two_points_and_is_never_negative() -> None:
    line = Line.through((100.0, 2.0), (300.0, 3.0))
    assert line == Line(1.5, 0.005)
    assert [line.at(100), line.at(300)] == [2.0, 3.0]
    assert Line.through((100.0, 2.0), (300.0, 1.0)) == Line(2.0, 0.0)
    assert Line.through((100.0, 1.0), (300.0, 9.0)).fixed == 0.0


def test_what_is_late_is_what_backward_cannot_hide() -> None:
    """Three layers of one second each, the last first; a second to send one, or three at once."""
    layout = layers(3)
    second = Line(0.0, 1.0 / (1 << 18))
    ready = (3.0, 2.0, 1.0)
    whole, cut = (Bucket(0, layout.size),), Layout(_model(3), "layer").buckets
    assert late_s(layout.slots, whole, pace(ready, arriving=second)) == pytest.approx(3.0)
    assert late_s(layout.slots, cut, pace(ready, arriving=second)) == pytest.approx(1.0)
    slow = Line(0.0, 2.0 / (1 << 18))  # then the channel is never idle from the first second on
    assert late_s(layout.slots, cut, pace(ready, arriving=slow)) == pytest.approx(1 + 3 * 2 - 3)


def test_encoding_holds_backward_up() -> None:
    layout, cut = layers(3), Layout(_model(3), "layer").buckets
    assert late_s(layout.slots, cut, pace((3.0, 2.0, 1.0), leaving=Line(0.5, 0.0))) == pytest.approx(1.5)


def test_bucket_0_leaves_last_whenever_it_is_ready() -> None:
    layout, cut = layers(2), Layout(_model(2), "layer").buckets
    second = Line(0.0, 1.0 / (1 << 18))
    assert late_s(layout.slots, cut, pace((1.0, 5.0), arriving=second)) == pytest.approx(2.0)


def test_where_a_bucket_costs_nothing_small_ones_win_and_where_it_costs_much_the_whole() -> None:
    layout, ready = layers(16), tuple(16.0 - i for i in range(16))
    slow = Line(0.0, 1.0 / (1 << 18))
    assert choose(layout, pace(ready, arriving=slow)).buckets == 1 << 18
    assert choose(layout, pace(ready, leaving=Line(20.0, 0.0), arriving=slow)).buckets == "whole"
    assert choose(layout, pace((16.0,) * 16, arriving=slow)).buckets == "whole"  # nothing is ready before the end


def test_in_between_the_choice_is_the_best_there_is() -> None:
    """Against all sizes tried one by one; of those within 2 % of the best none is larger by more than a step."""
    layout, ready = layers(32), tuple(3.2 - 0.1 * i for i in range(32))
    arriving, leaving = Line(0.01, 0.08 / (1 << 18)), Line(0.02, 0.0)
    choice = choose(layout, pace(ready, leaving, arriving))
    lates = {
        size: late_s(layout.slots, Layout(_model(32), size).buckets, pace(ready, leaving, arriving))
        for size in (1 << k for k in range(16, 24))
    }
    assert isinstance(choice.buckets, int)
    assert choice.late_s == lates[choice.buckets]
    assert choice.late_s <= min(lates.values()) + 0.02 * (choice.whole_s + 3.2)
    assert choice.late_s < choice.whole_s
    assert choice.pieces == len(Layout(_model(32), choice.buckets).buckets)


def test_a_push_stays_whole_where_backward_would_wait_for_every_copy() -> None:
    copying = Line(0.0, 1.0 / (1 << 16))
    assert choose(layers(4), pace((4.0, 3.0, 2.0, 1.0), leaving=copying)).buckets == "whole"


def test_no_size_below_the_smallest_is_tried() -> None:
    layout = Layout(nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4))))
    assert 4 * layout.size < SMALLEST
    assert choose(layout, pace((4.0, 3.0, 2.0, 1.0), arriving=Line(0.0, 1.0))).buckets == "whole"


def test_the_choice_is_told_in_words() -> None:
    assert Choice(65536, 3, 0.0015, 0.004).text == (
        "buckets: auto is 65536 bytes, 3 buckets; a push should be whole at the server 1.50 ms after backward, "
        "in one piece 4.00 ms"
    )
    assert Choice("whole", 1, 0.004, 0.004).text.startswith("buckets: auto is whole; ")


def _model(count: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(count)))


def test_times_of_any_order_of_the_layers_are_taken_as_they_are() -> None:
    layout = Layout(_model(3), "layer")
    second = Line(0.0, 1.0 / (1 << 18))
    lates = {order: late_s(layout.slots, layout.buckets, pace(order, arriving=second))
             for order in itertools.permutations((1.0, 2.0, 3.0))}  # fmt: skip
    assert lates[(3.0, 2.0, 1.0)] == min(lates.values()) == pytest.approx(1.0)
    assert lates[(1.0, 2.0, 3.0)] == pytest.approx(2.0)
