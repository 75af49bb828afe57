"""A run carried out: the parts put together, in one process or as a rank under MPI.

Imports everything above it: config, records, worker, server, transport, cluster. Begin with `train`, which sets the
threads before `in_process` or `rank` import torch; `build` makes the parts, `loops` are the loops that carry messages.
"""
