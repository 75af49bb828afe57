"""What a policy may learn and what it may order: metadata in, actions out. No tensors, no clock.

An *event* is something that happened (a push arrived, the optimizer was applied); an *action* is what the policy
orders (make a step, release workers). Both are small immutable tuples with one text form, so that a run's log can be
compared byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple


class PushId(NamedTuple):
    """Names the `step`-th gradient of `worker`, both counted from 1.

    (0, 0) is the zero vector; (0, v) is the combined payload of the Step that made version v.
    """

    worker: int
    step: int


ZERO = PushId(0, 0)


class Push(NamedTuple):
    """The metadata of a gradient that arrived. Norms are 2-norms in the push's own units, finite and >= 0.

    - `id`, `base`: which push it is; the version of the model that it was computed on
    - `norm`, `payload_norm`: of the gradient; of what was sent, decoded
    - `residual_norm`: of what error feedback keeps for the next push; 0 without it
    - `nbytes`: bytes of the payload, without its header
    - `units`: "gradient", "update" (a model difference, scaled already) or "model"
    - `ahead`: earlier pushes of its worker that its model was no answer to; 0 without `update.pipeline`
    """

    id: PushId
    base: int
    norm: float = 0.0
    payload_norm: float = 0.0
    residual_norm: float = 0.0
    nbytes: int = 0
    units: str = "gradient"
    ahead: int = 0


class ReplyId(NamedTuple):
    """The reply to `worker` that answered its pushes up to `told`. With three parts it never equals a PushId."""

    worker: int
    told: int
    what: str = "reply"


class Asked(NamedTuple):
    """A retry request: `worker` waits, and its last finished step is `step`. It is new, or a message was lost."""

    worker: int
    step: int


class Joined(NamedTuple):
    """A worker became a member; it does not wait until it asks. Its steps are numbered on from `step`."""

    worker: int
    step: int = 0  # of one that comes back, at least the last that it was given here


class Left(NamedTuple):
    """A worker is gone for good."""

    worker: int


class Woke(NamedTuple):
    """The time of the pending Wake has come."""


class Done(NamedTuple):
    """The sample budget or the target is reached: pushes that are here are discarded, and every worker stops."""


class Applied(NamedTuple):
    """The answer to a Step: the server's model is now `version`. The first event of a run is Applied(0).

    - `version`, `alpha`: number of server steps so far; step size of this one, learning rate x schedule
    - `moved`: step length / alpha, ||x_new - x_old|| / alpha as stored

    These are 0, 1 and 0 unless the policy has `uses_reach`; `Ledger.reach` puts them together:

    - `coast`: remaining momentum motion: how far the next step moves without a gradient, / alpha
    - `gain`: momentum gain: how far it moves for each unit of its gradient's norm, / alpha; 1 for plain SGD
    - `rounding`: 2^-24 ||x|| / alpha: how far float32 may move the model beyond that
    """

    version: int
    moved: float = 0.0
    alpha: float = 0.0
    coast: float = 0.0
    gain: float = 1.0
    rounding: float = 0.0


class Measured(NamedTuple):
    """The answer to a Measure: how far the server's model x is from the worker's copy v behind `push`.

    `distance` is ||x - v|| / (largest alpha since the copy was sent), in gradient units.
    """

    push: PushId
    distance: float


Event = Push | Asked | Joined | Left | Woke | Done | Applied | Measured


class Term(NamedTuple):
    """One payload of a Step.

    - `push`, `weight`: one of `ledger.held`, or whose payload is kept, or `ZERO`; its weight in the mean or sum
    - `stands_for`: the missing push, still under way, that it replaces as a placeholder gradient
    """

    push: PushId
    weight: float = 1.0
    stands_for: PushId | None = None


class Step(NamedTuple):
    """Combine the terms and apply them: one new version. The answer is an Applied.

    - `terms`: at least one; PolicyError if a push was used already and nothing keeps its payload
    - `share`: step scale, 0 < share <= 1, that multiplies the learning rate; 1/p makes p steps one synchronous step
    - `combine`: "mean" is (sum of weight x payload) / (sum of weights), and that sum is finite and > 0; "sum" leaves
      the division out, and that sum is finite; "delay_compensated" corrects stale gradients in a mean
    - `apply`: "step" (optimizer), "assign" (x becomes what was combined), "amend" (late gradient: `Ledger.amend`)
    """

    terms: tuple[Term, ...]
    share: float = 1.0
    combine: str = "mean"
    apply: str = "step"

    @classmethod
    def mean(cls, pushes: Iterable[PushId], share: float = 1.0) -> Step:
        """The plain mean of `pushes`, each with weight 1, in (worker, step) order whatever order they arrived in."""
        return cls(tuple(map(Term, sorted(pushes))), share)


class Drop(NamedTuple):
    """Discard this push of `ledger.held`, for a `reason` for the log; with error feedback its worker adds it back."""

    push: PushId
    reason: str


class Release(NamedTuple):
    """Send these waiting workers the model; each goes on with its next push.

    - `workers`: each must be in `ledger.waiting`, or compute with fewer than `Policy.jobs` jobs; else PolicyError
    - `own`: any finite number. A worker gets x + c own g: g is its own last push, decoded; c is what a gradient's
      unit did to x in the last step, -alpha for plain SGD. If not 0, the policy must have `own_views`
    """

    workers: tuple[int, ...]
    own: float = 0.0


class Wake(NamedTuple):
    """Call `on_wake` at the time `at`, in seconds since the start of the run; a later Wake replaces an earlier one."""

    at: float


class Measure(NamedTuple):
    """Ask how far the workers' copies behind these pushes under way are from the server's model (`needs_views`)."""

    pushes: tuple[PushId, ...]


Action = Step | Drop | Release | Wake | Measure


repeated = lru_cache(8, typed=True)(repr)  # of a number that comes again and again: a tenth of the time of repr

_NAMES = {cls.__name__.lower(): cls for cls in (Push, Asked, Joined, Left, Woke, Done, Applied, Measured)}


Told = tuple[Event, float, Sequence["Action | Applied | Measured"], str]
"""An event, its time in seconds, the actions that it gave with the answers to them, and what else its line says."""


def lines_of(told: Iterable[Told]) -> list[str]:
    """Lines of events.jsonl. Many are made together, so that caches are warm for all but the first."""
    told = list(told)
    events = event_texts([event for event, _, _, _ in told])
    actions = actions_texts([actions for _, _, actions, _ in told])
    return [
        f'{{{event}, "t_s": {now!r}, "rank": 0, "actions": [{acts}]{more}}}'
        for event, acts, (_, now, _, more) in zip(events, actions, told, strict=True)
    ]


def event_text(event: Event) -> str:
    """The event as the inside of a JSON object, without its braces; floats read back the same."""
    return event_texts([event])[0]


def event_texts(events: Iterable[Event]) -> list[str]:
    """The `event_text` of each."""
    texts: list[str] = []
    for event in events:
        if type(event) is not Push:
            texts.append(_rare_event_text(event))
            continue
        (worker, step), base, norm, payload_norm, residual_norm, nbytes, units, ahead = event
        if (total := norm + payload_norm + residual_norm) - total != 0:  # not finite, sooner than by a call
            texts.append(_rare_event_text(event))
            continue
        more = f', "ahead": {ahead}' if ahead else ""
        texts.append(
            f'"event": "push", "worker": {worker}, "step": {step}, "base": {base}, "norm": {norm!r}, '
            f'"payload_norm": {payload_norm!r}, "residual_norm": {residual_norm!r}, "nbytes": {nbytes}, '
            f'"units": "{units}"{more}'
        )
    return texts


def _rare_event_text(event: Event) -> str:
    fields = event._asdict()
    if type(event) is Push and not event.ahead:
        del fields["ahead"]
    if type(event) in (Push, Measured):
        worker, step = fields.pop("id" if type(event) is Push else "push")
        fields = {"worker": worker, "step": step, **fields}
    return json.dumps({"event": type(event).__name__.lower(), **fields})[1:-1]  # writes inf so that it reads back


def event_of(record: dict[str, Any]) -> Event:
    """The event that a line of events.jsonl, read back, tells of. Raises ValueError naming what is wrong."""
    name = record.get("event")
    cls = _NAMES.get(str(name))
    if cls is None:
        raise ValueError(f"unknown event {name!r}")
    values = dict(record)
    try:
        if cls in (Push, Measured):
            values["id" if cls is Push else "push"] = PushId(record["worker"], record["step"])
        return cls(**{field: values[field] for field in cls._fields if field != "ahead" or field in values})
    except KeyError as missing:
        raise ValueError(f"event {name!r} lacks {missing}") from None


def actions_text(actions: Iterable[Action | Applied | Measured]) -> str:
    """Actions, and the answers to them, as the items of a JSON list, each a list.

    A Step is `["step", [[worker, step, weight, stands_for], ...], share, combine, apply]`.
    """
    return actions_texts([actions])[0]


def actions_texts(of: Iterable[Iterable[Action | Applied | Measured]]) -> list[str]:
    """The `actions_text` of each."""
    found: list[str] = []
    for actions in of:
        texts = ""
        for action in actions:
            if type(action) is Step:
                terms, share, combine, apply = action
                uses = ""
                for (worker, step), weight, stands_for in terms:
                    uses += f", [{worker}, {step}, {weight!r}, {'null' if stands_for is None else list(stands_for)}]"
                texts += f', ["step", [{uses[2:]}], {repeated(share)}, "{combine}", "{apply}"]'
            elif type(action) is Applied and (total := sum(action)) - total == 0:  # finite
                version, moved, alpha, coast, gain, rounding = action
                texts += f', ["applied", {version}, {moved!r}, {repeated(alpha)}, {coast!r}, {gain!r}, {rounding!r}]'
            elif type(action) is Release:
                workers, own = action
                texts += f', ["release", {list(workers)}, {own!r}]'
            else:
                texts += f", {_rare_text(action)}"
        found.append(texts[2:])
    return found


def _rare_text(action: Action | Applied | Measured) -> str:
    match action:
        case Release(workers, own):  # of a kind of its own
            return f'["release", {list(workers)}, {own!r}]'
        case Drop((worker, step), reason):
            return f'["drop", {worker}, {step}, {json.dumps(reason)}]'
        case Measure(pushes):
            return f'["measure", {[list(push) for push in pushes]}]'
        case Measured((worker, step), distance):
            return f'["measured", {worker}, {step}, {distance!r}]'
    return json.dumps([type(action).__name__.lower(), *action])  # Wake, Applied
