"""What a simulated run costs in time: how long a worker computes, how long a message travels, and who queues for what.

Every random number comes from a generator of its own for (seed, purpose, worker), so that what one worker draws does
not depend on the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from heapq import heapreplace
from itertools import count
from pathlib import Path
from random import Random

from ps_elastic.config.sections import Compute, Network
from ps_elastic.errors import ConfigError


def generator(seed: int, purpose: str, worker: int) -> Random:
    """The source of all random numbers that `worker` needs for `purpose`."""
    return Random(f"{seed}:{purpose}:{worker}")


class Durations:
    """Seconds that each push of workers 1..p takes to compute: every call of `of(worker)` gives the next.

    Raises ConfigError (key simulation.compute.trace) for a trace that cannot be used.
    """

    def __init__(self, settings: Compute, workers: int, seed: int) -> None:
        self._settings, self._seed = settings, seed
        self._series = _read_trace(settings.trace) if settings.trace is not None else []
        slow = round(settings.straggler_share * workers)
        self._slow = frozenset(generator(seed, "stragglers", 0).sample(range(1, workers + 1), slow))

    def of(self, worker: int) -> Callable[[], float]:
        s = self._settings
        scale = 1.0 / (s.speeds[(worker - 1) % len(s.speeds)] if s.speeds else 1.0)
        scale *= math.exp(-s.spread * generator(self._seed, "speed", worker).gauss(0.0, 1.0)) if s.spread else 1.0
        scale *= s.straggler_factor if worker in self._slow else 1.0
        draw = self._base(worker, scale, generator(self._seed, "compute", worker))
        if not s.straggler_chance:
            return draw
        chance, factor, late = s.straggler_chance, s.straggler_factor, generator(self._seed, "straggling", worker)
        return lambda: draw() * (factor if late.random() < chance else 1.0)

    def _base(self, worker: int, scale: float, random: Random) -> Callable[[], float]:
        s = self._settings
        if s.name == "exponential":
            mean_s, uniform, log = scale * s.mean_s, random.random, math.log
            return lambda: -mean_s * log(1.0 - uniform())
        if s.name == "pareto":  # of minimum 1 the mean is shape / (shape - 1)
            least = scale * s.mean_s * (s.shape - 1) / s.shape
            return lambda: least * random.paretovariate(s.shape)
        if s.name == "trace":
            series = self._series[(worker - 1) % len(self._series)]
            # Workers that share a series enter it at different places.
            numbers = count(random.randrange(len(series)) if worker > len(self._series) else 0)
            return lambda: scale * series[next(numbers) % len(series)]
        mean_s = scale * s.mean_s
        return lambda: mean_s


class Cores:
    """Cores that all workers share: who is ready first computes first, to its end."""

    def __init__(self, cores: int) -> None:
        self._free = [0.0] * cores  # a heap: when each is free again

    def take(self, now: float, duration: float) -> float:
        """When a computation begins that is ready now. Call in the order of `now`."""
        begins = max(now, self._free[0])
        heapreplace(self._free, begins + duration)
        return begins


class NetworkLinks:
    """When messages arrive. Each call is made in the order of its time; a link carries one message after another."""

    def __init__(self, settings: Network) -> None:
        own, shared = settings.bandwidth_bytes_per_s, settings.server_bandwidth_bytes_per_s
        self.unlimited = own is None and shared is None
        self.latency_s = settings.latency_s
        self._own, self._shared = 1 / own if own else 0.0, 1 / shared if shared else 0.0  # seconds a byte
        self._in_free = self._out_free = self._server_free = 0.0

    def up(self, now: float, nbytes: int) -> float:
        """When the server has what a worker sends now."""
        if self.unlimited:
            return now + self.latency_s
        self._in_free = max(self._in_free, now) + nbytes * self._shared
        return max(self._in_free, now + nbytes * self._own) + self.latency_s

    def down(self, now: float, nbytes: int) -> float:
        """When a worker has what the server sends now."""
        if self.unlimited:
            return now + self.latency_s
        self._out_free = max(self._out_free, now) + nbytes * self._shared
        return max(self._out_free, now + nbytes * self._own) + self.latency_s

    def serve(self, now: float, service_s: float) -> float:
        """When the server has dealt with what it got now; it does one thing after another."""
        self._server_free = max(self._server_free, now) + service_s
        return self._server_free


def typical_s(compute: Compute, network: Network, nbytes_up: int, nbytes_down: int) -> float:
    """About the time from a model sent to the push computed on it taken in, if nobody else were there."""
    series = _read_trace(compute.trace) if compute.trace is not None else [(compute.mean_s,)]
    mean_s = sum(map(sum, series)) / sum(map(len, series))
    slowest = mean_s * compute.straggler_factor / min(compute.speeds or (1.0,)) * math.exp(compute.spread)
    rates = (network.bandwidth_bytes_per_s, network.server_bandwidth_bytes_per_s)
    travel = sum((nbytes_up + nbytes_down) / rate for rate in rates if rate)
    return slowest + travel + 2 * network.latency_s + network.service_s


def _read_trace(path: str) -> list[tuple[float, ...]]:
    """The recorded compute times: a series for each worker of a run folder, or one for all from a file."""
    try:
        found = [series for series in _series_in(Path(path)) if series]
    except OSError as error:
        raise ConfigError(f"cannot read '{error.filename}': {error.strerror}", key="simulation.compute.trace") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"'{path}' is no trace: {error}", key="simulation.compute.trace") from None
    if not found or any(not 0 < time < math.inf for series in found for time in series):
        raise ConfigError(f"'{path}' has no times, or some that are not > 0", key="simulation.compute.trace")
    return found


def _series_in(path: Path) -> Iterator[tuple[float, ...]]:
    if not path.is_dir():
        yield tuple(float(line) for line in path.read_text(encoding="utf-8").split())
        return
    for file in sorted((path / "metrics").glob("rank-*.jsonl")):
        lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
        yield tuple(line["compute_s"] + line["encode_s"] for line in lines if line["event"] == "reply")
