"""What a task is: four methods that the framework calls, and the settings that are its init fields."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from ps_elastic.plugins import Checked, Registry

if TYPE_CHECKING:
    from torch import Tensor, nn


class Task(Checked, ABC):
    """What is trained. Derive a `@dataclass` from it; its init fields are its YAML keys under `task:`.

    - `batch_size`: a field that every task must have: samples of one batch of one worker (>= 1). A push is the
      mean gradient of `update.accumulate` batches.
    - `higher_is_better`: class attribute: the metrics of `evaluate` that are better if larger. For the others,
      "loss" among them, less is better.

    An error that a method raises ends the run; under MPI the message names the rank. A gradient that is not finite
    ends it with TaskError, unless `train.on_nonfinite: drop` takes the next batch instead.
    """

    batch_size: int
    higher_is_better: ClassVar[tuple[str, ...]] = ("accuracy",)

    def prepare(self) -> None:  # most tasks have nothing to fetch
        """Fetch and check what the task needs, as files and downloads. Called once per rank, before all else.

        One rank of a host calls it first, so that only one downloads. Raise ConfigError to name a file that is missing,
        truncated or not what it should be.
        """

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """A new model on the CPU, float32 in what is trained: the same numbers for the same `seed`, on every rank.

        It is trained in the modes in which it is returned: a part in `eval()` stays so. `seeded` helps. Ranks whose
        models differ in names or shapes are refused with ConfigError.
        """

    @abstractmethod
    def batches(self, worker: int, workers: int, seed: int) -> Iterator[Any]:
        """Endless batches of `worker` (1..`workers`); they depend on nothing but the arguments and the settings.

        A batch is a tensor, or a tuple, list or dict of tensors, with `batch_size` samples; the framework moves it to
        the device. An iterator that ends is an error.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of `batch`: a tensor of shape () that autograd can differentiate.

        Dropout and augmentation may draw from torch's default generator: the framework seeds it by (seed, worker, step)
        before each call.
        """

    def differentiate(self, model: nn.Module, batch: Any, out: Mapping[str, Tensor]) -> float:
        """Optional, a shortcut past autograd: return the mean loss of `batch`, and write its gradient into `out`.

        `out`: parameter name -> tensor view in the parameter's shape, float32; fill all of them, with what autograd
        would write, bit for bit. Draw no random numbers.
        """
        raise NotImplementedError

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metrics of `model` on data that was not trained on: name -> number, with "loss", and "accuracy" in [0, 1].

        The accuracy may be left out. The model is in eval mode, gradients are off; it may be called on another thread
        than the training.
        """


tasks: Registry[Task] = Registry("task", "ps_elastic.tasks")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's default generator is seeded with `seed`; afterwards it is as it was before. For `model`."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU, for good
        yield
