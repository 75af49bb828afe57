"""How SLURM deals out ranks: two nodes with two tasks each."""

from __future__ import annotations

from drawings.svg import BLUE, GREEN, GREY, Drawing


def draw() -> str:
    d = Drawing(
        640,
        190,
        "Four ranks on two nodes",
        "A job with --nodes 2 and --tasks-per-node 2. Node 1 has rank 0, which is the server, and rank 1, a worker."
        " Node 2 has ranks 2 and 3, which are workers. The network connects the nodes.",
    )
    d.text(320, 22, "--nodes 2 --tasks-per-node 2", style=["code"])
    for node, left in ((1, 20), (2, 370)):
        d.box(left, 40, 250, 130, GREY)
        d.text(left + 125, 64, f"node {node}", style=["bold"])
        for task in (0, 1):
            rank = 2 * (node - 1) + task
            x, server = left + 16 + task * 114, rank == 0
            d.box(x, 80, 104, 70, BLUE if server else GREEN)
            if server:  # marked by a second frame, not by its colour alone
                d.box(x + 4, 84, 96, 62, BLUE, corner=3)
            d.text(x + 52, 112, f"rank {rank}", style=["bold"])
            d.text(x + 52, 132, "server" if server else "worker")
    d.arrow((276, 105), (364, 105), GREY, both=True)
    d.text(320, 96, "network", style=["small"])
    return d.svg()
