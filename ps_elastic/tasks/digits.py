from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ps_elastic.errors import PlatformError
from ps_elastic.plugins import NotNegative, Whole
from ps_elastic.tasks.base import seeded, tasks
from ps_elastic.tasks.classification import Batch, Classification

HELD_OUT = 5  # every fifth image of a class is for testing


@tasks.register("digits")
@dataclass
class Digits(Classification):
    """Handwritten digits of 8x8 pixels, which scikit-learn brings along, and a small perceptron: nothing is fetched.

    1,797 images; of each class every fifth is held out for testing. Source: Alpaydin and Kaynak, "Optical Recognition
    of Handwritten Digits", UCI Machine Learning Repository, 1998.
    """

    batch_size: Whole = 32  # samples of one batch of a worker; larger: less noise, slower
    heterogeneity: NotNegative = 0.0  # of the workers' class mixtures; 0: all alike, larger: they differ more

    def prepare(self) -> None:
        self._images  # noqa: B018  # reads them

    def model(self, seed: int) -> nn.Module:
        """Pixels (b, 64) in, scores (b, 10) out; 4,810 parameters."""
        with seeded(seed):
            return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    @cached_property
    def train_data(self) -> Batch:
        return self._part(held_out=False)

    @cached_property
    def test_data(self) -> Batch:
        return self._part(held_out=True)

    def _part(self, *, held_out: bool) -> Batch:
        images, labels = self._images
        rows = torch.from_numpy(is_held_out(labels.numpy()) == held_out)
        return images[rows], labels[rows]

    @cached_property
    def _images(self) -> Batch:
        pixels, labels = _read_digits()
        return torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels.astype(np.int64))  # pixels are 0..16


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1797, 64) and labels (1797,) of scikit-learn, not importing it: that takes a second a rank."""
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        missing = "task digits needs scikit-learn, which is not installed"
        raise PlatformError(f"{missing}: `pip install ps_elastic[examples]`")
    file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not file.exists():  # where the file lies is not promised
        from sklearn.datasets import load_digits

        found = load_digits()
        return found.data, found.target
    table = np.loadtxt(file, delimiter=",")
    return table[:, :64], table[:, 64]


def is_held_out(labels: np.ndarray) -> np.ndarray:
    """(n,) bool: true for every fifth of each class, in the order given, so that the classes keep their shares."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        chosen[np.flatnonzero(labels == label)[::HELD_OUT]] = True
    return chosen
