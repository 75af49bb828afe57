"""How the payloads of a Step become one gradient: small tensor functions that a Step may name, one per file."""

from __future__ import annotations

from ps_elastic.server.combiners.base import Combiner, Part, combiners, make_combiner

__all__ = ["Combiner", "Part", "combiners", "make_combiner"]
