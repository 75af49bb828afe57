"""At equal discrepancy, which policy waits least? Five models of delay, 3 to 256 workers, in simulated time."""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from statistics import median
from typing import Any, NamedTuple

from _curves import Read, read
from _page import EVIDENCE, Claim, Evidence, publish
from _waiting_runs import (
    DELAYS,
    EXACT,
    NORM,
    OURS,
    POLICIES,
    SIZES,
    SSP,
    STARTS,
    VALUE,
    Cell,
    Point,
    Scale,
    all_cells,
    points,
)

from ps_elastic.cluster.threads import set_threads
from ps_elastic.records.writer import environment

NAME = "waiting"
TIE = 0.01  # of the time: less is no difference
LEVELS = (0.25, 0.5, 0.75)  # of the B that `asynchronous` has, to compare at
NORM_SERVER = f"{NORM}, server model"
SHOWN = Cell("training", "exponential", 32)  # in the large panel
OTHERS = (SSP, VALUE, NORM, NORM_SERVER)
Found = dict[Cell, dict[str, list[Point]]]


def main() -> int:
    """Run what is not finished, and write the page and the plot; 0, or 6 if a claim does not hold."""
    from _waiting_plot import plot, plot_one

    set_threads(1, 1)
    found = {cell: points(cell) for cell in all_cells()}
    plot_one(found, SHOWN, EVIDENCE / f"{NAME}_one.png")
    plot(found, EVIDENCE / f"{NAME}.png")
    return publish(evidence(found))


class Row(NamedTuple):
    """How long each policy waits at one B; None if it has no setting with such a B."""

    cell: Cell
    level: float
    waits: dict[str, Read | None]

    def lead(self, other: str) -> float | None:
        """By how much elastic_bound waits less than `other`; None if that has no setting with such a B."""
        ours, theirs = self.waits[OURS], self.waits[other]
        assert ours is not None  # bound=0 is in its grid
        return None if theirs is None else theirs.waiting - ours.waiting


def rows(found: Found, measure: str) -> list[Row]:
    """All cells at equal B, by the `measure` sup, max or rms: at fractions of the B that `asynchronous` has."""
    made = []
    for cell, by_policy in found.items():
        pairs = {
            policy: [(getattr(point.own, measure), point.waiting) for point in points]
            for policy, points in by_policy.items()
        }
        pairs[NORM_SERVER] = [(getattr(point.server, measure), point.waiting) for point in by_policy[NORM]]
        ((free, _),) = pairs.pop("asynchronous")
        for level in (part * free for part in LEVELS):
            made.append(Row(cell, level, {policy: read(pairs[policy], level) for policy in (*POLICIES, NORM_SERVER)}))
    return made


def evidence(found: Found) -> Evidence:
    """The page: waiting at equal B_sup row by row, and how the rows are won by each measure."""
    facts = environment()
    where: dict[str, Any] = {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}"}
    where |= {key: facts[key] for key in ("versions", "platform", "processor", "cores")}
    where["mpi"] = "No MPI: simulated time"
    by = {measure: rows(found, measure) for measure in Scale._fields}
    shown = (OURS, EXACT, *OTHERS)
    table = [["start", "delays", "workers", "B_sup", *shown], *(line(row, shown) for row in by["sup"])]
    data = {
        "points": [
            ", ".join([*map(str, cell), policy, point.policy, *(f"{x:.4g}" for x in (*point.own, *point.server))])
            + f", {point.waiting:.4f}"
            for cell, policies in found.items()
            for policy, ps in policies.items()
            for point in ps
        ],
        "point": "start, delays, workers, policy, setting, B_sup, B_max, B_rms, these on the server's model, wait time",
    }
    title, command = "Waiting at equal discrepancy", f"launch/evidence {NAME}"
    return Evidence(NAME, title, command, where, table, claims(by["sup"]), data, notes(by))


def line(row: Row, policies: tuple[str, ...]) -> list[str]:
    """Waiting in % and, in brackets, of the two points of the curve beside it; the least is bold."""
    least = min(found.waiting for policy, found in row.waits.items() if found and policy != EXACT)
    return [*map(str, row.cell), f"{row.level:.3g}", *(shown(row.waits[r], least, bold=r != EXACT) for r in policies)]


def shown(found: Read | None, least: float, *, bold: bool) -> str:
    if found is None:
        return "-"
    figure = f"{100 * found.waiting:.1f}"
    right = "" if found.right is None else f"{100 * found.right:.0f}"
    return f"{f'**{figure}**' if bold and found.waiting <= least + TIE else figure} ({100 * found.left:.0f}..{right})"


def claims(made: list[Row]) -> list[Claim]:
    """For each of the others: elastic_bound waits no longer than it, in all rows."""
    found = []
    for other in OTHERS:
        won, tied, lost, unable = tally(made, other)
        rows = f"in {won + tied + unable} of {len(made)} rows; in {unable} of these the latter has no such B"
        text = f"at equal B_sup {OURS} waits no longer than {other} {rows}"
        found.append(Claim(text, lost == 0))
    return found


