"""From a batch to a push: a reply goes in, gradients are computed on its model, a push comes out; no I/O.

Imports compressors, tasks, transport.messages, vectors and records.tracker; never server, config or policies. Begin
with `worker`; it asks `gradients` for a gradient and `push` to let it leave.
"""
