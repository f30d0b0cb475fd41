"""A training run whose blocks visit a stand-in for a device; `python swapping_run.py PLACE OUT WORDS...`."""

import os
import sys
from pathlib import Path

from musubi_tuner.memory import plan
from swap_stand_in import StandIn
from training_place import train_noting_losses


def main() -> None:
    place, out, *words = sys.argv[1:]
    lanes = StandIn()
    plan.has_lanes = lambda _: True
    plan.lanes_for = lambda _, *, pinned: lanes
    train_noting_losses(Path(place), Path(out), *words)
    os.write(2, f"copies to the stand-in: {len(lanes.copies)}\n".encode())


if __name__ == "__main__":
    main()
