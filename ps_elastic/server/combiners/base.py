"""What a combiner is: it adds the payloads of one bucket into one vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from ps_elastic.compressors.base import Compressor, Payload
from ps_elastic.config.plugin import from_line
from ps_elastic.errors import PolicyError
from ps_elastic.plugins import Checked, Registry

if TYPE_CHECKING:
    from torch import Tensor


class Part(NamedTuple):
    """One term of a Step, of one bucket (n,): a payload, or a vector, or neither (the zero vector)."""

    payload: Payload | None
    dense: Tensor | None
    weight: float
    drift: Callable[[], Tensor]  # x - v of the worker's copy v behind the push, (n,), the caller's until the next call

    def accumulate(self, compressor: Compressor, out: Tensor, weight: float) -> None:
        """out (n,) += weight * what this part stands for."""
        if self.payload is not None:
            compressor.accumulate(self.payload, out, weight)
        elif self.dense is not None:
            out.add_(self.dense, alpha=weight)

    def cut(self, compressor: Compressor, stops: Sequence[int]) -> list[Part]:
        """Its entries [0, stops[0]), [stops[0], stops[1]) ..., without the drift; the last stop is n."""
        if self.payload is not None:
            return [Part(piece, None, self.weight, no_drift) for piece in compressor.cut(self.payload, stops)]
        if self.dense is not None:
            return [Part(None, self.dense[i:j], self.weight, no_drift) for i, j in pairwise((0, *stops))]
        return [self] * len(stops)


def no_drift() -> Tensor:
    raise PolicyError("a combiner needs the worker's copy behind a term that has none")


class Combiner(Checked, ABC):
    """A dataclass; a Step names it in the one-line form (`delay_compensated:scale=0.04`).

    There is one for each name and bucket, so that a method may keep state (a running mean) in plain attributes. One
    that keeps none, and whose entry j needs the entries j of the payloads alone and no drift, may say so by
    `elementwise`: it is then called for parts of a bucket, as the optimizer goes over the model.
    """

    elementwise: ClassVar[bool] = False

    @abstractmethod
    def combine(self, compressor: Compressor, parts: Sequence[Part], out: Tensor) -> None:
        """Fill out (n,) from the parts, in the order given, in float32."""

    def alone(self, compressor: Compressor, part: Part, numel: int) -> Tensor | None:
        """What `combine` makes of one part (numel,), where that is the memory of its payload; it is only read."""
        return None

    def quotient(self, compressor: Compressor, parts: Sequence[Part], out: Tensor) -> tuple[Tensor, float]:
        """What `combine` makes, as (vector (n,), divisor), where that saves a pass over it.

        The vector is `out`, or with the divisor 1 also the memory of a payload.
        """
        self.combine(compressor, parts, out)
        return out, 1.0


combiners: Registry[Combiner] = Registry("combiner", "ps_elastic.server.combiners")


def make_combiner(text: str) -> Combiner:
    """The combiner that a Step names. Raises ConfigError for an unknown name or setting."""
    made: Combiner = from_line("combiner", text)
    return made
