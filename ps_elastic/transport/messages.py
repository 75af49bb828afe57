"""What travels between the server and the workers: four kinds of message, as plain tuples.

Arrays in a message are not copied: they are memory of the sender or of the transport's receive area. A push's
arrays stay valid until its worker gets a reply; a reply's model until the server changes its own.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

MOST_SETTLED = 1024  # outcomes told in one reply; the rest come with the next
OUTCOMES = ("held", "used", "dropped")  # by their code on the wire


class PushMessage(NamedTuple):
    """One bucket of a push. The header's numbers belong to the whole push and stand in its bucket 0, the last sent.

    For a layerwise policy they belong to the bucket, but for samples and loss. No arrays: the worker was cut off before
    it came to this bucket.
    """

    worker: int
    step: int
    base: int
    arrays: tuple[Any, ...]  # what the compressor made of the bucket, contiguous 1-D numpy arrays
    bucket: int = 0
    buckets: int = 1
    samples: int = 0
    loss: float = math.nan
    norm: float = 0.0
    payload_norm: float = 0.0
    residual_norm: float = 0.0
    waited_s: float = 0.0  # by the worker for replies, since the run began
    statistics: Any = None  # running statistics of BatchNorm, (s,) float32, in bucket 0; None without any
    ahead: int = 0  # earlier pushes of the worker that the reply which it was computed on did not answer


class Settled(NamedTuple):
    """The outcome of an earlier push, told late; "held" if it has none yet."""

    step: int
    outcome: str
    discrepancy: float
    bucket: int = 0  # of a layerwise policy


class Layer(NamedTuple):
    """What a reply says of one bucket to a worker of a layerwise policy."""

    version: int  # of this part of the model
    outcome: str = "held"  # of this part of the push answered; nothing where it was empty
    weight: float = 0.0


class Reply(NamedTuple):
    """The answer to a push or an ask: what became of it, and the model to continue with (None: stop)."""

    worker: int
    step: int  # answered; 0 for the first reply of a run
    version: int  # of `model`
    model: Any  # (size,) float32 numpy array, or None: the run is over
    outcome: str = "held"
    discrepancy: float = math.nan  # of the push answered, nan where not known
    alpha: float = 0.0  # step size that the server would use now
    weight: float = 0.0  # what the push answered was multiplied by: alpha x share x weight, of an update share x weight
    settled: tuple[Settled, ...] = ()  # with `update.pipeline` also those still "held": not in `model` yet
    layers: tuple[Layer, ...] = ()  # one for each bucket if the policy is layerwise: `version` is the least of theirs
    rate: float = 0.0  # what a worker multiplies its own pushes by that `model` lacks, or that it writes itself


class Ask(NamedTuple):
    """The worker waits and has heard nothing since `step`."""

    worker: int
    step: int


class Farewell(NamedTuple):
    """The last message of a worker: it stops, with the text of what went wrong and an exit code, or "" and 0."""

    worker: int
    step: int
    text: str = ""
    code: int = 0


Message = PushMessage | Reply | Ask | Farewell
