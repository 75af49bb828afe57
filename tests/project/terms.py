"""Whether a page leads its reader to the glossary: `python tests/project/prose.py --terms [PAGE...]`.

A term is a heading of the third level in docs/reference/glossary.md. On a page it stands first as a link to the
glossary, or it is set in *italics* or **bold** where the page explains it. Code, headings, pictures and the texts of
other links do not count, and of two terms that fit the longer one is meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

GLOSSARY = "docs/reference/glossary.md"


class Unexplained(NamedTuple):
    term: str
    line: int  # where the term stands first

    def __str__(self) -> str:
        return f"line {self.line}: '{self.term}' has no link to the glossary"


def terms(glossary: str) -> list[str]:
    return re.findall(r"^### (.+?) *$", glossary, re.MULTILINE)


def unexplained(text: str, known: Iterable[str]) -> Iterator[Unexplained]:
    """The terms that the page uses without a word on what they are."""
    known = list(known)
    text = _blank(r"\A---\n.*?\n---\n|<!--.*?-->|^ *```.*?^ *```$", text)
    text = _blank(r"^#[^\n]*$|^    \S[^\n]*$|^:::[^\n]*$|!\[[^\]]*\]\([^)]*\)", text)
    links = [(*found.span(), "glossary" in found[2]) for found in re.finditer(r"\[([^\]]*)\]\(([^)]*)\)", text)]
    text = _blank(r"(`+)(?!`).+?(?<!`)\1(?!`)|(?<=\])\([^)]*\)", text)
    emphasised = "\n".join(found[2] for found in re.finditer(r"(\*\*?|\b__?)(?=\S)(.+?)(?<=\S)\1", text, re.DOTALL))
    explained = {term for term, _ in _found(emphasised, known)}
    for term, place in _found(text, known):
        around = [to_glossary for begin, end, to_glossary in links if begin <= place < end]
        if term in explained or around == [False]:  # the latter is the name of another page
            continue
        explained.add(term)
        if not around:
            yield Unexplained(term, text.count("\n", 0, place) + 1)


def _blank(pattern: str, text: str) -> str:
    """The text with spaces for what matches: every line keeps its number and every character its place."""

    def spaces(found: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", found[0])

    return re.sub(pattern, spaces, text, flags=re.MULTILINE | re.DOTALL)


def _found(text: str, known: Iterable[str]) -> Iterator[tuple[str, int]]:
    """(term, place) of each term in the text, singular or plural."""
    longest_first = sorted(known, key=len, reverse=True)
    pattern = "|".join(rf"(?<![\w-])({_forms(term)})(?![\w-])" for term in longest_first)
    for found in re.finditer(pattern, text):
        if found.lastindex is not None:
            yield longest_first[found.lastindex - 1], found.start()


def _forms(term: str) -> str:
    if len(term) == 1:
        return re.escape(term)  # a symbol: M is not m
    *before, last = (re.escape(word) for word in term.split())
    plural = f"(?:{last}|{last[:-1]}ies)" if last.endswith("y") else f"{last}(?:s|es)?"
    return "(?i:" + r"\s+".join([*before, plural]) + ")"
