"""Consistency policies: acceptance rules on the server, one per file.

A rule sees headers and the ledger, never a tensor, a clock or a communicator, and yields actions.
"""

from __future__ import annotations

from ps_elastic.policies.base import Policy, policies

__all__ = ["Policy", "policies"]
