"""The rules that every law is checked on: all that are registered, in several settings, and the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from ps_elastic.policies import Policy, policies
from tests.law.rules import TEST_RULES

Make = Callable[[], Policy]

# Settings worth a walk of their own; a rule that is not named here is checked with its defaults.
VARIANTS: dict[str, list[dict[str, object]]] = {
    "stale_synchronous": [{"bound": 0}, {"bound": 1}],
    "first_k": [{"k": 1}, {"k": 3}],
    "asgrad": [{"wait": 2, "assignment": "random"}, {"wait": 2, "assignment": "pure"}],
    "deadline": [{"missing": "keep"}, {"missing": "substitute"}],
    "variance_bounded": [{"substitute": "mean"}, {"quorum": 0.3}],
    "norm_bounded": [{"beta": 0.3}],
    "elastic_bound": [{"bound": 0.0}, {"bound": "inf"}, {"bound": 3.0, "distance": "path"}],
    "consensus": [{"quorum": 0.5}],
    "delay_bounded": [{"bound": 0}],
    "value_bounded": [{"threshold": 1.0}],
    "salf": [{"empty": "estimated"}, {"empty": (0.75, 0.5, 0.0)}],
    "salf_fill": [{"deadline_s": 0.5}],
    "Deadline": [{"repay": False}],
    "MeanStandsIn": [{"repay": False}],
    "WithinBudget": [{"budget": 0.1}, {"budget": 5.0}],
    "ReleaseFirst": [{"k": 3}, {"own": 0.5}],
}


def cases() -> Iterator[tuple[str, Make]]:
    """(name with settings, maker of a fresh rule) of each case."""
    for name, cls in [*policies.items(), *TEST_RULES.items()]:
        yield name, cls
        for settings in VARIANTS.get(name, []):
            yield f"{name}:" + ":".join(f"{key}={value}" for key, value in settings.items()), partial(cls, **settings)


CASES = dict(cases())
