"""Workers that run on while pushes of theirs are unanswered: what each may be computing on, and what that is made of.

With `pipeline: k` a worker computes push s as long as at most k of its earlier pushes are unanswered. Its view is the
model of the last reply it took in, less what it re-applies to it: every push of its own that this model does not
contain. A reply is named by the last push r that was here when it was given; missing in its model are those after r,
and those up to r that it calls `flying`. A push says by `ahead` = s - 1 - r which reply it was computed on. Channels
lose nothing and keep the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ps_elastic.errors import WireError
from ps_elastic.policies.events import Push, PushId


class Given(NamedTuple):
    """A reply to a worker: its model, and the pushes that were here by then and are not in it yet."""

    version: int
    flying: tuple[PushId, ...]
    travelled: float  # of the ledger when it was given
    sent_at: float  # seconds


class Course:
    """One worker's replies, from the one that its last push named on, and its pushes that its views may contain."""

    __slots__ = ("flying", "given", "told")

    def __init__(self, told: int = 0) -> None:
        self.told = told  # the last push that a reply answered
        self.given: dict[int, Given] = {}  # by what `told` was then, oldest first
        self.flying: dict[PushId, None] = {}  # in the order pushed

    def copy(self) -> Course:
        new = Course(self.told)
        new.given, new.flying = self.given.copy(), self.flying.copy()
        return new

    def named(self, push: Push, pipeline: int) -> int:
        """The reply that `push` was computed on. Raises WireError where it cannot have been."""
        reply = push.id.step - 1 - push.ahead
        given = self.given.get(reply)
        if given is None or not 0 <= push.ahead <= pipeline:
            raise WireError(
                f"push {tuple(push.id)} says that {push.ahead} pushes of its worker were not answered; expected at "
                f"most {pipeline}, after one of the replies to {list(self.given)}"
            )
        if push.base != given.version:
            raise WireError(f"push {tuple(push.id)} says base {push.base}, but its view was version {given.version}")
        return reply

    def leave_behind(self, reply: int) -> Iterator[PushId]:
        """No view will be older than `reply`: the pushes that none will contain any more."""
        for older in [step for step in self.given if step < reply]:
            del self.given[older]
        missing = self.given[reply].flying
        for push in [push for push in self.flying if push.step <= reply and push not in missing]:
            del self.flying[push]
            yield push
