"""The same run in simulated time: the same server, policies and workers around a heap of what happens next.

Imports runtime.build and what is above it. Begin with `simulate`; `simulator` is the heap.
"""
