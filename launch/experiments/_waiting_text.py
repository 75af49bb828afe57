"""What the page on waiting says in words."""

from __future__ import annotations

MEANING = [""]
WHY = [""]
