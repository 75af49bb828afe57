"""A run's folder: how it begins, the lines written into it, and how a finished one is read back.

Imports config, policies.events and vectors.kernels. Begin with `run_dir`; `tracker` and `writer` write, `reader` reads.
"""
