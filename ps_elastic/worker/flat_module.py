"""Where gradients are made: hooks carry each one into its place in g, and tell when a bucket is as it will be."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from threading import get_ident
from typing import NamedTuple

from torch import Tensor, nn, strided

from ps_elastic.errors import TaskError
from ps_elastic.vectors.layout import Layout
from ps_elastic.worker.model_writer import Run
from ps_elastic.worker.staging import FromGpu, GradientRegion, InPlace, KeptGradient, Staging, measured
from ps_elastic.worker.watch import ParameterWatch

Hook = Callable[[Tensor], None]  # is given a parameter whose gradient is there


class ModelLives(Enum):
    """Whose the memory is that a worker computes on, and how the model of a reply comes there."""

    OWN = "the worker's; the model of a reply is received in it"
    BESIDE = "the worker's; the model of a reply is elsewhere, and can be compared with it before it is loaded"
    WATCHED = "the worker's; others look at it until the next model is loaded"
    SHARED = "that of several workers, which take turns: each loads a model and pushes before the next"
    SERVERS = "the server's: its model itself, to be read only"


class Memory(NamedTuple):
    """Memory for model and gradient (d,): of the transport, so that one is received and the other sent in place."""

    x: Tensor
    g: Tensor
    lives: ModelLives = ModelLives.BESIDE


class FlatModule:
    """The module's parameters live in x (d,), their gradients land in g (d,).

    On the CPU x and g are those of `memory`, where there is some. runs: in which the gradient is wanted as backward
    made it: `parts` gives it, one for each; a tensor that is a run of its own is not in g then. watch: sees to it that
    the parameters stay there.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, memory: Memory | None = None, runs: Sequence[Run] = ()
    ) -> None:
        self.model, self.layout, self.device = model, layout, next(model.parameters()).device
        x, g, self.lives = memory or Memory(layout.empty(), layout.empty())
        self.x = x.to(self.device)
        layout.attach(model, self.x, fill=self.lives is not ModelLives.SERVERS)
        self.watch = ParameterWatch(model, layout.views(self.x))
        self.made = g.to(self.device)  # the gradient, where backward is: g itself on the CPU
        places = {name: GradientRegion(view) for name, view in layout.views(self.made).items()}
        self.staging: Staging
        if self.device.type == "cpu":
            every = list(places.values())
            self.staging = InPlace(g, [list(measured(layout, bucket, every, g)) for bucket in layout.buckets])
        else:
            self.staging = FromGpu(self.made, layout.buckets)
        self.g = self.staging.g
        kept = {name: KeptGradient(places[name].view) for name, *more in (run.names for run in runs) if not more}
        self.parts: list[Callable[[], Tensor]] = [
            kept[run.names[0]].take if run.names[0] in kept else g[run.start : run.stop].clone for run in runs
        ]
        self.gradient = GradientHooks(model, layout, {**places, **kept}, self.staging.begin)


class Cut(Exception):
    """Backward is to be left where it is: its time is over."""


class GradientHooks:
    """Carries each parameter's gradient into its place in g as soon as backward has it.

    A hook that copies and forgets `p.grad` is faster than gradients preset as views: it saves zeroing and adding.
    places: by the name of the parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        places: Mapping[str, GradientRegion | KeptGradient],
        begin: Callable[[int], None],
    ) -> None:
        self._places, self._seen, self._begin = places, set[str](), begin
        self.views = {name: place.view for name, place in places.items()}
        self.cut = False  # whether the last computation was cut off
        self._clock: Callable[[], float] = time.perf_counter
        self._until, self._final = math.inf, False
        self._members = [
            {slot.name for slot in layout.slots if bucket.start <= slot.offset < bucket.stop}
            for bucket in layout.buckets
        ]
        self._awaited: list[set[str]] = []  # of each bucket, in the backward that is told of
        self._filled: Callable[[int], None] | None = None
        self._thread, self._later = 0, list[int]()  # buckets finished on another thread
        parameters = dict(model.named_parameters())
        for i, names in enumerate(self._members):
            for name in names:
                register: Callable[[Hook], object] = parameters[name].register_post_accumulate_grad_hook
                register(self._hook(name, i))

    @contextlib.contextmanager
    def collecting(
        self, clock: Callable[[], float] = time.perf_counter, until: float = math.inf, *, final: bool = False
    ) -> Iterator[None]:
        """Within, every backward adds to g; a parameter that none of them reached gets zeros.

        A gradient that is made when `clock` is beyond `until` ends the computation there: then `cut` is true.
        final: what is in g afterwards is what is pushed, and there is one backward.
        """
        self._seen.clear()
        self.cut, self._clock, self._until, self._final = False, clock, until, final
        try:
            yield
        except Cut:
            self.cut = True
        finally:
            self._filled = None
            self._later.clear()
        for name in self._places.keys() - self._seen:
            self._places[name].clear()

    def missing(self) -> set[int]:
        """The buckets of which a parameter was not reached."""
        return {i for i, names in enumerate(self._members) if not names <= self._seen}

    def tell(self, filled: Callable[[int], None]) -> None:
        """The next backward is the last: call `filled` with each bucket in which every parameter was reached by it.

        It is called from inside backward on the thread that called this; of what other threads of autograd finish, as
        they do for a GPU, not before `told`. `begin` is called with each bucket at once.
        """
        self._awaited = [set(names) for names in self._members]
        self._filled, self._thread = filled, get_ident()

    def told(self) -> None:
        """That backward is over: tell of what other threads have finished."""
        while self._later and self._filled is not None:
            self._filled(self._later.pop(0))

    def _hook(self, name: str, bucket: int) -> Hook:
        place, seen = self._places[name], self._seen

        def collect(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if gradient.layout is not strided:  # of an embedding that is sparse
                gradient = gradient.to_dense()
            if self._until < math.inf and self._clock() > self._until:
                raise Cut
            if name in seen:
                place.add(gradient)
            else:
                place.put(gradient, final=self._final)
                seen.add(name)
            del gradient  # before anything leaves: it may be as large as the rest
            if self._filled is not None:
                self._count(name, bucket)

        return collect

    def _count(self, name: str, bucket: int) -> None:
        awaited = self._awaited[bucket]
        if not awaited:  # a hook is called once a backward, but a segment that is checkpointed is a backward of its own
            raise TaskError(f"'{name}' got a second gradient after its bucket had left; expected with `buckets: whole`")
        awaited.discard(name)
        if awaited or self._filled is None:
            return
        self._begin(bucket)
        if get_ident() == self._thread:
            self._filled(bucket)
        else:
            self._later.append(bucket)
