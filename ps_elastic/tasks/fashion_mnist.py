"""Fashion-MNIST: the data set, how its files are read, and a small convolutional network."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ps_elastic.errors import ConfigError
from ps_elastic.plugins import expect
from ps_elastic.tasks import downloads as files
from ps_elastic.tasks.base import Task, seeded, tasks
from ps_elastic.tasks.classification import evaluate_classifier, labelled_batches

MEAN, DEVIATION = 0.2860, 0.3530  # of the training pixels as 0..1
SHIFT = 2  # pixels, most in each direction
Batch = tuple[Tensor, Tensor]  # (b, 1, 28, 28) uint8, (b,) int64


@tasks.register("fashion_mnist")
@dataclass
class FashionMnist(Task):
    """Small photographs of clothing in ten classes (60,000 to train, 10,000 to test), and a convolutional network.

    Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
    Algorithms", 2017. The files are looked for in data_dir; without one in $PS_ELASTIC_DATA/fashion-mnist, in
    ../shared/data/fashion-mnist beside a checkout, then in the user's cache; what is missing is fetched there.
    """

    batch_size: int = 32
    data_dir: str | None = None  # null: the usual places
    download: bool = True
    heterogeneity: float = 0.0  # 0: every worker alike; larger: more different class mixtures
    dropout: float = 0.0  # part of the hidden units left out in training; larger: less fitted to the training images
    augment: bool = False  # shift by up to 2 pixels and mirror, in training

    def __post_init__(self) -> None:
        expect(self.batch_size >= 1, self, "batch_size", "a whole number >= 1")
        expect(self.heterogeneity >= 0, self, "heterogeneity", "a number >= 0")
        expect(0 <= self.dropout < 1, self, "dropout", "a number >= 0 and < 1")

    def prepare(self) -> None:
        self._folder  # noqa: B018  # looks for the files, fetches and checks them

    def model(self, seed: int) -> nn.Module:
        """Bytes (b, 1, 28, 28) in, scores (b, 10) out; 311,818 parameters.

        Strides in place of pooling: 2.6 ms forward and backward for 32 images on one core, where 3x3 convolutions
        of 16 and 32 channels with max pooling took 6.8 ms and learned no better.
        """
        with seeded(seed):
            return nn.Sequential(
                Standardise(),
                nn.Conv2d(1, 16, 5, stride=2, padding=2),
                nn.ReLU(),  # (b, 16, 14, 14)
                nn.Conv2d(16, 64, 3, stride=2, padding=1),
                nn.ReLU(),  # (b, 64, 7, 7)
                nn.Flatten(),
                nn.Linear(64 * 7 * 7, 96),
                nn.ReLU(),
                nn.Dropout(self.dropout) if self.dropout else nn.Identity(),  # the same names with and without
                nn.Linear(96, 10),
            )

    def batches(self, worker: int, workers: int, seed: int) -> Iterator[Batch]:
        images, labels = self._train
        return labelled_batches(
            images,
            labels,
            worker=worker,
            workers=workers,
            batch_size=self.batch_size,
            heterogeneity=self.heterogeneity,
            seed=seed,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        if self.augment and model.training:
            images = moved(images)
        return nn.functional.cross_entropy(model(images), labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return evaluate_classifier(model, *self._test)

    @cached_property
    def _folder(self) -> Path:
        return files.obtain(self.data_dir, self.download)

    @cached_property
    def _train(self) -> Batch:
        return self._load(files.TRAIN_IMAGES, files.TRAIN_LABELS)

    @cached_property
    def _test(self) -> Batch:
        return self._load(files.TEST_IMAGES, files.TEST_LABELS)

    def _load(self, images: str, labels: str) -> Batch:
        """Both arrays; images stay bytes, 47 MB a rank in place of 188, since standardising a batch costs 15 us."""
        pixels, classes = (read_idx(self._folder / name, files.FILES[name].shape) for name in (images, labels))
        return torch.tensor(pixels).unsqueeze(1), torch.tensor(classes, dtype=torch.int64)


class Standardise(nn.Module):
    """Bytes 0..255 as float32 with mean 0 and deviation 1 over the training set."""

    def forward(self, images: Tensor) -> Tensor:
        return (images.float() - 255 * MEAN) / (255 * DEVIATION)


def moved(images: Tensor) -> Tensor:
    """Each of (b, 1, h, w) images shifted by up to SHIFT pixels each way, zeros coming in, and mirrored half the time.

    Drawn from torch's default generator, on the CPU whatever the device, so that every device sees the same images.
    """
    number, _, height, width = images.shape
    corner = torch.randint(0, 2 * SHIFT + 1, (2, number, 1), device="cpu")
    mirrored = torch.rand(number, 1, device="cpu") < 0.5
    rows = corner[0] + torch.arange(height)  # (b, h)
    columns = torch.arange(width).expand(number, width)
    columns = corner[1] + torch.where(mirrored, columns.flip(1), columns)  # (b, w)
    padded = nn.functional.pad(images[:, 0], (SHIFT,) * 4)
    which = torch.arange(number).view(-1, 1, 1)
    places = (index.to(images.device) for index in (which, rows.unsqueeze(2), columns.unsqueeze(1)))
    return padded[tuple(places)].unsqueeze(1)


def read_idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the array of `shape` that the gzipped file holds; read-only.

    The header is one int32 "magic", 0x0800 + the number of dimensions, then an int32 for each dimension. Raises
    ConfigError naming the file if it is not whole or is not this array; reads no more than this array needs.
    """
    header = 4 + 4 * len(shape)
    expected = header + math.prod(shape)
    try:
        with gzip.open(path, "rb") as file:
            content = file.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:  # gzip raises all three for a damaged file
        found = f"{path.stat().st_size:,} bytes" if path.exists() else "no file"
        raise ConfigError(f"{path}: not a whole gzip file ({found}): {error}", key="data_dir") from error
    _check_header(path, content, shape, header, expected)
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _check_header(path: Path, content: bytes, shape: tuple[int, ...], header: int, expected: int) -> None:
    magic = int.from_bytes(content[:4], "big")
    if magic != 0x0800 + len(shape):
        message = f"{path}: begins with the number {magic}, expected {0x0800 + len(shape)}: not such an IDX file"
        raise ConfigError(message, key="data_dir")
    sizes = tuple(int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4))
    if sizes != shape:
        raise ConfigError(f"{path}: holds an array of shape {sizes}, expected {shape}", key="data_dir")
    if len(content) != expected:
        found = f"{len(content):,}" if len(content) < expected else f"more than {expected:,}"
        raise ConfigError(f"{path}: unpacks to {found} bytes, expected {expected:,}", key="data_dir")
