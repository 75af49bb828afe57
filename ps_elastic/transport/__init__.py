"""How messages travel. Only this package imports mpi4py."""
