"""What the user sees while a run goes on: a live table on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live as RichLive
from rich.table import Table

from ps_elastic.config.schema import Config
from ps_elastic.server.server import Server

_REFRESH_S, _LINE_S = 0.5, 5.0


class _Console(Console):
    """Falls silent where nobody listens any more, as when mpirun was killed: the run's own end is what matters then."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Live:
    """A context manager; call `update` often, it shows something now and then."""

    def __init__(self, server: Server, config: Config, *, quiet: bool = False) -> None:
        self._server, self._config, self._quiet = server, config, quiet
        self._console = _Console(stderr=True)  # TTY_COMPATIBLE, which `launch` sets, says whose terminal it ends up on
        self._live = RichLive(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._title = f"{config.name}: {config.policy.text()}, {config.compressor.text()}"
        self._next = 0.0
        self._last = (time.monotonic(), 0)

    def __enter__(self) -> Live:
        if self._live and not self._quiet:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.show()
        if self._live and not self._quiet:
            self._live.stop()

    def update(self, now: float = 0.0) -> None:
        """Show how the run stands, if it is time to."""
        if not self._quiet and time.monotonic() >= self._next:
            self.show()

    def say(self, text: str) -> None:
        """Print one line that stays."""
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self) -> None:
        """Show how the run stands."""
        if self._quiet:
            return
        cells = dict(self._cells())
        if self._live:
            table = Table(*cells, title=self._title)
            table.add_row(*cells.values())
            self._live.update(table, refresh=True)
        else:
            self.say("  ".join(f"{name} {value}" for name, value in cells.items()))
        self._next = time.monotonic() + (_REFRESH_S if self._live else _LINE_S)

    def _cells(self) -> Iterator[tuple[str, str]]:
        server, totals, at = self._server, self._server.totals, time.monotonic()
        then, samples = self._last
        self._last = (at, totals.samples)
        staleness, discrepancy = totals.staleness.as_dict("mean"), totals.discrepancy.as_dict("rms")
        yield "samples", f"{totals.samples}/{self._config.train.samples}"
        told = None if math.isnan(totals.loss) else totals.loss  # of the last push, if that tells one
        yield "loss", _number(totals.metrics.get("loss", told))
        yield "accuracy", _number(totals.metrics.get("accuracy"))
        yield "samples/s", f"{(totals.samples - samples) / max(1e-9, at - then):.0f}"
        yield "staleness", _number(staleness["mean"])
        yield "D rms", _number(discrepancy["rms"])
        yield "workers waiting", ",".join(map(str, server.ledger.waiting)) or "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
