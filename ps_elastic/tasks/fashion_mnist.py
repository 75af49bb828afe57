"""Fashion-MNIST: the data set, how its files are read, and a small convolutional network."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ps_elastic.errors import ConfigError
from ps_elastic.plugins import BelowOne, NotNegative, Whole
from ps_elastic.tasks.base import seeded, tasks
from ps_elastic.tasks.classification import Batch, Classification
from ps_elastic.tasks.downloads import Known, Published, obtain

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"

FILES = {
    TRAIN_IMAGES: Known(
        26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84", (60_000, 28, 28)
    ),
    TRAIN_LABELS: Known(29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845", (60_000,)),
    TEST_IMAGES: Known(4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073", (10_000, 28, 28)),
    TEST_LABELS: Known(5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5", (10_000,)),
}
MIRRORS = (  # the data set's own storage, then its repository
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
)
REMEDY = "put the four original .gz files into a folder and name it as data_dir"
MEAN, DEVIATION = 0.2860, 0.3530  # of the training pixels as 0..1
SHIFT = 2  # pixels, most in each direction


@tasks.register("fashion_mnist")
@dataclass
class FashionMnist(Classification):
    """Small photographs of clothing in ten classes (60,000 to train, 10,000 to test), and a convolutional network.

    Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
    Algorithms", 2017. The files are looked for in data_dir; without one in $PS_ELASTIC_DATA/fashion-mnist, in
    ../shared/data/fashion-mnist beside a checkout, then in the user's cache; what is missing is fetched there.
    """

    batch_size: Whole = 32  # samples of one batch of a worker; larger: less noise, slower
    data_dir: str | None = None  # folder of the files. null: the usual places
    download: bool = True  # fetch what is missing
    heterogeneity: NotNegative = 0.0  # of the workers' class mixtures; 0: all alike, larger: they differ more
    # fraction of the hidden units left out in training; larger: less fitted to the training images
    dropout: BelowOne = 0.0
    augment: bool = False  # shift by up to 2 pixels and mirror, in training

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

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return super().loss(model, (moved(images), labels) if self.augment and model.training else batch)

    @cached_property
    def _folder(self) -> Path:
        return obtain(Published("Fashion-MNIST", FILES, MIRRORS, REMEDY), self.data_dir, self.download)

    @cached_property
    def train_data(self) -> Batch:
        return self._load(TRAIN_IMAGES, TRAIN_LABELS)

    @cached_property
    def test_data(self) -> Batch:
        return self._load(TEST_IMAGES, TEST_LABELS)

    def _load(self, images: str, labels: str) -> Batch:
        """Both arrays; images stay bytes, 47 MB a rank in place of 188, since standardising a batch costs 15 us."""
        pixels, classes = (read_idx(self._folder / name, FILES[name].shape) for name in (images, labels))
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
