"""What a benchmark is: a dataclass that measures, and rows that say what was compared with what."""

from __future__ import annotations

import operator
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

from ps_elastic.config.sources import read_yaml
from ps_elastic.config.values import make
from ps_elastic.errors import Interrupted, describe
from ps_elastic.plugins import Checked, Range, Registry, parse_one_line
from ps_elastic.records.writer import environment

# Ranges of settings that several benchmarks have
Several = Annotated[int, Range("a number of workers >= 2")]
Ranks = Annotated[int, Range("a number of ranks >= 2")]
Turns = Annotated[int, Range("a number of turns >= 1")]
Runs = Annotated[int, Range("a number of runs >= 1")]
Repeats = Annotated[int, Range("a number of repeats >= 1")]


class Row(NamedTuple):
    """One measurement beside its baseline; ratio = ours / baseline. See `row` for the target."""

    case: str
    ours: float
    baseline: float | None
    baseline_name: str
    unit: str
    ratio: float | None
    target: str | None
    met: bool | None


_RELATIONS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


def row(
    case: str, ours: float, unit: str, baseline: float | None, baseline_name: str, target: str | None = None
) -> Row:
    """A row, measured against its target: of `ours`, as in ">= 5000", or of the ratio, as in "ratio <= 1.6"."""
    ratio = ours / baseline if baseline else None
    met = None
    if target is not None:
        *of, relation, value = target.split()
        measured = ratio if of == ["ratio"] else ours
        met = measured is not None and _RELATIONS[relation](measured, float(value))
    return Row(case, ours, baseline, baseline_name, unit, ratio, target, met)


class Benchmark(Checked, ABC):
    """Its init fields are its settings, as in `simulate:workers=1024`."""

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Measure, and yield each row as soon as it is known."""


benchmarks: Registry[Benchmark] = Registry("benchmark", "ps_elastic.analysis.bench")


def run_benchmark(text: str, on_row: Callable[[Row], None] = lambda row: None) -> dict[str, Any]:
    """Run the benchmark named in the one-line form; return {bench, env, rows}. Raises ConfigError."""
    found = []
    for measured in _make(text).rows():
        on_row(measured)
        found.append(measured._asdict())
    return {"bench": text, "env": environment(), "rows": found}


def run_all(on_row: Callable[[Row], None] = lambda row: None) -> dict[str, Any]:
    """Run every registered benchmark as it is by default; return {bench: all, env, rows, took_s, failed}.

    Each case begins with its benchmark's name. took_s: by name. failed: name -> why; the others are run all the same.
    """
    found: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    took_s: dict[str, float] = {}
    for name, _ in benchmarks.items():
        started = time.perf_counter()
        try:
            for measured in _make(name).rows():
                named = measured._replace(case=f"{name}: {measured.case}")
                on_row(named)
                found.append(named._asdict())
        except Interrupted:
            raise
        except Exception as error:
            failed[name] = describe(error)
        took_s[name] = time.perf_counter() - started
    return {"bench": "all", "env": environment(), "rows": found, "took_s": took_s, "failed": failed}


def _make(text: str) -> Benchmark:
    name, options = parse_one_line(text)
    cls = benchmarks.load(name)
    bench: Benchmark
    bench, _, problems = make(cls, {key: read_yaml(value) for key, value in options.items()}, noun="setting")
    if problems:
        raise problems[0]
    return bench
