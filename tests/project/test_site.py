"""The site of docs/: its navigation, its links to the code, and, in the slow tests, the built site itself."""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ruamel.yaml import YAML

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
SETTINGS = REPOSITORY / "launch" / "site" / "mkdocs.yml"
GROUPS = ["Tutorials", "How-to", "Reference", "Explanation", "Evidence"]


def leaves(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        else:
            (below,) = entry.values()
            yield from [below] if isinstance(below, str) else leaves(below)


def settings() -> Any:
    return YAML(typ="rt", pure=True).load(SETTINGS)  # as it is written: a tag of it would import mkdocs


def test_every_page_stands_once_in_the_navigation() -> None:
    pages = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    assert sorted(leaves(settings()["nav"])) == pages


def test_the_navigation_has_its_groups_in_order() -> None:
    assert [name for entry in settings()["nav"] for name in entry] == ["Home", *GROUPS]


def test_the_pages_that_git_ignores_are_those_of_the_built_site() -> None:
    target = (SETTINGS.parent / settings()["site_dir"]).resolve()
    assert f"{target.relative_to(REPOSITORY).parts[0]}/" in (REPOSITORY / ".gitignore").read_text().splitlines()


# ---- links to files outside of docs/


@pytest.fixture(scope="module")
def source_links() -> Any:
    spec = importlib.util.spec_from_file_location("source_links", SETTINGS.parent / "source_links.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "written", "without", "with_address"),
    [
        ("index.md", "[the code](../ps_elastic/a.py)", "the code (`ps_elastic/a.py`)", "[the code](R/ps_elastic/a.py)"),
        ("howto/b.md", "[`x/a.py`](../../x/a.py#L3)", "`x/a.py`", "[`x/a.py`](R/x/a.py#L3)"),
        ("howto/b.md", "[c](../reference/c.md) and [d](d.md#e)", None, None),
        ("howto/b.md", "`[a](../../x/a.py)`", None, None),
        ("howto/b.md", "```text\n[a](../../x/a.py)\n```\n", None, None),
        ("howto/b.md", "![a](../../x/a.svg)", None, None),
        ("howto/b.md", "Two [a](../../a), [b](../../b).", "Two `a`, `b`.", "Two [a](R/a), [b](R/b)."),
    ],
)
def test_a_link_to_the_code_becomes_one_to_the_repository_or_the_files_name(
    source_links: Any, page: str, written: str, without: str | None, with_address: str | None
) -> None:
    assert source_links.rewritten(written, page, None) == (without or written)
    assert source_links.rewritten(written, page, "R") == (with_address or written)


def test_the_address_of_the_repository_is_that_of_the_settings(source_links: Any) -> None:
    file = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    for given, address in [
        ({"repo_url": None, "edit_uri": None}, "`x`"),
        ({"repo_url": "https://host/me/it/", "edit_uri": None}, "[x](https://host/me/it/blob/main/x)"),
        ({"repo_url": "https://host/me/it", "edit_uri": "src/dev/"}, "[x](https://host/me/it/src/dev/x)"),
    ]:
        assert source_links.on_page_markdown("[x](../x)", file, given, None) == address


# ---- the built site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    ended = build(SETTINGS, folder)
    assert ended.returncode == 0, ended.stderr
    return folder


def build(config: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(folder)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )


@pytest.mark.slow
def test_every_page_is_built_and_found_by_the_search(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    pages = {re.sub(r"(^|/)README$", r"\1index", name.removesuffix(".md")) for name in leaves(settings()["nav"])}
    assert found == {f"{page}.html" for page in pages}
    assert all((site / name).is_file() for name in found)


@pytest.mark.slow
def test_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"?([^\" >]+)", text)
        loaded += re.findall(r"<link\b[^>]*rel=\"?(?:stylesheet|preconnect|preload|icon)\"?[^>]*>", text)
        assert loaded and [one for one in loaded if "//" in one] == [], page


@pytest.mark.slow
def test_the_reference_of_the_api_shows_what_the_docstrings_say(site: Path) -> None:
    from ps_elastic.policies import Policy

    assert Policy.__doc__ is not None
    text = html.unescape(re.sub(r"<[^>]+>", "", (site / "reference" / "api.html").read_text()))
    assert Policy.__doc__.split("\n")[0].replace("`", "") in text
    assert "\n:::" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("[a](nowhere.md)", "nowhere.md"),
        ("[a](index.md#nowhere)", "no such anchor"),
        ("::: ps_elastic.Nothing", "Nothing"),
    ],
)
def test_a_link_or_a_name_that_leads_nowhere_ends_the_build(tmp_path: Path, broken: str, said: str) -> None:
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")
    docs = tmp_path / "docs"
    (tmp_path / "launch" / "site").mkdir(parents=True)
    docs.mkdir()
    shown = re.sub(r"^nav:\n.*", "", SETTINGS.read_text(), flags=re.MULTILINE | re.DOTALL)
    config = tmp_path / "launch" / "site" / "mkdocs.yml"
    config.write_text(shown.replace("paths: [../..]", f"paths: [{REPOSITORY}]"))
    (config.parent / "source_links.py").write_text((SETTINGS.parent / "source_links.py").read_text())
    for text, code in (("# One\n\n[a](index.md#one) [b](../no/file.py)\n", 0), (f"# One\n\n{broken}\n", 1)):
        (docs / "index.md").write_text(text)
        ended = build(config, tmp_path / "out")
        assert ended.returncode == code, ended.stderr
    assert said in ended.stderr
