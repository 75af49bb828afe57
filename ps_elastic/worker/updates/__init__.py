"""What a worker does between pull and push; one way per file."""

from ps_elastic.worker.updates.base import Update, updates

__all__ = ["Update", "updates"]
