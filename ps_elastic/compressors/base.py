"""What a compressor is: encode a vector into a few arrays, decode them elsewhere."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ps_elastic.plugins import Checked, Registry

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ps_elastic.vectors.layout import Bucket

Payload = tuple["Tensor", ...]


class Compressor(Checked, ABC):
    """How a gradient is made smaller. Derive a `@dataclass` from it; its init fields are its YAML keys.

    There is one working copy for each bucket and side (worker, server), so that a method may keep state (a
    warm-started basis, a running scale) in plain attributes.

    A payload is at most three contiguous one-dimensional tensors on the CPU. Their number and types do not change.
    Shapes: n entries of a bucket, float32.

    - `biased`: class attribute: whether E[decode(encode(v))] != v. Error feedback is then on unless switched off.
    - `cuts`: class attribute: whether there is a method `cut`; else the server decodes a whole bucket at once.
    """

    biased: ClassVar[bool] = True
    cuts: ClassVar[bool] = False

    def fresh(self, numel: int, generator: Generator) -> Compressor:
        """A working copy for a bucket of `numel` entries. Random methods draw from `generator` only."""
        return copy.copy(self)

    @abstractmethod
    def encode(self, vector: Tensor) -> Payload:
        """What to send for `vector` (n,), finite; it must not be changed. The payload may share its memory."""

    @abstractmethod
    def accumulate(self, payload: Payload, out: Tensor, weight: float = 1.0) -> None:
        """out (n,) += weight x decoded payload, in place; float32."""

    def decode(self, payload: Payload, numel: int) -> Tensor:
        """The vector (numel,) that `payload` stands for; it may share the payload's memory."""
        import torch

        out = torch.zeros(numel)
        self.accumulate(payload, out)
        return out

    def cut(self, payload: Payload, stops: Sequence[int]) -> list[Payload]:
        """Payloads of the entries [0, stops[0]), [stops[0], stops[1]) ..., counted anew in each; the last stop is n."""
        raise NotImplementedError

    @abstractmethod
    def check(self, payload: Payload, numel: int) -> None:
        """Raise WireError unless `payload` decodes safely to (numel,): number of arrays, types, lengths, indices."""

    @abstractmethod
    def max_nbytes(self, numel: int) -> int:
        """Upper bound on the bytes of a payload for a bucket of `numel` entries: buffers have this size."""

    def payload_norm(self, payload: Payload, numel: int) -> float:
        """The 2-norm of the decoded payload; override it if there is a shorter way."""
        import torch

        return float(
            torch.linalg.vector_norm(self.decode(payload, numel))
        )  # Tensor.norm takes twice as long to get there

    def gamma(self, numel: int) -> float | None:
        """gamma in [0, 1): ||v - decode(encode(v))||^2 <= gamma ||v||^2, the energy lost; `None`: no such bound."""
        return None


compressors: Registry[Compressor] = Registry("compressor", "ps_elastic.compressors")


def reapply(
    x: Tensor, payloads: Sequence[Payload], buckets: Sequence[Bucket], compressors: Sequence[Compressor], rate: float
) -> None:
    """x (d,) -= rate x what one push, a payload for each bucket, decodes to."""
    for payload, bucket, compressor in zip(payloads, buckets, compressors, strict=True):
        compressor.accumulate(payload, x[bucket.start : bucket.stop], -rate)
