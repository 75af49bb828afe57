"""A run, described and checked: YAML and `key=value` become frozen dataclasses, once, before anything starts.

Imports errors, plugins and policies; no torch. Begin with `load`, which reads a configuration; `schema` is what comes
out of it, `compatibility` says which choices do not go together.
"""
