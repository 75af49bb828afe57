"""How batches are drawn; the gradients themselves: test_worker.py."""

from __future__ import annotations

import numpy as np
import torch

from ps_elastic.worker.gradients import draw_seed, to_device


def test_seeds_differ_wherever_a_part_does() -> None:
    seeds = {draw_seed(*parts) for parts in [(0,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (12, 3), (1, 23)]}
    assert len(seeds) == 7 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_batch_moves_to_the_device_whatever_its_shape() -> None:
    batch = {"a": np.ones(2, np.float32), "b": [torch.ones(1), (torch.zeros(1), "text")], "c": 3}
    moved = to_device(batch, torch.device("meta"))
    assert moved["b"][0].device.type == moved["b"][1][0].device.type == moved["a"].device.type == "meta"
    assert moved["b"][1][1] == "text" and moved["c"] == 3
    assert isinstance(moved["b"], list) and isinstance(moved["b"][1], tuple)
