"""What runs: one server, three workers, and what goes between them."""

from __future__ import annotations

from drawings.svg import BLUE, GREEN, GREY, ORANGE, Drawing

WIDTH, BOX = 640, 160


def draw() -> str:
    d = Drawing(
        WIDTH,
        270,
        "One server and three workers",
        "Rank 0 is the server. It has the model and a policy. Ranks 1, 2 and 3 are workers."
        " Each worker sends gradients up to the server, and the server sends the model down to each worker.",
    )
    d.box(20, 10, WIDTH - 40, 84, BLUE)
    d.text(40, 58, "server (rank 0)", anchor="start", style=["bold"])
    d.box(200, 26, 190, 52, ORANGE)
    d.text(295, 47, "policy", style=["bold"])
    d.text(295, 66, "which gradients, and when?", style=["small"])
    d.box(410, 26, 190, 52, GREY)
    d.text(505, 57, "model", style=["bold"])
    for worker in (1, 2, 3):
        middle = 20 + BOX / 2 + (worker - 1) * (WIDTH - 40 - BOX) / 2
        d.arrow((middle - 14, 206), (middle - 14, 100), ORANGE)
        d.arrow((middle + 14, 100), (middle + 14, 206), BLUE)
        d.text(middle - 22, 158, "gradient", anchor="end")
        d.text(middle + 22, 158, "model", anchor="start")
        d.box(middle - BOX / 2, 212, BOX, 48, GREEN)
        d.text(middle, 241, f"worker (rank {worker})", style=["bold"])
    return d.svg()
