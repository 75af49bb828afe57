"""Who gets compiled kernels, and who goes without."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

import pytest

from ps_elastic.vectors import kernels as compiled


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    compiled._missing.cache_clear()
    yield
    compiled._missing.cache_clear()


def test_small_models_have_none() -> None:
    assert compiled.kernels_for(compiled.LEAST - 1) is None


def test_where_numba_is_missing_or_switched_off_that_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    if compiled.why_not() != "numba is not installed":
        assert compiled.why_not() == "NUMBA_DISABLE_JIT is set"
    compiled._missing.cache_clear()
    monkeypatch.setattr(metadata, "version", version)
    assert compiled.why_not() == "numba is not installed"
    assert compiled.kernels_for(compiled.LEAST) is None


def test_large_models_have_them_where_numba_is() -> None:
    if (reason := compiled.why_not()) is not None:
        pytest.skip(reason)
    kernels = compiled.kernels_for(compiled.LEAST)
    assert kernels is not None and kernels.__name__ == "ps_elastic.vectors.numba_kernels"


def test_a_numba_that_cannot_be_imported_is_told_and_gone_without() -> None:
    """As one that is older than this numpy."""
    if (reason := compiled.why_not()) is not None:
        pytest.skip(reason)
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "from ps_elastic.vectors import kernels as compiled\n"
        "assert compiled.kernels_for(compiled.LEAST) is None\n"
        "assert compiled.kernels_for(compiled.LEAST) is None\n"
        "print(compiled.described())"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert done.stdout.startswith("none: numba ") and "cannot be imported: " in done.stdout
    assert done.stderr.count("RuntimeWarning: numba") == 1


def test_numba_is_not_imported_before_it_is_wanted() -> None:
    code = (
        "import sys; from ps_elastic.server import optimizer; from ps_elastic.worker import model_writer, staging\n"
        "from ps_elastic.vectors import kernels as compiled\n"
        "compiled.why_not(); compiled.kernels_for(10); sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
