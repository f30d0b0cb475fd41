"""Run as a program: merge a LoRA into a generated BF16 checkpoint on disk, and print what the process held meanwhile.

Arguments: folder, size in MiB. Output: JSON with `read` and `written` (bytes of tensor data) and `peak` (most anonymous
memory above the start).
"""

import json
import sys
import threading
import time
from pathlib import Path

import torch
from memory_probe import WIDTH, Model, anonymous_bytes, write_checkpoint

from musubi_tuner.adapters.merge import LoraMerge
from musubi_tuner.weights.keys import same
from musubi_tuner.weights.merged import save_merged
from musubi_tuner.weights.reader import open_checkpoint


def main() -> None:
    torch.set_num_threads(1)
    folder, mebibytes = Path(sys.argv[1]), int(sys.argv[2])
    blocks = mebibytes // (2 * 4 * WIDTH * WIDTH * 2 >> 20)
    with torch.device("meta"):
        model = Model(blocks)
    write_checkpoint(folder / "model.safetensors", model)
    sizes = {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    lora = {
        f"blocks.{n}.{name}.lora_{half}.weight": torch.zeros(4, k) if half == "A" else torch.zeros(m, 4)
        for n in range(blocks)
        for name, (k, m) in sizes.items()
        for half in "AB"
    }
    merges = [LoraMerge(lora, strict=True)]
    peak, done = (start := anonymous_bytes()), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with open_checkpoint(folder / "model.safetensors") as checkpoint:
        read = sum(info.nbytes for info in checkpoint.header.tensors.values())
        save_merged(folder / "merged.safetensors", checkpoint, merges, rename=same, progress=False)
    done.set()
    watcher.join()
    with open_checkpoint(folder / "merged.safetensors") as checkpoint:
        written = sum(info.nbytes for info in checkpoint.header.tensors.values())
    sys.stdout.write(json.dumps({"read": read, "written": written, "peak": peak - start}) + "\n")


if __name__ == "__main__":
    main()
