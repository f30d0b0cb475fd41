"""One process of `test_sharded.py`: gradients of every family's tiny transformer, in shards and whole.

Run as `python shards_of_families.py FOLDER` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as a launcher sets them.
"""

import json
import sys
from pathlib import Path

import torch

from musubi_tuner.families import registry
from musubi_tuner.flow import keyed
from musubi_tuner.nn.checkpointing import checkpointed
from musubi_tuner.nn.runner import direct
from musubi_tuner.training import shards
from musubi_tuner.training.runtime import launched
from tiny_models import TINY, tiny_dit


def gradients(name: str, dit: torch.nn.Module, run) -> dict[str, torch.Tensor]:
    family, tiny = registry.get(name), TINY[name]
    x = keyed.normal((2, *tiny.latents), "shards", name)
    cond = family.collate([{**tiny.entry(n), "latents": x[0]} for n in (3, 5)])
    family.predict(dit, x, torch.tensor([0.3, 0.8]), cond, run=run).square().mean().backward()
    found = {key: shards.whole(p.grad) for key, p in dit.named_parameters() if p.grad is not None}
    dit.zero_grad()
    return found


def main(folder: Path) -> None:
    runtime = launched("no")
    assert runtime.sharded
    told = {}
    for name in TINY:
        whole, split = (tiny_dit(name).requires_grad_(True) for _ in range(2))
        count = sum(p.numel() for p in split.parameters())
        expected = gradients(name, whole, direct)
        runtime.shard(split, registry.get(name).spec.blocks)
        for kind, run in (("plain", direct), ("checkpointed", checkpointed(direct, cpu_offload=False))):
            found = gradients(name, split, run)
            assert found.keys() == expected.keys()
            error = max(float((found[k] - e).norm() / e.norm().clamp(min=1e-6)) for k, e in expected.items())
            told[f"{name} {kind}"] = error
        told[f"{name} share"] = sum(shards.own_part(p).numel() for p in split.parameters()) / count
        whole_state = {key: value.clone() for key, value in whole.state_dict().items()}
        with torch.no_grad():
            for key, parameter in split.named_parameters():
                parameter.zero_().copy_(shards.like(whole_state[key], parameter))
        assert all(torch.equal(shards.whole(p), whole_state[key]) for key, p in split.named_parameters())
    (folder / f"told{runtime.rank}.json").write_text(json.dumps(told))
    runtime.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
