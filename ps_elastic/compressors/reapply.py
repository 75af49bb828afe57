"""What a worker that runs ahead does to a model, and the server after it: one function, so that bits are the same."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ps_elastic.compressors import Compressor, Payload
from ps_elastic.vectors.layout import Bucket


def reapply(
    x: Tensor, payloads: Sequence[Payload], buckets: Sequence[Bucket], compressors: Sequence[Compressor], rate: float
) -> None:
    """x (d,) -= rate x what one push, a payload for each bucket, decodes to."""
    for payload, bucket, compressor in zip(payloads, buckets, compressors, strict=True):
        compressor.accumulate(payload, x[bucket.start : bucket.stop], -rate)
