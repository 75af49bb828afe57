"""Imports point one way, the law needs the standard library alone, and only transport/ knows MPI."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import ps_elastic

ROOT = Path(ps_elastic.__file__).parent
LAW = (
    "errors", "registry", "events", "runahead", "ledger", "noting", "taking", "decide", "policies", "replay", "theory",
)  # fmt: skip
# Nobody imports from a later layer; files that are not named here may stand between any two.
LAYERS = (
    ("errors",),
    ("events", "registry"),
    ("runahead",),
    ("ledger",),
    ("policies",),
    ("noting", "taking"),
    ("decide",),
    ("layout", "compressors", "combiners", "updates", "tasks"),
    ("lane",),
    ("server", "worker"),
    ("transport", "simulate"),
    ("commands", "cli", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


@cache
def modules() -> dict[str, Path]:
    """Dotted name inside the package -> file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Absolute names of all that the file imports, inside functions and under TYPE_CHECKING too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names += (f"{node.module}.{alias.name}" for alias in node.names)
    return tuple(names)


def ours(path: Path) -> Iterator[str]:
    """The first part, inside the package, of each import from it."""
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "ps_elastic" and rest:
            yield rest.split(".")[0]


def of_the_law(name: str) -> bool:
    return name.split(".")[0] in LAW


def test_the_walk_sees_the_package() -> None:
    assert {"", "events", "ledger", "decide", "policies.base", "policies.synchronous"} <= set(modules())
    assert "events" in ours(modules()["ledger"])


@pytest.mark.parametrize("name", [name for name in modules() if name.split(".")[0] in RANK])
def test_nothing_imports_from_a_later_layer(name: str) -> None:
    rank = RANK[name.split(".")[0]]
    later = {other for other in ours(modules()[name]) if RANK.get(other, 0) > rank}
    assert not later, f"{name} imports {sorted(later)}"


@pytest.mark.parametrize("name", [name for name in modules() if of_the_law(name)])
def test_the_law_imports_the_standard_library_and_itself(name: str) -> None:
    path = modules()[name]
    assert set(ours(path)) <= set(LAW)
    packages = {imported.split(".")[0] for imported in imports(path)} - {"ps_elastic"}
    assert packages <= sys.stdlib_module_names, f"{name} imports {sorted(packages - sys.stdlib_module_names)}"


@pytest.mark.parametrize("name", modules(), ids=lambda name: name or "__init__")
def test_only_transport_imports_mpi4py(name: str) -> None:
    uses_mpi = any(imported.split(".")[0] == "mpi4py" for imported in imports(modules()[name]))
    assert not uses_mpi or name.split(".")[0] == "transport"


def test_the_law_is_loaded_without_numpy_torch_or_mpi() -> None:
    law = [f"ps_elastic.{name}" for name in modules() if of_the_law(name)]
    code = f"import sys, {', '.join(law)}; print(sorted({{'numpy', 'torch', 'mpi4py'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
