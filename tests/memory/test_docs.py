"""The figures of docs/memory.md are those that the plan gives for the published shapes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from musubi_tuner.families import registry
from musubi_tuner.families.framepack.model import FramePackConfig, FramePackModel
from musubi_tuner.families.hunyuan_video.model import HunyuanVideoConfig, HunyuanVideoModel
from musubi_tuner.families.wan.model import WanConfig, WanModel
from musubi_tuner.memory.plan import shared_out
from musubi_tuner.memory.resting import resting_bytes
from musubi_tuner.nn.linear import fp8_slot, replace_linears
from musubi_tuner.weights.policy import Fp8Policy

PAGE = (Path(__file__).parents[2] / "docs/memory.md").read_text(encoding="utf-8")
TWO = {"hidden_size": 3072, "num_heads": 24, "num_double_blocks": 20, "num_single_blocks": 40}
MODELS = {
    "Wan 14B": ("wan", lambda: WanModel(WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40))),
    "HunyuanVideo": ("hunyuan_video", lambda: HunyuanVideoModel(HunyuanVideoConfig(**TWO))),
    "FramePack": ("framepack", lambda: FramePackModel(FramePackConfig(**TWO))),
}


def rows() -> list[tuple[str, int, float, float]]:
    """(model, N, GB that rest, GB on the device) of the table; an empty first cell repeats the one above."""
    found, model = [], ""
    for name, number, rests, device in re.findall(
        r"^\| (.*?) ?\| (\d+) \| (\S+) GB \| (\S+) GB \|$", PAGE, re.MULTILINE
    ):
        model = name or model
        found.append((model, int(number), float(rests), float(device)))
    return found


def sizes(model: str) -> tuple[float, list[tuple[int, int]]]:
    """Bytes of all weights, and (number, bytes) of each list of blocks."""
    name, precision = model.split(", ")
    family, make = MODELS[name]
    spec = registry.get(family).spec
    with torch.device("meta"):
        dit: nn.Module = make().to(torch.bfloat16).requires_grad_(False)
    if precision == "FP8":
        policy = Fp8Policy(spec.fp8)
        replace_linears(dit, lambda path, _: policy.selects(f"{path}.weight"), lambda _, linear: fp8_slot(linear))
    lists = [list(dit.get_submodule(path).children()) for path in spec.blocks]
    whole = sum(tensor.nbytes for tensor in (*dit.parameters(), *dit.buffers()))
    return whole, [(len(blocks), resting_bytes(blocks[0])) for blocks in lists]


@pytest.mark.parametrize("model", dict.fromkeys(row[0] for row in rows()))
def test_the_table_is_computed_from_the_shapes(model):
    whole, lists = sizes(model)
    found = [row for row in rows() if row[0] == model]
    for _, number, rests, device in found:
        shares = shared_out(number, [count for count, _ in lists])
        assert shares is not None
        host = sum(share * size for share, (_, size) in zip(shares, lists, strict=True))
        slots = 2 * max((size for share, (_, size) in zip(shares, lists, strict=True) if share), default=0)
        assert (host / 1e9, (whole - host + slots) / 1e9) == pytest.approx((rests, device), abs=0.051)


def test_the_table_has_the_models_that_it_should():
    assert len(rows()) == 16
    assert {name for model, *_ in rows() for name in [model.split(", ")[0]]} == set(MODELS)


def test_the_benchmark_works_where_nothing_can_be_timed():
    path = Path(__file__).parents[2] / "benchmarks/block_swap.py"
    done = subprocess.run([sys.executable, str(path), "--smoke", "--fp8"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 11
