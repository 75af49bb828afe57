"""The buckets that are here of pushes that are not."""

from __future__ import annotations

from ps_elastic.errors import WireError
from ps_elastic.policies.events import PushId
from ps_elastic.transport.messages import PushMessage


class BucketAssembler:
    """Each bucket has a channel of its own, and any may be first."""

    def __init__(self) -> None:
        self._parts: dict[PushId, dict[int, PushMessage]] = {}

    def add(self, message: PushMessage) -> list[PushMessage]:
        """All buckets of the push in their order, the first with its numbers, if this one was lacking; else none.

        Raises WireError for a bucket that cannot be.
        """
        if message.buckets == 1:
            return [message]
        push = PushId(message.worker, message.step)
        parts = self._parts.setdefault(push, {})
        if message.bucket >= message.buckets or message.bucket in parts:
            raise WireError(
                f"worker {push.worker}, step {push.step}: got bucket {message.bucket} of {message.buckets}, "
                f"expected one that is not in {sorted(parts)}"
            )
        parts[message.bucket] = message
        if len(parts) < message.buckets:
            return []
        del self._parts[push]
        return [part for _, part in sorted(parts.items())]

    def forget(self, worker: int) -> None:
        """Nothing more will come of `worker`."""
        for push in [push for push in self._parts if push.worker == worker]:
            del self._parts[push]
