"""The four files of Fashion-MNIST: where they are looked for, how they are fetched, and what they must be."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ps_elastic.errors import ConfigError, PlatformError


class Known(NamedTuple):
    """What a published file must be; `shape` is that of the array in it."""

    nbytes: int
    sha256: str
    shape: tuple[int, ...]


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
TIMEOUT_S = 20  # without an answer; offline, the message comes after at most one such wait for each mirror
REMEDY = "put the four original .gz files into a folder and name it as data_dir"


def obtain(data_dir: str | None, download: bool) -> Path:
    """Return the folder that holds the four files, whole and original; fetch those that are missing if allowed.

    A file that is there and not what it should be is never replaced. Raises ConfigError naming it.
    """
    folder = Path(data_dir).expanduser() if data_dir is not None else _usual_folder()
    missing = [name for name in FILES if not (folder / name).exists()]
    if missing and not download:
        looked = folder if data_dir is not None else ", ".join(map(str, _places()))
        message = f"no {', '.join(missing)} in {looked}; {REMEDY}, or set download: true"
        raise ConfigError(message, key="data_dir")
    for name in FILES:
        if name not in missing:
            _check(folder / name)
    if missing:
        _download(missing, folder)
    return folder


def _usual_folder() -> Path:
    """The first of the usual places that exists; the last is made when something is fetched."""
    *given, cache = _places()
    return next((folder for folder in given if folder.is_dir()), cache)


def _places() -> list[Path]:
    """$PS_ELASTIC_DATA, the data folder shared beside a checkout, and the user's cache."""
    named = os.environ.get("PS_ELASTIC_DATA")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ps_elastic"
    roots = [Path(named).expanduser()] if named else []
    return [root / "fashion-mnist" for root in (*roots, _shared(), cache)]


def _shared() -> Path:
    return Path(__file__).resolve().parents[3] / "shared" / "data"


def _check(path: Path) -> None:
    known = FILES[path.name]
    try:
        nbytes = path.stat().st_size
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if nbytes == known.nbytes else ""
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", key="data_dir") from error
    if nbytes != known.nbytes:
        what = "truncated" if nbytes < known.nbytes else "not the original"
        found = f"found {nbytes:,} bytes, expected {known.nbytes:,}"
    elif digest != known.sha256:
        what, found = "not the original", f"found {nbytes:,} bytes with sha256 {digest}, expected {known.sha256}"
    else:
        return
    raise ConfigError(f"{path}: {what}: {found}; delete it to have it fetched again, or {REMEDY}", key="data_dir")


def _download(names: Iterable[str], folder: Path) -> None:
    """Fetch the files with a progress bar on stderr; each appears under its name only when it is whole and checked."""
    try:
        import pooch
        import tqdm  # noqa: F401  # pooch draws its bar with it and asks for it late
    except ModuleNotFoundError as error:
        remedy = f"`pip install ps_elastic[examples]`, or {REMEDY}"
        raise PlatformError(f"fetching Fashion-MNIST needs {error.name}, which is not installed: {remedy}") from error
    fetch = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT_S, chunk_size=1 << 16)
    for name in names:
        failures = []
        for mirror in MIRRORS:
            try:
                pooch.retrieve(mirror + name, f"sha256:{FILES[name].sha256}", name, folder, downloader=fetch)
                break
            except (OSError, ValueError) as error:  # no network, no such file, no permission; another checksum
                failures.append(f"{mirror}{name}: {error}")
        else:
            message = f"{name} could not be fetched into {folder}; {REMEDY}\n  " + "\n  ".join(failures)
            raise ConfigError(message, key="data_dir")
