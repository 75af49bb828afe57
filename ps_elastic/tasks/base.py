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
    """A dataclass whose init fields are its YAML keys under `task:`. It must have a field `batch_size`.

    batch_size: samples of one worker and push (times `update.accumulate`).
    """

    batch_size: int
    higher_is_better: ClassVar[tuple[str, ...]] = ("accuracy",)  # metrics of `evaluate` to be raised, not lowered

    def prepare(self) -> None:  # most tasks have nothing to fetch
        """Fetch and check what the task needs (files, downloads); called once per rank, rank 0 of a host first.

        Raises ConfigError naming the file that is missing, truncated or not what it should be.
        """

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """A new model with float32 parameters on the CPU; the same numbers for the same seed, on every rank."""

    @abstractmethod
    def batches(self, worker: int, workers: int, seed: int) -> Iterator[Any]:
        """Endless batches of worker 1..workers; depends on nothing but the arguments and the settings.

        A batch is a tensor, or a tuple, list or dict of tensors; the framework moves it to the device.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of `batch`, a scalar to differentiate. Dropout and augmentation may draw from torch's
        default generator: the framework seeds it by (seed, worker, step) before each call."""

    def differentiate(self, model: nn.Module, batch: Any, out: Mapping[str, Tensor]) -> float:
        """The mean loss of `batch`, and its gradient in `out`, by parameter name: a shortcut past autograd.

        A task need not have it. It must fill all of `out` with what autograd would, bit for bit, and draw nothing.
        """
        raise NotImplementedError

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metrics of `model` on held-out data, "loss" among them and "accuracy" where it makes sense.

        The model is in eval mode, gradients are off; it may be called on another thread than the training.
        """


tasks: Registry[Task] = Registry("task", "ps_elastic.tasks")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's default generator is seeded with `seed`; afterwards it is as it was before. For `model`."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU, for good
        yield
