"""To try a policy without MPI and without a model: tell it what happens, and look at what it orders."""

from __future__ import annotations

from ps_elastic.policies.base import Policy
from ps_elastic.policies.decide import decide
from ps_elastic.policies.events import Action, Applied, Event, Measure, Measured, Step
from ps_elastic.policies.ledger import Ledger


def tell(policy: Policy, ledger: Ledger, event: Event, now: float = 0.0) -> list[Action]:
    """The actions that `policy` orders when `event` happens, `now` seconds after the start of the run.

    Each Step is made at once: the version goes up by one, and the model does not move. Each Measure is answered with a
    distance of 0. The first event of a run is Applied(0). Raises PolicyError if an action breaks an invariant.
    """
    actions: list[Action] = []
    for action, _ in decide(policy, ledger, event, now=now):
        if action is not None:
            actions.append(action)
        if isinstance(action, Step):
            decide(policy, ledger, Applied(ledger.version + 1), now=now)
        elif isinstance(action, Measure):
            for push in action.pushes:
                decide(policy, ledger, Measured(push, 0.0), now=now)
    return actions
