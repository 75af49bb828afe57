"""The files of a published data set: where they are looked for, how they are checked, and how they are fetched."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ps_elastic.errors import ConfigError, PlatformError


class Known(NamedTuple):
    """What a published file must be; `shape` is that of the array in it."""

    nbytes: int
    sha256: str
    shape: tuple[int, ...]


class Published(NamedTuple):
    """A data set as files to be fetched. remedy: what the user can do who has no network."""

    name: str
    files: Mapping[str, Known]
    mirrors: Sequence[str]
    remedy: str


TIMEOUT_S = 20  # without an answer; offline, the message comes after at most one such wait for each mirror


def obtain(published: Published, data_dir: str | None, download: bool) -> Path:
    """Return the folder that holds the files, whole and original; fetch those that are missing if allowed.

    A file that is there and not what it should be is never replaced. Raises ConfigError naming it.
    """
    places = _places(published.name.lower())
    usual = next((place for place in places if place.is_dir()), places[-1])  # which is made when something is fetched
    folder = Path(data_dir).expanduser() if data_dir is not None else usual
    missing = [name for name in published.files if not (folder / name).exists()]
    if missing and not download:
        looked = folder if data_dir is not None else ", ".join(map(str, places))
        message = f"no {', '.join(missing)} in {looked}; {published.remedy}, or set download: true"
        raise ConfigError(message, key="data_dir")
    for name, known in published.files.items():
        if name not in missing:
            _check(folder / name, known, published.remedy)
    if missing:
        _download(published, missing, folder)
    return folder


def _places(folder: str) -> list[Path]:
    """The folder in $PS_ELASTIC_DATA, in the data folder shared beside a checkout, and in the user's cache."""
    named = os.environ.get("PS_ELASTIC_DATA")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ps_elastic"
    roots = [Path(named).expanduser()] if named else []
    return [root / folder for root in (*roots, _shared(), cache)]


def _shared() -> Path:
    return Path(__file__).resolve().parents[3] / "shared" / "data"


def _check(path: Path, known: Known, remedy: str) -> None:
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
    raise ConfigError(f"{path}: {what}: {found}; delete it to have it fetched again, or {remedy}", key="data_dir")


def _download(published: Published, names: Sequence[str], folder: Path) -> None:
    """Fetch the files with a progress bar on stderr; each appears under its name only when it is whole and checked."""
    try:
        import pooch
        import tqdm  # noqa: F401  # pooch draws its bar with it and asks for it late
    except ModuleNotFoundError as error:
        remedy = f"`pip install ps_elastic[examples]`, or {published.remedy}"
        raise PlatformError(
            f"fetching {published.name} needs {error.name}, which is not installed: {remedy}"
        ) from error
    fetch = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT_S, chunk_size=1 << 16)
    for name in names:
        failures = []
        for mirror in published.mirrors:
            try:
                pooch.retrieve(mirror + name, f"sha256:{published.files[name].sha256}", name, folder, downloader=fetch)
                break
            except (OSError, ValueError) as error:  # no network, no such file, no permission; another checksum
                failures.append(f"{mirror}{name}: {error}")
        else:
            message = f"{name} could not be fetched into {folder}; {published.remedy}\n  " + "\n  ".join(failures)
            raise ConfigError(message, key="data_dir")
