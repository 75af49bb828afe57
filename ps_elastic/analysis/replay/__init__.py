"""A recorded run decided again, computed again, or judged by another policy."""
