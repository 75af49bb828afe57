"""The path of the model, a worker's copy of it, and how far they are apart."""

from __future__ import annotations

from itertools import pairwise

from drawings.svg import BLUE, ORANGE, Drawing

MODELS = [(90.0, 180.0), (170.0, 85.0), (310.0, 45.0), (460.0, 95.0)]
NAMES = ["x\N{SUBSCRIPT ZERO}", "x\N{SUBSCRIPT ONE}", "x\N{SUBSCRIPT TWO}", "x\N{SUBSCRIPT THREE}"]
BESIDE = [(-30, 5), (-24, 0), (0, -14), (26, 5)]  # from a point to the middle of its name
DISTANCE = f"D = \N{DOUBLE VERTICAL LINE}{NAMES[3]} - v\N{DOUBLE VERTICAL LINE}"


def draw() -> str:
    d = Drawing(
        640,
        225,
        "Discrepancy D of a gradient",
        "The server's model moves from x0 over x1 and x2 to x3, one server step after another. A worker's copy v stayed"
        " at x0. The discrepancy D is the length of the straight line from v to x3.",
    )
    for number, (before, after) in enumerate(pairwise(MODELS), 1):
        d.line([before, after], BLUE)
        side = -8 if after[1] < before[1] else 8  # above the line, whether it rises or falls
        x, y = (before[0] + after[0]) / 2 + side, (before[1] + after[1]) / 2 - 10
        d.text(x, y, f"step {number}", anchor="end" if side < 0 else "start", style=["small"])
    for point, name, (right, down) in zip(MODELS, NAMES, BESIDE, strict=True):
        d.dot(point, 5, BLUE)
        d.text(point[0] + right, point[1] + down, name, style=["bold"])
    (v_x, v_y), (x, y) = MODELS[0], MODELS[-1]
    slope = (y - v_y) / (x - v_x)
    d.arrow((v_x + 13, v_y + 13 * slope), (x - 9, y - 9 * slope), ORANGE, dashes="7 5", both=True)
    d.text((x + v_x) / 2 + 8, (y + v_y) / 2 + 24, DISTANCE, anchor="start", style=["bold"])
    d.dot(MODELS[0], 11, ORANGE, fill="none")
    d.text(
        v_x,
        v_y + 34,
        f"v = {NAMES[0]}: the worker's copy, which its gradient is computed on",
        anchor="start",
        style=["small"],
    )
    d.text(x + 16, y + 26, "server model when", anchor="start", style=["small"])
    d.text(x + 16, y + 42, "the gradient is used", anchor="start", style=["small"])
    return d.svg()
