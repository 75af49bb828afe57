"""The pages can be read: their sentences are short, their terms lead to the glossary, their links lead somewhere."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from pages import DOCS, FENCE, INLINE, PAGES, REPOSITORY, USER_PAGES, Page
from prose import LONGEST, MEAN, measure
from terms import GLOSSARY, terms, unexplained


@pytest.mark.parametrize("page", USER_PAGES, ids=str)
def test_the_sentences_of_a_page_are_short(page: Page) -> None:
    mean, long = measure(page.text)
    assert long == []
    assert mean <= MEAN


def test_long_sentences_are_noticed() -> None:
    long = "Word " + "word " * LONGEST + "end."
    assert measure(f"Short one. {long}\n\n```text\n{long}\n```\n\n| {long} |\n")[1] == [long]
    assert measure("A `b c d` e. `f` g.\n\n- One\n- two three")[0] == 2.0


# ---- terms


@pytest.mark.parametrize("page", [page for page in USER_PAGES if page.path != REPOSITORY / GLOSSARY], ids=str)
def test_a_term_is_linked_or_explained_where_a_page_first_uses_it(page: Page) -> None:
    known = terms((REPOSITORY / GLOSSARY).read_text(encoding="utf-8"))
    assert list(map(str, unexplained(page.text, known))) == []


def test_the_glossary_has_each_term_once() -> None:
    known = terms((REPOSITORY / GLOSSARY).read_text(encoding="utf-8"))
    assert len(known) >= 20
    assert [term for term, times in Counter(known).items() if times > 1] == []


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("A worker waits.", ["worker"]),
        ("All Workers wait.", ["worker"]),
        ("Two policies.", ["policy"]),
        ("A *worker* waits. The worker goes on.", []),
        ("The worker waits. A **worker** is a process.", []),
        ("A [worker](../reference/glossary.md#worker) waits. The worker goes on.", []),
        ("The worker waits. A [worker](../reference/glossary.md#worker) goes on.", ["worker"]),
        ("Each server\nstep counts.", ["server step"]),
        ("`worker`\n\n```text\nworker\n```\n\n# The worker\n\n    worker\n\n![worker](worker.svg) <!-- worker -->", []),
        ("See [how a worker works](other.md). A worker waits.", ["worker"]),
        ("See [how a worker works](other.md).", []),
        ("An m is no term, M is; workers_more and co-worker are none.", ["M"]),
    ],
)
def test_a_term_without_a_word_on_it_is_noticed(text: str, missing: list[str]) -> None:
    known = ["worker", "policy", "server", "server step", "M"]
    assert [found.term for found in unexplained(text, known)] == missing


def test_it_says_in_which_line_a_term_stands() -> None:
    (found,) = unexplained("```sh\nworker\n```\n\nThe [x](y.md)\nworker.", ["worker"])
    assert str(found).startswith("line 6: 'worker'")


# ---- links


def anchors(text: str) -> set[str]:
    """Those that a code host makes of the headings, and those that the page names itself."""
    text = FENCE.sub("", text)
    found: Counter[str] = Counter()
    made = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text)) | set(re.findall(r"^::: (\S+)", text, re.MULTILINE))
    for heading in re.findall(r"^#+ (.*?)\s*$", text, re.MULTILINE):
        slug = re.sub(r"[^\w -]", "", re.sub(r"\]\([^)]*\)", "]", heading)).lower().replace(" ", "-")
        made.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return made


def dead_links(page: Path, text: str) -> list[str]:
    prose = INLINE.sub("", FENCE.sub("", text))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link and not leads(page, text, link)]


def leads(page: Path, text: str, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if not name or target == page:
        return anchor in anchors(text)
    if not target.exists() or not anchor or target.suffix != ".md":
        return target.exists()
    return anchor in anchors(target.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_link_leads_somewhere(page: Page) -> None:
    assert dead_links(page.path, page.text) == []


def test_a_link_to_nowhere_is_noticed() -> None:
    text = (
        "# One, two\n\n[a](#one-two) [b](nowhere.md) [c](../README.md#nowhere) [d](../launch/test) [e](https://x.y)\n"
        "[f](#one) `[g](x.md)`\n\n```text\n[h](x.md)\n```\n\n![i](x.svg)\n\n## One, two\n\n[j](#one-two-1)\n"
    )
    assert dead_links(DOCS / "made_up.md", text) == ["nowhere.md", "../README.md#nowhere", "#one", "x.svg"]


def test_every_picture_is_on_a_page() -> None:
    used = {Path(name).name for page in PAGES for name in re.findall(r"!\[[^\]]*\]\(([^)\s]+\.svg)\)", page.text)}
    assert {path.name for path in (DOCS / "pictures").glob("*.svg")} <= used
