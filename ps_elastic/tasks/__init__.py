"""What is trained: a model, batches for each worker, a loss and an evaluation; one task per file."""

from ps_elastic.tasks.base import Task, seeded, tasks

__all__ = ["Task", "seeded", "tasks"]
