"""Writes docs/pictures: `launch/pictures [--measure]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from drawings import discrepancy, parts, slurm, time_to_accuracy, waiting

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
FIGURES = PICTURES / "time_to_accuracy.json"


def pictures() -> dict[str, str]:
    """The text of every picture, by the name of its file."""
    return {
        "discrepancy.svg": discrepancy.draw(),
        "parts.svg": parts.draw(),
        "slurm.svg": slurm.draw(),
        "time_to_accuracy.svg": time_to_accuracy.draw(json.loads(FIGURES.read_text(encoding="utf-8"))),
        "waiting.svg": waiting.draw(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="launch/pictures", description="Write docs/pictures/*.svg.")
    parser.add_argument("--measure", action="store_true", help="run the comparison of time_to_accuracy anew, first")
    if parser.parse_args().measure:
        FIGURES.write_text(json.dumps(time_to_accuracy.measure(), indent=1) + "\n", encoding="utf-8")
    for name, text in pictures().items():
        (PICTURES / name).write_text(text, encoding="utf-8")
        print(f"docs/pictures/{name}")


if __name__ == "__main__":
    main()
