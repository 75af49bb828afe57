from __future__ import annotations

import random

from ps_elastic.server.discrepancy import StepSizes


def test_the_largest_step_size_since_a_version_is_that_of_a_plain_search() -> None:
    noted, draw = StepSizes(), random.Random(3)
    step_sizes: list[float] = []
    for version in range(5000):
        step_sizes.append(draw.choice([0.0, 0.1, 0.2, 0.5, 1.0]) * 0.999**version)
        oldest = max(0, version - 40)
        noted.note(version, step_sizes[version], lambda _, oldest=oldest: oldest)
        since = draw.randint(oldest, version + 1)
        assert noted.largest(since) == max(step_sizes[since:], default=0.0)
