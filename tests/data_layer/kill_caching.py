"""Run by `test_kill.py` as `kill_caching.py FOLDER KILLS SEED`: caching, killed at random moments and run again.

Every attempt is a forked process that caches the dataset of FOLDER and dies by SIGKILL within 0.4 seconds: in the scan,
while decoding, encoding, writing or renaming. What is left after each kill is written to FOLDER/kills.json.
"""

import json
import logging
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from musubi_tuner.config.options import parse
from musubi_tuner.data import build_cache

sys.path.insert(0, str(Path(__file__).parent))

from conftest import ToyFamily  # the folder of this file comes first


class SlowFamily(ToyFamily):
    """Takes a moment for each batch, so that there is time to be killed in."""

    def encode_latents(self, items, vae, encoders=None):
        time.sleep(0.004)
        return super().encode_latents(items, vae, encoders)

    def encode_condition(self, items, encoders):
        time.sleep(0.002)
        return super().encode_condition(items, encoders)


def cache(folder: Path) -> None:
    words = ["--dataset_config", str(folder / "data.toml"), "--device", "cpu", "--num_workers", "2"]
    vae = ["--vae", str(folder / "vae"), "--vae_dtype", "float32"]
    family = SlowFamily()
    build_cache.cache_latents(family, parse(build_cache.LATENT_GROUPS, [*words, *vae], prog="", description=""))
    build_cache.cache_text(family, parse(build_cache.TEXT_GROUPS, words, prog="", description=""))


def killed(folder: Path, after: float) -> bool:
    """Whether a run of the commands was killed `after` seconds, and not finished before."""
    pid = os.fork()
    if pid == 0:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 until the process ends
        cache(folder)
        os._exit(0)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def state(folder: Path) -> dict:
    """Whole files with their times, unreadable ones, and temporary ones."""
    found: dict = {"whole": {}, "unreadable": [], "temporary": 0}
    for path in sorted((folder / "c").glob("*")) if (folder / "c").is_dir() else ():
        if path.suffix == ".tmp":
            found["temporary"] += 1
            continue
        try:
            load_file(path)
            found["whole"][path.name] = path.stat().st_mtime_ns
        except Exception as error:  # any failure to read is what this looks for
            found["unreadable"].append(f"{path.name}: {error}")
    return found


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    draw = random.Random(seed)
    rows: list[dict] = []
    start = 0
    for _ in range(10 * kills):
        if sum(row["killed"] for row in rows) == kills:
            break
        hit = killed(folder, draw.uniform(0.01, 0.4))
        rows.append({"killed": hit, "round": start, **state(folder)})
        if not hit:  # all is made: begin again
            start += 1
            shutil.rmtree(folder / "c")
    (folder / "kills.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
