"""A picture as SVG that can be read on a light and on a dark page, by eye and by a screen reader.

It has no background. Text follows the reader's colour scheme and has a seam of the opposite brightness, so that it can
be read too if the page does not follow that scheme. All other colours are as far from white as from black.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from math import atan2, cos, sin

LIGHT, DARK = ("#1f2328", "#ffffff"), ("#e6edf3", "#14181f")  # text and ground
BLUE, ORANGE, GREEN, GREY = "#2f7de1", "#cf6a0a", "#1f9d55", "#808691"
Point = tuple[float, float]

_STYLE = f"""\
  svg {{ --text: {LIGHT[0]}; --ground: {LIGHT[1]}; }}
  @media (prefers-color-scheme: dark) {{ svg {{ --text: {DARK[0]}; --ground: {DARK[1]}; }} }}
  text {{ font: 14px system-ui, sans-serif; fill: var(--text); stroke: var(--ground); stroke-width: 3px;
    stroke-linejoin: round; paint-order: stroke; }}
  .small {{ font-size: 12px; }}
  .bold {{ font-weight: 600; }}
  .code {{ font-family: ui-monospace, monospace; font-size: 13px; }}
"""


class Drawing:
    """Shapes, in the order in which they are drawn. Lengths are pixels at the picture's own size."""

    def __init__(self, width: int, height: int, title: str, description: str) -> None:
        self.width, self.height = width, height
        self._title, self._description = title, description
        self._shapes: list[str] = []
        self._patterns: list[str] = []

    def hatched(self, name: str, colour: str) -> str:
        """The fill of diagonal lines, which is told from a plain one without its colour."""
        self._patterns.append(
            f'<pattern id="{name}" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
            f'<path d="M1 0V6" stroke="{colour}" stroke-width="2"/></pattern>'
        )
        return f"url(#{name})"

    def box(
        self, x: float, y: float, width: float, height: float, colour: str, *, fill: str = "none", corner: float = 6
    ) -> None:
        self._shapes.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" rx="{_n(corner)}"'
            f' fill="{fill}" stroke="{colour}" stroke-width="1.5"/>'
        )

    def line(self, points: Iterable[Point], colour: str, *, width: float = 2, dashes: str = "") -> None:
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        self._shapes.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{_n(width)}"'
            f' stroke-linejoin="round"{dashed}/>'
        )

    def arrow(self, start: Point, end: Point, colour: str, *, dashes: str = "", both: bool = False) -> None:
        self.line([start, end], colour, dashes=dashes)
        for tip, other in [(end, start), (start, end)][: 2 if both else 1]:
            angle = atan2(tip[1] - other[1], tip[0] - other[0])
            corners = [(tip[0] - 10 * cos(angle + turn), tip[1] - 10 * sin(angle + turn)) for turn in (0.4, -0.4)]
            path = " ".join(f"{_n(x)},{_n(y)}" for x, y in [tip, *corners])
            self._shapes.append(f'<polygon points="{path}" fill="{colour}"/>')

    def dot(self, centre: Point, radius: float, colour: str, *, fill: str | None = None) -> None:
        self._shapes.append(
            f'<circle cx="{_n(centre[0])}" cy="{_n(centre[1])}" r="{_n(radius)}"'
            f' fill="{fill or colour}" stroke="{colour}" stroke-width="2"/>'
        )

    def text(self, x: float, y: float, words: str, *, anchor: str = "middle", style: Sequence[str] = ()) -> None:
        """anchor: what of the text is at x: its `start`, `middle` or `end`; style: small, bold, code."""
        named = f' class="{" ".join(style)}"' if style else ""
        self._shapes.append(f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}"{named}>{escape(words)}</text>')

    def svg(self) -> str:
        patterns = f"<defs>{''.join(self._patterns)}</defs>\n" if self._patterns else ""
        shapes = "\n".join(self._shapes)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}"'
            f' height="{self.height}" role="img" aria-labelledby="title description">\n'
            f'<title id="title">{escape(self._title)}</title>\n'
            f'<desc id="description">{escape(self._description)}</desc>\n'
            f"<style>\n{_STYLE}</style>\n{patterns}{shapes}\n</svg>\n"
        )


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
