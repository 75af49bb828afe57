"""The model as one flat float32 vector, and the passes over it.

Imports errors, numpy and torch; `memory` and `kernels` do without torch until they are used. Begin with `layout`: what
a module's parameters look like as one vector, cut into buckets.
"""
