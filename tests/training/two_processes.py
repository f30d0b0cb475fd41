"""One process of `test_processes.py`: trains the toy on its share of ten items and leaves its weights.

Run as `python two_processes.py FOLDER` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as a launcher sets them.
"""

import json
import sys
from pathlib import Path

import torch

from musubi_tuner.data.batches import Batch
from musubi_tuner.training.loop import Plan, train
from musubi_tuner.training.runtime import launched
from musubi_tuner.training.step import KeyedDraws, Step
from training_toys import MemorySource, Toy, items_of, noting_gradients

SHARE = 5


class Share(MemorySource):
    """Items `rank * SHARE ...`, under their numbers in the whole."""

    def __init__(self, rank: int) -> None:
        super().__init__(items_of(10), 10)
        self.rank = rank

    def epoch(self, number: int, start: int = 0):
        (whole,) = super().epoch(number, start)
        mine = slice(self.rank * SHARE, (self.rank + 1) * SHARE)
        cond = {"scale": whole.cond["scale"][mine]}
        yield Batch(whole.latents[mine], cond, whole.items[mine], number, 0)


def main(folder: Path) -> None:
    runtime = launched("no")
    model = Toy(24)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    gradients = noting_gradients(optimizer, parameters)
    step = Step(
        predict=model,
        parameters=parameters,
        optimizer=optimizer,
        draws=KeyedDraws(5),
        runtime=runtime,
        max_grad_norm=0,
    )
    train(step, Share(runtime.rank), Plan(4))
    torch.save(torch.cat([p.detach().flatten() for p in parameters]), folder / f"weights{runtime.rank}.pt")
    torch.save(gradients, folder / f"gradients{runtime.rank}.pt")
    told = {
        "world": runtime.world,
        "agreed": runtime.agree(100 + runtime.rank),
        "average": runtime.average(float(runtime.rank)),
    }
    (folder / f"told{runtime.rank}.json").write_text(json.dumps(told))
    runtime.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
