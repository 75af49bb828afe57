"""Who may go on: the invariants, and the policies that decide within them, one a file in `rules`.

A policy sees metadata and the ledger, never a tensor, a clock or a communicator, and yields actions. Imports errors,
plugins and the standard library alone. Begin with `base`, what a policy is, and `events`, what it may learn and order;
`decide` is the one door to the `ledger`. What an author of a policy needs is handed on here.
"""

from __future__ import annotations

from ps_elastic.policies.base import Policy, policies
from ps_elastic.policies.decide import decide
from ps_elastic.policies.events import (
    ZERO,
    Action,
    Applied,
    Asked,
    Done,
    Drop,
    Event,
    Joined,
    Left,
    Measure,
    Measured,
    Push,
    PushId,
    Release,
    Step,
    Term,
    Wake,
    Woke,
)
from ps_elastic.policies.ledger import Ledger, View
from ps_elastic.policies.theory import Bound, Facts, exact, no_bound

__all__ = [
    "ZERO", "Action", "Applied", "Asked", "Bound", "Done", "Drop", "Event", "Facts", "Joined", "Ledger", "Left",
    "Measure", "Measured", "Policy", "Push", "PushId", "Release", "Step", "Term", "View", "Wake", "Woke", "decide",
    "exact", "no_bound", "policies",
]  # fmt: skip
