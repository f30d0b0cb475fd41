"""Caching that is killed at random moments: no unreadable file, nothing made twice, the same files in the end."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from musubi_tuner import cli
from musubi_tuner.config.options import parse
from musubi_tuner.data.build_cache import LATENT_GROUPS, TEXT_GROUPS, cache_latents, cache_text

HERE = Path(__file__).parent
ITEMS = 60


def cache(family, folder, *more):
    words = ["--dataset_config", str(folder / "data.toml"), "--device", "cpu", *more]
    vae = ["--vae", str(folder / "vae"), "--vae_dtype", "float32"]
    cache_latents(family, parse(LATENT_GROUPS, [*words, *vae], prog="", description=""))
    cache_text(family, parse(TEXT_GROUPS, words, prog="", description=""))


def prepare(folder, make_picture, count=ITEMS):
    (folder / "p").mkdir(parents=True)
    for i in range(count):
        make_picture(folder / "p" / f"{i:02}.png", (40 + 8 * (i % 4), 48), colour=i, caption=f"caption {i}")
    (folder / "vae").write_bytes(b"weights")
    (folder / "data.toml").write_text(
        f'[[datasets]]\nimage_directory = "{folder}/p"\ncache_directory = "{folder}/c"\n'
        "resolution = 48\nenable_bucket = true\nbatch_size = 2\n"
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "c").glob("*.safetensors"))}


def test_ctrl_c_ends_caching_with_code_130_and_keeps_what_is_whole(tmp_path, family, make_picture, capsys):
    prepare(tmp_path, make_picture, count=12)
    encode, calls = family.encode_latents, []

    def interrupted(items, vae, encoders=None):
        calls.append(len(items))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(items, vae, encoders)

    family.encode_latents = interrupted

    def work() -> int:
        cache(family, tmp_path)
        return 0

    assert cli.guarded("musubi", work) == 130
    assert "stopped by Ctrl-C" in capsys.readouterr().err
    made = contents(tmp_path)
    assert len(made) == sum(calls[:3])
    assert not list((tmp_path / "c").glob(".*.tmp"))
    assert cli.guarded("musubi", work) == 0
    assert len(contents(tmp_path)) == 24
    assert made.items() <= contents(tmp_path).items()
    assert sum(calls[4:]) == 12 - len(made), "nothing is encoded twice"


@pytest.mark.parametrize("kills", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_caching_survives_sigkill_at_any_moment(tmp_path, family, make_picture, kills):
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    prepare(folder, make_picture)
    prepare(whole, make_picture)
    cache(family, whole)
    root = HERE.parents[1]
    paths = os.pathsep.join(str(root / name) for name in ("python", "kernels"))
    command = [sys.executable, str(HERE / "kill_caching.py"), str(folder), str(kills), "11"]
    subprocess.run(command, check=True, timeout=400, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    rows = json.loads((folder / "kills.json").read_text())
    assert sum(row["killed"] for row in rows) == kills
    assert [row["unreadable"] for row in rows if row["unreadable"]] == []
    assert any(0 < len(row["whole"]) < 2 * ITEMS for row in rows)  # kills fell inside the work
    assert all(len(row["whole"]) == 2 * ITEMS for row in rows if not row["killed"])
    for before, after in itertools.pairwise(rows):
        if before["round"] == after["round"]:
            assert before["whole"].items() <= after["whole"].items()  # what was whole is not written again
    cache(family, folder, "--prune_cache")
    assert list((folder / "c").glob("*.tmp")) == list((folder / "c").glob(".*.tmp")) == []
    assert contents(folder) == contents(whole)
    assert len(contents(whole)) == 2 * ITEMS
