"""The same run in virtual time: the same server, rules and workers around a heap of what happens next.

Imports runtime.build and what is above it. Begin with `simulate`; `simulator` is the heap.
"""
