"""Run by `test_batches.py` as `start_methods.py DATASET_FILE OUT`: epochs in processes of each start method."""

import json
import multiprocessing
import sys
from pathlib import Path

import torch

from musubi_tuner.data.batches import open_batches

sys.path.insert(0, str(Path(__file__).parent))

from conftest import ToyFamily  # the folder of this file comes first


def epochs(path: str, workers: int) -> list[list]:
    """What two epochs give: positions, items and a sum of each batch's values."""
    torch.set_num_threads(1)
    source = open_batches(path, ToyFamily(), seed=1, workers=workers)
    batches = [batch for epoch in (0, 1) for batch in source.epoch(epoch)]
    return [[batch.index, list(batch.items), float(batch.latents.double().sum())] for batch in batches]


def child(method: str, path: str, queue) -> None:
    queue.put((method, epochs(path, 2)))


def main(path: str, out: Path) -> None:
    found = {"here": epochs(path, 0)}
    running = open_batches(path, ToyFamily(), seed=1, workers=2).epoch(0)
    next(running)  # threads of this process are at work while the others start
    for method in ("spawn", "fork"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=child, args=(method, path, queue))
        process.start()
        name, batches = queue.get(timeout=120)
        found[name] = batches
        process.join(60)
    found["rest"] = [[batch.index, list(batch.items)] for batch in running]
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
