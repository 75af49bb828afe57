"""A run, described: the configuration as one frozen dataclass, and how it is written down again."""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

from ruamel.yaml import YAML

from ps_elastic.config import sections
from ps_elastic.config.faults import Faults
from ps_elastic.config.plugin import Plugin
from ps_elastic.plugins import Range, Threads, expect, plain

Buckets = Annotated[Literal["whole", "layer", "auto"] | int, Range("a number of bytes >= 4, or a name")]
ServerThreads = Annotated[Literal["auto"] | int, Range("a number of threads >= 1, or auto")]


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes; made by `load`."""

    name: str  # name of the run's folder and of the SLURM job; null: the name of the task
    task: Plugin  # the model, its data and its loss
    policy: Plugin  # when the server uses a gradient, and when a worker may continue
    update: sections.Update
    compressor: sections.Compressor
    downlink: Plugin  # compressor of the model broadcast, from the server to a worker; only identity is supported
    optimizer: sections.Optimizer
    schedule: sections.Schedule
    train: sections.Train
    checkpoint: sections.Checkpoint
    survive: sections.Survive
    faults: Faults
    simulation: sections.Simulation
    tracker: sections.Tracker
    # how ranks of one host exchange arrays. shared: shared memory; messages: MPI messages; auto: shared where it can be
    # had
    transport: Literal["auto", "messages", "shared"] = "auto"
    # exact: a worker's copy of the model is one version. torn: inconsistent reads (Hogwild style), the model is read
    # while it is written
    views: Literal["exact", "torn"] = "exact"
    # who changes the model. workers, with views: torn: each worker adds its own updates to it
    writers: Literal["server", "workers"] = "server"
    # for writers: workers. lock: one after another; plain: without lock (lossy), at the same time
    writing: Literal["lock", "plain"] = "lock"
    # pieces that a gradient travels in. whole: one; layer: one for each tensor; a number: bytes of each; auto: measured
    # at the start. Smaller: they leave sooner, and each costs a message
    buckets: Buckets = "whole"
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where workers compute. auto: on a GPU if PyTorch finds one
    threads: Threads = 1  # threads of each worker; more: quicker gradients, as long as cores are free
    server_threads: ServerThreads = 1  # threads of the server. auto: the cores that the workers leave of its host
    # seed of the model and of all random draws; another one repeats the experiment
    seed: Annotated[int, Range("a whole number >= 0 and < 2^63")] = 0

    def __post_init__(self) -> None:
        named = "letters, digits, '.', '_' and '-', the first a letter, a digit or '_'"
        expect(bool(re.fullmatch(r"\w[\w.-]*", self.name)), self, "name", named)

    @property
    def most_threads(self) -> int:
        """Threads of the rank that is given the most; `auto` takes only what is left."""
        return max(self.threads, 1 if isinstance(self.server_threads, str) else self.server_threads)

    @property
    def computes_on_cpu(self) -> bool:
        """Whether workers of this host compute on its CPU."""
        if self.device != "auto":
            return self.device == "cpu"
        import torch  # which takes a second, and is asked only here

        return not torch.cuda.is_available()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every default stated; `load` gives the same Config back."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    def to_yaml(self) -> str:
        """`to_dict` as YAML."""
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.width = 10_000
        text = io.StringIO()
        yaml.dump(self.to_dict(), text)
        return text.getvalue()

    def settled(self, buckets: str | int = "whole") -> Config:
        """This configuration, with `buckets: auto` as it was chosen; without ranks to measure on it is whole."""
        return replace(self, buckets=buckets) if self.buckets == "auto" else self  # type: ignore[arg-type]

    def digest(self) -> bytes:
        """The SHA-256 of `to_dict`, 32 bytes: equal on ranks that were given the same configuration."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":")).encode()).digest()


def _plain(value: Any) -> Any:
    if isinstance(value, Plugin | Faults):
        return value.to_dict()
    return sections.to_dict(value) if hasattr(type(value), "__dataclass_fields__") else plain(value)
