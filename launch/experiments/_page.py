"""A page of docs/evidence: what was run, where and when, what came out, and which claims it bears out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from ps_elastic.errors import CHECK_FAILED, OK

REPOSITORY = Path(__file__).resolve().parents[2]
EVIDENCE = REPOSITORY / "docs" / "evidence"


class Claim(NamedTuple):
    """Something that the figures may bear out."""

    text: str
    holds: bool


class Evidence(NamedTuple):
    """Everything on a page; `data` goes into the JSON file beside it."""

    name: str
    title: str
    command: str  # that was run, from the repository's folder
    setting: dict[str, Any]
    table: list[list[str]]  # headings first
    claims: list[Claim]
    data: dict[str, Any]
    notes: Sequence[str] = ()  # lines of Markdown, before the table


def setting(run_dir: Path) -> dict[str, Any]:
    """When and where the run in `run_dir` was made: the day it ended, versions, cores and processor, MPI library."""
    env = json.loads((run_dir / "env.json").read_text())
    ended = datetime.fromtimestamp((run_dir / "summary.json").stat().st_mtime, timezone.utc)
    return {
        "date": f"{ended:%Y-%m-%d}",
        **{key: env[key] for key in ("versions", "platform", "processor", "cores", "mpi")},
    }


def publish(evidence: Evidence, folder: Path = EVIDENCE) -> int:
    """Write NAME.md and NAME.json into `folder`, say so, and return 0, or 6 if a claim does not hold."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{evidence.name}.md"
    page.write_text(markdown(evidence))
    facts = evidence._asdict() | {"claims": [claim._asdict() for claim in evidence.claims]}
    page.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    for claim in evidence.claims:
        print(line(claim))
    print(page)
    return OK if all(claim.holds for claim in evidence.claims) else CHECK_FAILED


def markdown(evidence: Evidence) -> str:
    """The page's text."""
    return "\n".join(_lines(evidence)) + "\n"


def line(claim: Claim) -> str:
    return f"{'holds' if claim.holds else 'FAILS'}: {claim.text}"


def _lines(evidence: Evidence) -> Iterator[str]:
    where = evidence.setting
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    yield from (f"# {evidence.title}", "")
    yield f"Written by `launch/evidence {evidence.name}`, which ran"
    yield from ("", "```sh", evidence.command, "```", "")
    yield f"on {where['date']}: {where['cores']} cores ({where['processor']}), {where['platform']}; {versions};"
    yield from (f"{where['mpi'].partition(', package')[0]}.", "")  # the rest tells who built it
    if evidence.notes:
        yield from (*evidence.notes, "")
    yield from (*_table(evidence.table), "")
    yield from (f"- {line(claim)}" for claim in evidence.claims)
    yield from ("", f"All figures: [{evidence.name}.json]({evidence.name}.json).")


def _table(table: Sequence[Sequence[str]]) -> Iterator[str]:
    head, *rows = table
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"
