"""Questions put to runs: replay them, compare them, estimate B over many seeds, measure what we cost.

Imports all but cli. Each part is a room of its own: `replay`, `compare`, `verify`, `bench`.
"""
