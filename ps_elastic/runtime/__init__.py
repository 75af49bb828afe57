"""A run carried out: the parts put together, in one process or as a rank under MPI.

Imports everything above it: config, records, worker, server, transport, cluster. Begin with `train`; `build` makes the
parts, `loops` are the loops that carry messages, `rank` is one rank of a job from its command line to its end.
"""
