"""What a comparison is asked to run: its cells, each checked before anything starts."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ps_elastic.errors import ConfigError
from ps_elastic.plugins import parse_one_line
from ps_elastic.policies import policies as registered

Resolve = Callable[[Sequence[str]], "dict[str, Any]"]  # overrides -> the resolved configuration; raises ConfigError


@dataclass(frozen=True)
class Cell:
    """One run: `folder` is its run directory relative to the comparison's, `digest` that of its configuration."""

    policy: str
    compressor: str
    seed: int
    folder: str
    overrides: tuple[str, ...]
    digest: str

    def __str__(self) -> str:
        return f"{self.policy}, {self.compressor}, seed {self.seed}"


@dataclass(frozen=True)
class Comparison:
    """All that was asked for, checked; the first policy with the first compressor is the baseline."""

    config_file: str
    config: dict[str, Any]  # resolved, as every cell has it but for its policy, compressor and seed
    workers: int
    policies: tuple[str, ...]
    compressors: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    discrepancy_of: dict[str, str]  # policy -> the model that its D is to: see `Policy.view_of`

    def identity(self) -> dict[str, Any]:
        """What two comparisons must have in common to share a folder, as it reads back from JSON."""
        names = ("config", "workers", "policies", "compressors", "seeds")
        identity: dict[str, Any] = json.loads(json.dumps({name: getattr(self, name) for name in names}))
        return identity


def split(option: str, text: str) -> tuple[str, ...]:
    """The one-line forms in a comma-separated list; raises ConfigError, since no value may hold a comma itself."""
    forms = tuple(part.strip() for part in text.split(","))
    for form in forms:
        if not re.fullmatch(r"[A-Za-z_][\w.]*(:[A-Za-z_]\w*)?", parse_one_line(form)[0]):
            problem = f"expected names as in a,b:key=value, got '{form}' in '{text}'"
            raise ConfigError(f"{problem}; a comma separates two names and cannot be part of a value", source=option)
    for form, count in Counter(forms).items():
        if count > 1:
            raise ConfigError(f"'{form}' is named {count} times", source=option)
    return forms


def plan(
    config_file: str,
    config: dict[str, Any],
    overrides: Sequence[str],
    resolve: Resolve,
    *,
    workers: int,
    policies: Sequence[str],
    compressors: Sequence[str],
    seeds: int,
) -> Comparison:
    """The comparison asked for, each cell's configuration checked. Raises ConfigError for the first that is wrong.

    config: the resolved configuration with `overrides`, which every cell's own policy, compressor and seed go over.
    Seeds vary slowest: what is finished when it is interrupted compares like with like, and a machine that gets
    slower in the meantime slows all rows alike. Cell seeds are the configuration's seed + 0..seeds-1.
    """
    if workers < 1 or seeds < 1:
        raise ConfigError(f"got {workers} workers and {seeds} seeds, expected at least one of each")
    for override in overrides:
        section = re.split(r"[.=]", override, maxsplit=1)[0]
        if section in ("policy", "compressor"):
            raise ConfigError("this is what a comparison varies: use --policies and --compressors", source=override)
    first = int(config["seed"])
    policy_folders, compressor_folders = folder_names(policies), folder_names(compressors)
    cells = []
    for seed in range(first, first + seeds):
        for policy in policies:
            for compressor in compressors:
                folder = f"cells/{policy_folders[policy]}/{compressor_folders[compressor]}/seed-{seed}"
                own = (*overrides, f"policy={policy}", f"compressor={compressor}", f"seed={seed}")
                cells.append(Cell(policy, compressor, seed, folder, own, digest(resolve(own))))
    _refuse_twins(cells)
    of = {policy: _measured_to(resolve((*overrides, f"policy={policy}"))["policy"]) for policy in policies}
    numbers = tuple(range(first, first + seeds))
    return Comparison(config_file, config, workers, tuple(policies), tuple(compressors), numbers, tuple(cells), of)


def _measured_to(section: Mapping[str, Any]) -> str:
    settings = {key: value for key, value in section.items() if key != "name"}
    return registered.load(section["name"])(**settings).view_of


def _refuse_twins(cells: Sequence[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        twin = seen.setdefault(cell.digest, cell)
        if twin is not cell:
            raise ConfigError(f"'{twin}' and '{cell}' are the same run: a setting one leaves out is the other's")


def folder_names(forms: Sequence[str]) -> dict[str, str]:
    """A folder name for each one-line form: `a:k=1` -> `a-k=1`; what would collide or be too long ends in a hash."""
    plain = {form: re.sub(r"[^\w.=+-]", "_", form.replace(":", "-")) for form in forms}
    taken = Counter(name.casefold() for name in plain.values())
    return {
        form: name if taken[name.casefold()] == 1 and len(name) <= 100 else f"{name[:80]}-{digest(form)[:8]}"
        for form, name in plain.items()
    }


def digest(document: Any) -> str:
    """SHA-256 of a JSON document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
