"""Loading a bf16 checkpoint into FP8 weights: CPU seconds and anonymous memory, against the usual path.

Each contestant runs in a process of its own on one thread, over the same file, which is in the page cache. The usual
path reads a whole tensor, computes scales and codes with torch operations and keeps them. Memory is the most anonymous
memory (RssAnon) above that of the start, beside the size of the result.

    python benchmarks/load.py                  # a file of 2 GiB
    python benchmarks/load.py --gib 0.25
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import nn

from cpu_clock import machine
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import open_checkpoint

WIDTH: Final = 4096
LAYER_BYTES: Final = 2 * WIDTH * WIDTH
LEAST_GAIN: Final = 11.0
MOST_EXTRA: Final = 64 << 20


class Targets:
    """Every block's linear layers."""

    include = ("blocks",)
    exclude = ()


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))


def write_checkpoint(path: Path, layers: int) -> None:
    """A safetensors file of `layers` weights, the same random bytes again and again."""
    header = {
        f"blocks.{i}.weight": {
            "dtype": "BF16",
            "shape": [WIDTH, WIDTH],
            "data_offsets": [i * LAYER_BYTES, (i + 1) * LAYER_BYTES],
        }
        for i in range(layers)
    }
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(layers):
            file.write(memoryview(weight.view(torch.uint8).numpy()))


def load_ours(path: Path, layers: int) -> int:
    with torch.device("meta"):
        model = Model(layers)
    with open_checkpoint(path) as checkpoint:
        policy = WeightPolicy(torch.bfloat16, Fp8Policy(Targets()))
        return materialize(model, checkpoint, policy=policy, progress=False).bytes_final


def load_usual(path: Path, layers: int) -> int:
    from safetensors import safe_open

    kept = []
    with safe_open(path, "pt") as file:
        for i in range(layers):
            w = file.get_tensor(f"blocks.{i}.weight")
            groups = w.view(WIDTH, -1, 64)
            scale = (groups.abs().amax(-1, keepdim=True) / 448.0).clamp(min=1e-8).float()
            codes = torch.nan_to_num(groups.float() / scale, 0.0).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
            kept.append((codes.view(w.shape), scale.to(w.dtype)))
    return sum(q.nbytes + s.nbytes for q, s in kept)


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("RssAnon:")).split()[1]) * 1024


def alone(which: str, path: Path, layers: int) -> None:
    """What the child process does: load, and print seconds, result and peak in bytes."""
    torch.set_num_threads(1)
    load = load_ours if which == "ours" else load_usual
    start = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.thread_time()
    result = load(path, layers)
    seconds = time.thread_time() - began
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "result": result, "peak": max(peak, anonymous_bytes()) - start}))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints both rows; exit status 1 where ours misses its gate in time or memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        alone(options.child[0], Path(options.child[1]), int(options.child[2]))
        return 0
    print(machine())
    layers = max(1, round(options.gib * 2**30 / LAYER_BYTES))
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_checkpoint(path, layers)
        for which in ("ours", "usual"):
            command = [sys.executable, __file__, "--child", which, str(path), str(layers)]
            rows[which] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print("| contestant | CPU s | result MB | RssAnon above the result, MB |\n|---|---|---|---|")
    for which, row in rows.items():
        extra = (row["peak"] - row["result"]) / 1e6
        print(f"| {which} | {row['seconds']:.2f} | {row['result'] / 1e6:.0f} | {extra:.0f} |")
    gain = rows["usual"]["seconds"] / rows["ours"]["seconds"]
    print(f"{gain:.1f} times less CPU (gate {LEAST_GAIN:g})")
    return 0 if gain >= LEAST_GAIN and rows["ours"]["peak"] - rows["ours"]["result"] <= MOST_EXTRA else 1


if __name__ == "__main__":
    sys.exit(main())
