"""Run as a program: load a generated BF16 checkpoint under fp8_scaled, and print what the process held meanwhile.

Arguments: folder, size in MiB. Output: JSON with `final` (bytes of the loaded model) and `peak` (most anonymous
memory above the start, sampled every 2 ms). The file repeats one random block, so making it is cheap.
"""

import json
import struct
import sys
import threading
import time
from pathlib import Path

import torch
from torch import nn

from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import open_checkpoint

WIDTH = 2048


class Targets:
    include = ("blocks",)
    exclude = ("norm",)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)


class Model(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 64)


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not tell RssAnon")


def write_checkpoint(path: Path, model: nn.Module) -> None:
    """A BF16 safetensors file with the model's tensors, written from one repeated block."""
    header, offset = {}, 0
    for name, tensor in model.state_dict().items():
        size = tensor.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    data = memoryview(block.view(torch.uint8).numpy())
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while offset:
            offset -= file.write(data[: min(offset, len(data))])


def main() -> None:
    torch.set_num_threads(1)
    folder, mebibytes = Path(sys.argv[1]), int(sys.argv[2])
    blocks = mebibytes // (2 * 4 * WIDTH * WIDTH * 2 >> 20)
    with torch.device("meta"):
        model = Model(blocks)
    write_checkpoint(folder / "model.safetensors", model)
    start = anonymous_bytes()
    peak, done = start, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    policy = WeightPolicy(torch.bfloat16, Fp8Policy(Targets()))
    with open_checkpoint(folder / "model.safetensors") as checkpoint:
        report = materialize(model, checkpoint, policy=policy, progress=False)
    done.set()
    watcher.join()
    figures = {
        "read": report.bytes_read,
        "final": report.bytes_final,
        "layers": len(report.fp8),
        "peak": max(peak, anonymous_bytes()) - start,
        "seconds": report.seconds,
    }
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
