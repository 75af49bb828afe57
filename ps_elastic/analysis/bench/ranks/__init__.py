"""What each rank of a benchmark's job does: runs of ours, and what they are compared to."""
