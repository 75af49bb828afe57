"""Who may import whom: a table of rooms, no circle, a law that needs the standard library alone, one import of MPI."""

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
# room -> what it may import, late and for the type checker too: whole rooms, or files of one
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "plugins": {"errors"},
    "vectors": {"errors"},
    "policies": {"errors", "plugins"},
    "compressors": {"errors", "plugins", "vectors"},
    "tasks": {"errors", "plugins", "vectors"},
    "transport": {"errors", "vectors.memory"},
    "config": {"errors", "plugins", "policies"},
    "records": {"errors", "plugins", "config", "policies.events", "vectors.kernels"},
    "worker": {"errors", "plugins", "compressors", "tasks", "transport.messages", "vectors", "records.tracker"},
    "server": {
        "errors", "plugins", "compressors", "policies", "tasks", "vectors", "config.sections", "config.plugin",
        "records.tracker", "transport.messages", "transport.wire", "transport.waking", "transport.lock",
        "transport.doorbells", "transport.windows",
    },
    "cluster": {"errors", "plugins", "config", "records", "transport.waking", "vectors.kernels"},
}  # fmt: skip
MAY_IMPORT["runtime"] = set(MAY_IMPORT)
MAY_IMPORT["simulation"] = set(MAY_IMPORT)
MAY_IMPORT["analysis"] = set(MAY_IMPORT)
MAY_IMPORT["cli"] = set(MAY_IMPORT)
# what is loaded to read a record or to ask a rule, on a machine without torch
LAW = ("errors", "plugins", "policies", "records.reader", "analysis.replay.decisions", "analysis.replay.hindsight")


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


@cache
def ours(name: str) -> frozenset[str]:
    """The modules inside the package that module `name` imports; the package itself, for its version, is none."""
    found = set()
    for imported in imports(modules()[name]):
        package, _, rest = imported.partition(".")
        if package == "ps_elastic" and rest:
            found.add(rest if rest in modules() else rest.rpartition(".")[0])
    return frozenset(found - {""})


def room(name: str) -> str:
    return name.split(".")[0]


def is_within(name: str, rooms: set[str] | tuple[str, ...]) -> bool:
    """Whether the module is one of the rooms or files, or in one."""
    return any(name == one or name.startswith(f"{one}.") for one in rooms)


def circles() -> Iterator[list[str]]:
    """The sets of modules each of which imports, over however many others, every other one of its set."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> Iterator[list[str]]:
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in ours(name):
            if other not in number:
                yield from visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], number[other])
        if low[name] == number[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                yield stack[at:]
            del stack[at:]

    for name in modules():
        if name not in number:
            yield from visit(name)


def test_the_walk_sees_the_package() -> None:
    assert {"", "policies.events", "policies.decide", "policies.rules.synchronous", "cli"} <= set(modules())
    assert "policies.events" in ours("policies.ledger")
    assert {room(name) for name in modules()} - {"", "__main__"} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", [name for name in modules() if name not in ("", "__main__")])
def test_a_room_imports_what_the_table_allows(name: str) -> None:
    allowed = MAY_IMPORT[room(name)] | {room(name)}
    others = sorted(other for other in ours(name) if not is_within(other, allowed))
    assert not others, f"{name} imports {others}"


def test_no_files_import_each_other_in_a_circle() -> None:
    assert list(circles()) == []


def test_no_rooms_import_each_other_in_a_circle() -> None:
    order = list(MAY_IMPORT)
    for name, allowed in MAY_IMPORT.items():
        above = {room(other) for other in allowed}
        assert above <= set(order[: order.index(name)]), f"{name} may import what is below it"


@pytest.mark.parametrize("name", [name for name in modules() if is_within(name, LAW)])
def test_the_law_imports_the_standard_library_and_itself(name: str) -> None:
    packages = {imported.split(".")[0] for imported in imports(modules()[name])} - {"ps_elastic"}
    assert packages <= sys.stdlib_module_names, f"{name} imports {sorted(packages - sys.stdlib_module_names)}"


@pytest.mark.parametrize("name", modules(), ids=lambda name: name or "__init__")
def test_mpi4py_is_imported_in_one_place_and_in_the_program_that_pings(name: str) -> None:
    uses_mpi = any(imported.split(".")[0] == "mpi4py" for imported in imports(modules()[name]))
    assert not uses_mpi or name in ("transport.mpi", "transport.ping")


def test_the_law_is_loaded_without_numpy_torch_or_mpi() -> None:
    law = [f"ps_elastic.{name}" for name in modules() if is_within(name, LAW)]
    code = f"import sys, {', '.join(law)}; print(sorted({{'numpy', 'torch', 'mpi4py'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
