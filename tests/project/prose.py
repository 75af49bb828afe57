"""How long the sentences of a page are: `python tests/project/prose.py PAGE...`; `--terms`: see terms.py.

Counted is what is read as prose: code blocks, tables, headings, formulas on lines of their own are not.
An item of a list ends a sentence, and so does a colon at the end of a line. What stands in backquotes is one word, and
so is a link's address.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

MEAN, LONGEST = 15.0, 30  # words
# Abbreviations whose full stop ends nothing
_NO_END = re.compile(r"\b(e\.g|i\.e|etc|vs|et al|Fig|Eq|No|cf)\.", re.IGNORECASE)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a page of Markdown, as they are read."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^ *```.*?^ *```$", "\n\n", text, flags=re.DOTALL | re.MULTILINE)
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if not re.match(r"\s*(\||#|    \S|!!!|<|:::|\$\$|!\[)", line)]
        for part in re.split(r"\n(?=\s*(?:[-*]|\d+\.)\s)", "\n".join(lines)):
            yield from _of_paragraph(part)


def _of_paragraph(text: str) -> Iterator[str]:
    text = re.sub(r"^\s*(?:[-*]|\d+\.)\s+", "", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]+`", "Code", text)
    text = _NO_END.sub(r"\1", text)
    text = re.sub(r"[*_]{1,2}(\S.*?\S|\S)[*_]{1,2}", r"\1", " ".join(text.split()))
    for sentence in re.split(r"(?<=[.!?])[\"')]*\s+(?=[^a-z])", text):
        if words(sentence):
            yield sentence.strip()


def words(sentence: str) -> int:
    return len([word for word in sentence.split() if re.search(r"\w", word)])


def measure(text: str) -> tuple[float, list[str]]:
    """The mean number of words of a sentence, and the sentences that have more than LONGEST."""
    found = list(sentences(text))
    mean = sum(map(words, found)) / len(found) if found else 0.0
    return mean, [sentence for sentence in found if words(sentence) > LONGEST]


def main(names: list[str]) -> None:
    if names[:1] == ["--terms"]:
        tell_terms(names[1:])
        return
    for name in names:
        mean, long = measure(Path(name).read_text(encoding="utf-8"))
        print(f"{name}: {mean:.1f} words a sentence, {len(long)} of more than {LONGEST}")
        for sentence in long:
            print(f"    {words(sentence)}: {sentence}")


def tell_terms(names: list[str]) -> None:
    import pages
    import terms

    known = terms.terms((pages.REPOSITORY / terms.GLOSSARY).read_text(encoding="utf-8"))
    for path in map(Path, names or [page.path for page in pages.USER_PAGES]):
        for found in terms.unexplained(path.read_text(encoding="utf-8"), known):
            print(f"{path}: {found}")


if __name__ == "__main__":
    main(sys.argv[1:])
