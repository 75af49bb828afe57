"""Compression of what travels; one method per file, and error feedback that wraps any of them."""

from ps_elastic.compressors.base import Compressor, Payload, compressors
from ps_elastic.compressors.error_feedback import ErrorFeedback

__all__ = ["Compressor", "ErrorFeedback", "Payload", "compressors"]
