"""The one import of MPI, and what must be set before it."""

from __future__ import annotations

import os

import mpi4py

mpi4py.rc.thread_level = "funneled"  # only the main thread calls MPI
os.environ.setdefault("OMPI_MCA_osc", "^ucx")  # which says on each rank that makes a window that it has no network
os.environ.setdefault("OMPI_MCA_btl", "^ofi")  # access to memory across a network: not used, and sleeps 1 s to say so

from mpi4py import MPI  # noqa: E402

__all__ = ["MPI"]
