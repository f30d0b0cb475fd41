"""Loading a bf16 checkpoint into FP8 weights: CPU seconds and anonymous memory, against the usual path.

Each contestant runs in a process of its own on one thread, over the same file, which is in the page cache, and they
take turns. The usual path reads a whole tensor, computes scales and codes with torch operations and keeps them. Time is
that of all the process's threads, the lower quartile of the rounds; memory the most anonymous memory (RssAnon) above
that of the start in any round, beside the size of the result. Nothing is reported where a loaded weight is not the
file's, but for its rounding to FP8.

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
MOST_ERROR: Final = 0.03
"""Relative norm of what FP8 in blocks of 64 makes of normal weights; it is 0.025."""
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


def made() -> torch.Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()


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
    weight = made()
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(layers):
            file.write(memoryview(weight.view(torch.uint8).numpy()))


Loaded = list[tuple[torch.Tensor, torch.Tensor]]
"""Codes and scales of every layer."""


def load_ours(path: Path, layers: int) -> Loaded:
    with torch.device("meta"):
        model = Model(layers)
    with open_checkpoint(path) as checkpoint:
        policy = WeightPolicy(torch.bfloat16, Fp8Policy(Targets()))
        materialize(model, checkpoint, policy=policy, progress=False)
    return [(layer.weight, layer.scale_weight) for layer in model.blocks]


def load_usual(path: Path, layers: int) -> Loaded:
    from safetensors import safe_open

    kept = []
    with safe_open(path, "pt") as file:
        for i in range(layers):
            w = file.get_tensor(f"blocks.{i}.weight")
            groups = w.view(WIDTH, -1, 64)
            scale = (groups.abs().amax(-1, keepdim=True) / 448.0).clamp(min=1e-8).float()
            codes = torch.nan_to_num(groups.float() / scale, 0.0).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
            kept.append((codes.view(w.shape), scale.to(w.dtype)))
    return kept


def wrong(loaded: Loaded, layers: int) -> float:
    """The largest relative error of the first and the last layer against what the file was made of."""
    exact = made().double()
    q, scale = zip(loaded[0], loaded[-1], strict=True)
    if len(loaded) != layers:
        return float("inf")
    dense = [
        (a.float().view(WIDTH, -1, 64) * b.float()).view(WIDTH, WIDTH).double() for a, b in zip(q, scale, strict=True)
    ]
    return max(float((each - exact).norm() / exact.norm()) for each in dense)


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("RssAnon:")).split()[1]) * 1024


def alone(which: str, path: Path, layers: int) -> None:
    """What the child process does: load, and print seconds, result and peak in bytes, and the error."""
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
    began = time.process_time()
    loaded = load(path, layers)
    seconds = time.process_time() - began
    done.set()
    watcher.join()
    result = sum(q.nbytes + scale.nbytes for q, scale in loaded)
    row = {"seconds": seconds, "result": result, "peak": max(peak, anonymous_bytes()) - start}
    print(json.dumps(row | {"error": wrong(loaded, layers)}))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints both rows, writes load.json; exit status 1 where ours misses its gate in time or memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the file")
    parser.add_argument("--rounds", type=int, default=5, help="loads by each contestant")
    parser.add_argument("--out", default="build/bench", help="folder for load.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        alone(options.child[0], Path(options.child[1]), int(options.child[2]))
        return 0
    print(machine())
    layers = max(1, round(options.gib * 2**30 / LAYER_BYTES))
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "usual": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_checkpoint(path, layers)
        for _ in range(options.rounds):
            for which, measured in rounds.items():
                command = [sys.executable, __file__, "--child", which, str(path), str(layers)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                measured.append(json.loads(done.stdout))
    for which, measured in rounds.items():
        error = max(row["error"] for row in measured)
        if not error <= MOST_ERROR:
            print(f"not measured, {which} loads wrong weights: relative error {error:.2e}", file=sys.stderr)
            return 1
    return report({which: over(measured) for which, measured in rounds.items()}, Path(options.out))


def over(measured: list[dict[str, float]]) -> dict[str, float]:
    """Of several rounds: the lower quartile of seconds, the highest peak."""
    seconds = sorted(row["seconds"] for row in measured)[len(measured) // 4]
    return {"seconds": seconds, "result": measured[0]["result"], "peak": max(row["peak"] for row in measured)}


def report(rows: dict[str, dict[str, float]], folder: Path) -> int:
    print("| contestant | CPU s | result MB | RssAnon above the result, MB |\n|---|---|---|---|")
    for which, row in rows.items():
        extra = (row["peak"] - row["result"]) / 1e6
        print(f"| {which} | {row['seconds']:.2f} | {row['result'] / 1e6:.0f} | {extra:.0f} |")
    gain = rows["usual"]["seconds"] / rows["ours"]["seconds"]
    spare = rows["ours"]["peak"] - rows["ours"]["result"] <= MOST_EXTRA
    fast = "" if gain >= LEAST_GAIN else ": miss"
    print(
        f"{gain:.1f} times less CPU (gate {LEAST_GAIN:g}){fast}; 64 MiB over the result: {'held' if spare else 'miss'}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "load.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    return 0 if gain >= LEAST_GAIN and spare else 1


if __name__ == "__main__":
    sys.exit(main())
