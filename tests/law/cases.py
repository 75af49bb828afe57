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
    "message_passing": [{"delay": 1}],
}
# Settings of rules that `pipelines`, each with how many pushes may be unanswered.
AHEAD: dict[str, list[tuple[int, dict[str, object]]]] = {
    "message_passing": [(1, {"delay": 2}), (2, {"delay": 3}), (1, {})],
    "HoldsAhead": [(1, {}), (2, {"k": 3})],
}


class Ahead:
    """Makes a rule whose workers may leave `pipeline` pushes unanswered."""

    def __init__(self, cls: type[Policy], pipeline: int, **settings: object) -> None:
        self.cls, self.pipeline, self.settings = cls, pipeline, settings

    def __call__(self) -> Policy:
        return self.cls(**self.settings)


def pipeline_of(make: Make) -> int:
    return make.pipeline if isinstance(make, Ahead) else 0


def cases() -> Iterator[tuple[str, Make]]:
    """(name with settings, maker of a fresh rule) of each case."""
    for name, cls in [*policies.items(), *TEST_RULES.items()]:
        yield name, cls
        for settings in VARIANTS.get(name, []):
            yield f"{name}:{_text(settings)}", partial(cls, **settings)
        if cls.pipelines:
            for pipeline, settings in AHEAD.get(name, [(1, {}), (2, {})]):
                yield f"{name}+{pipeline}:{_text(settings)}".rstrip(":"), Ahead(cls, pipeline, **settings)


def _text(settings: dict[str, object]) -> str:
    return ":".join(f"{key}={value}" for key, value in settings.items())


CASES = dict(cases())
