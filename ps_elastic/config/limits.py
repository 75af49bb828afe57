"""What the configuration can say and this version cannot do: refused by name, never ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ps_elastic.errors import ConfigError
from ps_elastic.values import show

if TYPE_CHECKING:
    from ps_elastic.config.load import Config


def unsupported(config: Config, simulated: bool = False) -> list[ConfigError]:
    """Every value of `config` that this version cannot carry out, with what to write instead."""
    checkpoint, survive = config.checkpoint, config.survive
    cases = [
        (
            config.downlink.name != "identity",
            "downlink",
            config.downlink.name,
            "models travel whole; expected identity",
        ),
        (
            bool(config.faults) and not simulated,
            "faults",
            config.faults.to_dict(),
            "faults happen in `ps-elastic simulate` only; expected {}",
        ),
        (
            checkpoint.every_samples is not None,
            "checkpoint.every_samples",
            checkpoint.every_samples,
            "no checkpoints are written yet; expected null",
        ),
        (survive.respawn > 0, "survive.respawn", survive.respawn, "lost workers are not replaced yet; expected 0"),
    ]
    return [
        ConfigError(f"got {show(got)}, which this version does not support: {reason}", key=key)
        for applies, key, got, reason in cases
        if applies
    ]
