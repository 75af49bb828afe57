"""The IDX format, in which MNIST and its successors are published: a big-endian header, then bytes row by row."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ps_elastic.errors import ConfigError


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
    _check(path, content, shape, header, expected)
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _check(path: Path, content: bytes, shape: tuple[int, ...], header: int, expected: int) -> None:
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
