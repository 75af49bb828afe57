"""Links of docs/ to files outside of it, which a code host follows and a site cannot.

They lead to the repository if mkdocs.yml has its address; else the file's name stands there as code.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

_CODE = r"^(?P<indent> *)(?P<fence>```+|~~~+).*?^(?P=indent)(?P=fence) *$|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)"
_LINK = r"(?<!!)\[(?P<text>[^\[\]]*)\]\((?P<target>(?:\.\./)+[^)\s#]*)(?P<anchor>#[^)\s]*)?\)"
_EITHER = re.compile(f"{_LINK}|{_CODE}", re.MULTILINE | re.DOTALL)  # a link may hold code, and code what looks like one


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """mkdocs calls this for every page."""
    return rewritten(markdown, page.file.src_uri, _address(config))


def rewritten(markdown: str, page: str, repository: str | None) -> str:
    """The page docs/`page`, with every link that leaves docs/ turned into what works on a site."""

    def replaced(found: re.Match[str]) -> str:
        text, target = found["text"], found["target"]
        if target is None:
            return found[0]
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
        if path == "docs" or path.startswith("docs/"):
            return found[0]
        if repository:
            return f"[{text}]({repository}/{path}{found['anchor'] or ''})"
        return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"

    return _EITHER.sub(replaced, markdown)


def _address(config: Any) -> str | None:
    """Where the repository's files are shown, without a slash at the end; None if mkdocs.yml names no repository."""
    if not config["repo_url"]:
        return None
    return f"{config['repo_url'].rstrip('/')}/{(config['edit_uri'] or 'blob/main').strip('/')}"
