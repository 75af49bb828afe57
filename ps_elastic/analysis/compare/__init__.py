"""Policies and compressors side by side: what to run, the runs, and what their figures say."""
