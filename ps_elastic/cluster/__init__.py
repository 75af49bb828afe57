"""A job started: MPI found, ranks placed, mpirun or SLURM run, what killed jobs left taken away.

Imports config, records and transport.waking; no torch, and it never begins MPI, so that it runs on a login node.
Begin with `launcher`.
"""
