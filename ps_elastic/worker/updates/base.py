"""What a worker's update is: from a model and batches to the vector it pushes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from ps_elastic.plugins import Checked, Registry

if TYPE_CHECKING:
    from torch import Tensor


class Update(Checked, ABC):
    """A dataclass whose init fields are its YAML keys under `update:`. Each worker has its own, with its own state."""

    units: ClassVar[str] = "gradient"  # what it pushes: "gradient" (times alpha), "update" (scaled), or "model"
    cut_s: ClassVar[float | None] = None  # the computation is cut off so long after it began; see `cut_sgd`
    moves: ClassVar[bool] = True  # it moves x while it runs, so x must be a copy; say False where that is not so
    view: Tensor | None = None  # where the last gradient was taken (d,), if that is not the model pulled

    @abstractmethod
    def run(self, gradient: Callable[[], float], x: Tensor, g: Tensor, alpha: float, version: int) -> float:
        """Leave what is to be pushed in `g` (d,) and return the mean loss.

        gradient(): computes the gradient of the next batch at `x` (d,), clipped, into `g`, and returns the loss.
        x: the model pulled; it may move meanwhile and is then put back. alpha: the server's step size when it sent x.
        version: of x. Where a gradient is not finite, so is what is pushed, and no state changes: the worker sees it.
        """


updates: Registry[Update] = Registry("update", "ps_elastic.worker.updates")
