"""What a combiner is: it adds the payloads of one bucket into one vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ps_elastic.compressors.base import Compressor, Payload
from ps_elastic.layers import read_yaml
from ps_elastic.plugins import resolve
from ps_elastic.registry import Registry, parse_one_line

if TYPE_CHECKING:
    from torch import Tensor


class Part(NamedTuple):
    """One term of a Step, of one bucket (n,): a payload, or a vector, or neither (the zero vector)."""

    payload: Payload | None
    dense: Tensor | None
    weight: float
    drift: Callable[[], Tensor]  # x - v of the view the push was computed on, (n,), the caller's until the next call

    def accumulate(self, compressor: Compressor, out: Tensor, weight: float) -> None:
        """out (n,) += weight * what this part stands for."""
        if self.payload is not None:
            compressor.accumulate(self.payload, out, weight)
        elif self.dense is not None:
            out.add_(self.dense, alpha=weight)


class Combiner(ABC):
    """A dataclass; a Step names it in the one-line form (`delay_compensated:scale=0.04`).

    There is one for each name and bucket, so that a method may keep state (a running mean) in plain attributes.
    """

    @abstractmethod
    def combine(self, compressor: Compressor, parts: Sequence[Part], out: Tensor) -> None:
        """Fill out (n,) from the parts, in the order given, in float32."""


combiners: Registry[Combiner] = Registry("combiner", "ps_elastic.combiners")


def make_combiner(text: str) -> Combiner:
    """The combiner that a Step names. Raises ConfigError for an unknown name or setting."""
    name, options = parse_one_line(text)
    plugin, problems = resolve("combiner", {"name": name, **{key: read_yaml(value) for key, value in options.items()}})
    if problems:
        raise problems[0]
    combiner: Combiner = plugin.build()
    return combiner