def tally(made: list[Row], other: str) -> tuple[int, int, int, int]:
    """In how many rows elastic_bound waits less than `other`, as long, longer; and where `other` has no such B."""
    leads = [row.lead(other) for row in made]
    known = [lead for lead in leads if lead is not None]
    won, lost = sum(lead > TIE for lead in known), sum(lead < -TIE for lead in known)
    return won, len(known) - won - lost, lost, len(leads) - len(known)


# ---- what the page says before its table


def notes(by: dict[str, list[Row]]) -> list[str]:
    from _waiting_text import MEANING, WHY

    sizes = "; ".join(f"{p}: {seeds} and {pushes}" for p, (seeds, pushes) in SIZES.items())
    return [
        "**Question:** if two policies allow the same discrepancy, which one lets its workers wait less?",
        *least(by["sup"]),
        "",
        f"![Wait time against B_sup, one curve for each policy]({NAME}_one.png)",
        "",
        f"The picture: {SHOWN.start}, {SHOWN.delays} compute times, {SHOWN.workers} workers. Lower is better,",
        "and so is a point further to the left. Points at 0.02 stand for all B below. The small panels before the last",
        "table show all cases.",
        "",
        *MEANING,
        "",
        f"Seeds, and pushes of each worker, by the number of workers: {sizes}.",
        "",
        *summary(by),
        "",
        f"Cases in which {OURS} waits longer, at equal B_sup:",
        "",
        *losses(by["sup"]),
        "",
        *WHY,
        *behind_norm(by["sup"]),
        *gap(by["sup"]),
        "",
        f"![Wait time against B_sup, one panel for each case]({NAME}.png)",
    ]


def least(made: list[Row]) -> list[str]:
    """In how many rows nobody waits less, with norm_bounded by its own x_t and as the others are measured."""
    own, server = (
        sum(all((row.lead(other) or 0) >= -TIE for other in (SSP, VALUE, norm)) for row in made)
        for norm in (NORM, NORM_SERVER)
    )
    return [
        f"**Answer:** at equal B_sup, {OURS} waits least, or within a point of it, in {own} of {len(made)} rows. If "
        f"{NORM} is measured on the server's model too, it does so in {server} rows. **What fails:** in the other rows "
        "another policy waits less."
    ]


def summary(by: dict[str, list[Row]]) -> list[str]:
    """A table: for each measure and rival, rows in which elastic_bound waits less, as long, longer; and by how much."""
    lines = [f"| at equal | against | {OURS} waits less | as long | longer | no such B | lead: median | worst |"]
    lines.append("|" + " --- |" * 8)
    for measure, made in by.items():
        for other in OTHERS:
            leads = [lead for row in made if (lead := row.lead(other)) is not None]
            middle, worst = (f"{100 * of(leads):+.1f} points" if leads else "-" for of in (median, min))
            counts = " | ".join(map(str, tally(made, other)))
            lines.append(f"| B_{measure} | {other} | {counts} | {middle} | {worst} |")
    return lines


def losses(made: list[Row]) -> list[str]:
    """Where elastic_bound waits longer, by rival, start and delays: how many rows, and by how much at worst."""
    lines = []
    for other in OTHERS:
        for start in STARTS:
            for delays in DELAYS:
                here = [row for row in made if row.cell[:2] == (start, delays) and row.lead(other) is not None]
                behind = sorted((-row.lead(other), row) for row in here if row.lead(other) < -TIE)  # type: ignore[operator]
                if behind:
                    by, row = behind[-1]
                    at = f"{row.cell.workers} workers, B_sup = {row.level:.3g}"
                    text = f"in {len(behind)} of {len(here)} rows, by {100 * by:.1f} points at worst ({at})"
                    lines.append(f"- than {other}, {start}, {delays}: {text}")
    return lines or ["- nowhere"]


def behind_norm(made: list[Row]) -> list[str]:
    """What would become of the rows lost to norm_bounded if elastic_bound knew more, or if both were measured alike."""
    lost = [row for row in made if (lead := row.lead(NORM)) is not None and lead < -TIE]
    if not lost:
        return []
    won, tied, longer, unable = tally(lost, NORM_SERVER)
    known = max(-lead for row in lost if (lead := row.lead(EXACT)) is not None)
    return [
        f"- In {len(lost)} rows, {NORM} waits less. There, knowing the exact distance after each step would save "
        f"{100 * known:.1f} points at most. Measured on the server's model, {NORM} has no such B in {unable} of these "
        f"rows. It waits longer than {OURS} in {won}, as long in {tied} and less in {longer}."
    ]


def gap(made: list[Row]) -> list[str]:
    """What elastic_bound would gain by knowing the exact distance after each step, and what refreshing gains."""
    lines = []
    for start in dict.fromkeys(row.cell.start for row in made):
        exact, path = (
            [lead for row in made if row.cell.start == start and (lead := row.lead(policy)) is not None]
            for policy in (EXACT, VALUE)
        )
        lines.append(
            f"- {start}: knowing the exact distance after each step would save {100 * -median(exact):.1f} points of "
            f"the time in the median row, and {100 * -min(exact):.1f} at most. Against the cumulative step length, "
            f"measuring distances saves {100 * median(path):.1f} points in the median row, and {100 * max(path):.1f} "
            f"at most. It costs {100 * max(0.0, -min(path)):.1f} points at worst."
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
