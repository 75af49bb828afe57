"""The pages of the documentation as a reader uses them: the files they show, and the lines to type, in order.

A block that begins with `# file: NAME` is a whole file. A line of a ```sh block is to be typed as it stands; it ends
with 0, or with what a comment `# exit CODE` behind it says. A ```console block shows, after `$ `, lines that a test
cannot run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
STARTS_JOBS = {"bench", "compare", "doctor", "launch", "verify"}  # of the commands; the others run in one process
OTHERS_JOBS = {"mpiexec", "mpirun", "salloc", "sbatch", "srun"}
MANY_WORKERS = 512  # from so many on a simulation takes minutes


@dataclass(frozen=True)
class Line:
    """One line to type."""

    page: str
    number: int  # of its kind in the page, from 1
    text: str
    code: int = 0  # what it ends with

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"

    @cached_property
    def words(self) -> list[str]:
        """As the shell sees them; a line that needs more of a shell than that is not `plain`."""
        return shlex.split(self.text, comments=True)

    @cached_property
    def plain(self) -> bool:
        """Whether it is one command with its arguments: no pipe, redirection, variable or second command."""
        return not any(map(_is_mark, self._marked)) and not re.search(r"[$`*]|^\w+=", self.text)

    @cached_property
    def _marked(self) -> list[str]:
        """The words, and the shell's marks between them, such as `|` and `>`."""
        marked = shlex.shlex(self.text.replace("\n", " ; "), posix=True, punctuation_chars=True)
        marked.whitespace_split = True
        return list(marked)

    @property
    def activates(self) -> bool:
        return self.words[0] in ("source", ".") and self.words[-1].endswith(".venv/bin/activate")

    @property
    def script(self) -> Path | None:
        """The script of launch/ that it starts: such a script is run elsewhere."""
        name = next((word for word in self.words[:1] if word.startswith(("launch/", "./launch/", ".ci/"))), None)
        return None if name is None else REPOSITORY / name

    @property
    def arguments(self) -> list[str] | None:
        """Those of the first ps-elastic on the line, if there is one: up to a mark, and the number before that."""
        if "ps-elastic" not in self._marked:
            return None
        after = self._marked[self._marked.index("ps-elastic") + 1 :]
        end = next((place for place, word in enumerate(after) if _is_mark(word)), None)
        if end is not None and re.search(rf"\s\d{re.escape(after[end])}", self.text):
            end -= 1
        return after[:end]

    @property
    def submits(self) -> bool:
        return "sbatch" in self.words or ((self.arguments or [""])[0] == "submit" and "--dry-run" not in self.words)

    @property
    def slow(self) -> bool:
        """Whether it starts a job or takes minutes."""
        if OTHERS_JOBS & set(self.words) or self.submits:
            return True
        arguments = self.arguments or [""]
        helps = bool({"-h", "--help"} & set(arguments))
        return not helps and (arguments[0] in STARTS_JOBS or _workers(arguments) >= MANY_WORKERS)

    @property
    def quick(self) -> bool:
        """Whether it runs in the quick tests, if all is there that it reads."""
        return not self.slow and self.script is None

    @property
    def makes(self) -> set[str]:
        """The folders that it says it makes, and the files that it writes by `>`."""
        named = {after for option, after in pairwise(self.words) if option in _FOLDERS}
        return named | {after for mark, after in pairwise(self._marked) if mark == ">"}


_ENDS = {"case": "esac", "for": "done", "if": "fi", "until": "done", "while": "done"}
_FOLDERS = ("--keep", "--out", "--run-dir")


def _commands(block: str) -> Iterator[str]:
    """The lines of a block; a loop, a condition or a text that is fed to a command is one with its last line."""
    lines = iter(block.splitlines())
    for line in lines:
        end = _ENDS.get(line.split(" ", 1)[0])
        if fed := re.search(r"<<-?\s*['\"]?(\w+)", line):
            end = fed[1]
        whole = [line]
        while end is not None and not re.match(rf"{end}\b", whole[-1]) and not re.search(rf";\s*{end}\b", whole[-1]):
            whole.append(next(lines))
        yield "\n".join(whole)


def _is_mark(word: str) -> bool:
    return set(word) <= set("();<>|&")


def _workers(arguments: list[str]) -> int:
    given = [after for option, after in pairwise(arguments) if option == "--workers"]
    return max((int(count) for count in given if count.isdigit()), default=0)


@dataclass(frozen=True)
class Page:
    path: Path

    def __str__(self) -> str:
        return str(self.path.relative_to(REPOSITORY))

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def blocks(self) -> list[tuple[str, str]]:
        """(language, text) of each block of code; one in a list is set to the left."""
        return [
            (language, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE))
            for indent, language, text in FENCE.findall(self.text)
        ]

    @cached_property
    def files(self) -> dict[str, str]:
        """Name -> text of each file that the page shows."""
        found: dict[str, str] = {}
        for _, block in self.blocks:
            if match := re.match(r"# file: (\S+)\n", block):
                assert match[1] not in found, f"{self} shows {match[1]} twice"
                found[match[1]] = block
        return found

    @cached_property
    def lines(self) -> list[Line]:
        """The lines to type, in order."""
        return list(self._lines("sh"))

    @cached_property
    def console(self) -> list[Line]:
        """The lines that are only shown."""
        return list(self._lines("console"))

    @cached_property
    def inline(self) -> list[Line]:
        """What stands in backquotes in the text and begins with `ps-elastic`."""
        found = [" ".join(shown.split()) for _, shown in INLINE.findall(FENCE.sub("", self.text))]
        commands = [shown for shown in found if shown.startswith("ps-elastic ")]
        return [Line(str(self), number, shown) for number, shown in enumerate(commands, 1)]

    def _lines(self, language: str) -> Iterator[Line]:
        number = 0
        for kind, block in self.blocks:
            if kind != language or block.startswith("# file:"):
                continue
            for text in _commands(block.replace("\\\n", " ")):
                if language == "console":
                    text = text.removeprefix("$ ") if text.startswith("$ ") else ""
                expected = re.search(r"\s# exit (\d+)\s*$", text)
                if not shlex.split(text, comments=True):
                    continue
                number += 1
                yield Line(str(self), number, text.strip(), int(expected[1]) if expected else 0)


PAGES = [Page(path) for path in (REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md")))]
# What an experiment has written has its figures beside it.
GENERATED = [page for page in PAGES if page.path.parent.name == "evidence" and page.path.with_suffix(".json").exists()]
USER_PAGES = [page for page in PAGES if page not in GENERATED]


def shown(name: str) -> Page:
    """The page that shows this file."""
    found = [page for page in PAGES if name in page.files]
    assert found, f"no page shows {name}"
    return found[0]


def prepare(page: Page, folder: Path) -> None:
    """Make `folder` what a reader of the page works in: configs/, and the files that the page shows."""
    (folder / "configs").mkdir(parents=True)
    for config in CONFIGS:
        (folder / "configs" / config.name).write_text(config.read_text(encoding="utf-8"), encoding="utf-8")
    for name, text in page.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
