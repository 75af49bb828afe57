"""Messages, and how they travel: over MPI between hosts, in shared memory on one.

Imports errors, vectors.memory, numpy and mpi4py; no torch, and it knows no server, worker, policy or configuration.
Begin with `messages`; `wire` turns them into bytes, `endpoint` and its two kinds send and receive them.
"""
