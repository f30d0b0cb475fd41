"""Every way to start a command gives the same command: file path, `src/` path, the scripts' folder, `-m`, `musubi`,
each also under `accelerate launch`. Each is asked for its resolved options, which is cheap and shows that the command
line arrived whole. Forms and scripts are paired so that each form and each script is started at least once.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "wan_cache_latents": ("cache_latents", ["--dataset_config", "d.toml", "--vae", "v.pth"]),
    "wan_cache_text_encoder_outputs": ("cache_text", ["--dataset_config", "d.toml", "--t5", "t.pth"]),
    "wan_train_network": ("train", ["--dataset_config", "d.toml", "--dit", "a b.safetensors"]),
    "wan_generate_video": ("generate", ["--prompt", "a cat --w 64", "--dit", "d.safetensors"]),
    "cache_latents": ("cache_latents", ["--dataset_config", "d.toml", "--vae", "v.pt"]),
    "cache_text_encoder_outputs": ("cache_text", ["--dataset_config", "d.toml", "--text_encoder1", "t"]),
    "hv_train_network": ("train", ["--dataset_config", "d.toml", "--dit", "d.pt"]),
    "hv_train": ("train", ["--dataset_config", "d.toml", "--dit", "d.pt"]),
    "hv_generate_video": ("generate", ["--prompt", "a cat", "--dit", "d.pt"]),
    "fpack_cache_latents": ("cache_latents", ["--dataset_config", "d.toml", "--image_encoder", "s"]),
    "fpack_cache_text_encoder_outputs": ("cache_text", ["--dataset_config", "d.toml", "--text_encoder1", "t"]),
    "fpack_train_network": ("train", ["--dataset_config", "d.toml", "--dit", "d.safetensors"]),
    "fpack_generate_video": ("generate", ["--prompt", "a cat", "--image_path", "a b.png"]),
}


def musubi() -> str:
    """The installed console command, beside this interpreter; where nothing is installed, its one line of Python."""
    return shutil.which("musubi", path=str(Path(sys.executable).parent)) or str(
        ROOT / "python/musubi_tuner/__main__.py"
    )


def accelerate(*rest: str) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1"]
    return [
        *launch,
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        *rest,
    ]


def form(name: str, script: str) -> tuple[list[str], Path]:
    """Command and working directory of a form."""
    kind = SCRIPTS[script][0]
    file = f"python/musubi_tuner/{script}.py"
    forms = {
        "file": ([sys.executable, file], ROOT),
        "src file": ([sys.executable, f"src/musubi_tuner/{script}.py"], ROOT),
        "scripts' folder": ([sys.executable, f"{script}.py"], ROOT / "python/musubi_tuner"),
        "absolute file": ([sys.executable, str(ROOT / file)], ROOT.parent),
        "module": ([sys.executable, "-m", f"musubi_tuner.{script}"], ROOT),
        "package": ([sys.executable, "-m", "musubi_tuner", kind, "wan"], ROOT),
        "musubi script": ([sys.executable, musubi(), script], ROOT),
        "musubi kind": ([sys.executable, musubi(), kind, "wan"], ROOT),
        "accelerate file": (accelerate(file), ROOT),
        "accelerate src file": (accelerate(f"src/musubi_tuner/{script}.py"), ROOT),
        "accelerate module": (accelerate("-m", f"musubi_tuner.{script}"), ROOT),
        "accelerate package": (accelerate("-m", "musubi_tuner", kind, "wan"), ROOT),
        "accelerate musubi": (accelerate(musubi(), kind, "wan"), ROOT),
    }
    return forms[name]


MATRIX = [
    ("file", "wan_train_network"),
    ("src file", "wan_cache_latents"),
    ("scripts' folder", "wan_generate_video"),
    ("absolute file", "wan_cache_text_encoder_outputs"),
    ("module", "wan_cache_text_encoder_outputs"),
    ("package", "wan_generate_video"),
    ("musubi script", "wan_cache_latents"),
    ("musubi kind", "wan_train_network"),
    ("accelerate file", "wan_train_network"),
    ("accelerate src file", "wan_train_network"),
    ("accelerate module", "wan_cache_latents"),
    ("accelerate package", "wan_cache_text_encoder_outputs"),
    ("accelerate musubi", "wan_generate_video"),
    ("src file", "cache_latents"),
    ("module", "cache_text_encoder_outputs"),
    ("accelerate src file", "hv_train_network"),
    ("file", "hv_train"),
    ("scripts' folder", "hv_generate_video"),
    ("musubi script", "fpack_cache_latents"),
    ("absolute file", "fpack_cache_text_encoder_outputs"),
    ("accelerate src file", "fpack_train_network"),
    ("scripts' folder", "fpack_generate_video"),
]


def start(name: str, script: str, argv: list[str]) -> subprocess.CompletedProcess[str]:
    command, folder = form(name, script)
    paths = [str(ROOT / "python"), str(ROOT / "kernels")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env["PYTHONPATH"] = "" if "file" in name or "folder" in name else os.pathsep.join(paths)
    return subprocess.run(
        [*command, *argv], cwd=folder, env=env, capture_output=True, text=True, timeout=180, check=False
    )


@pytest.fixture(scope="module")
def started() -> dict[tuple[str, str], subprocess.CompletedProcess[str]]:
    """All of the matrix, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        argv = ["--seed", "7", "--print_config", "json"]
        runs = {pair: pool.submit(start, *pair, [*SCRIPTS[pair[1]][1], *argv]) for pair in MATRIX}
        return {pair: run.result() for pair, run in runs.items()}


@pytest.mark.parametrize("pair", MATRIX, ids=" ".join)
def test_every_form_starts_the_command_with_its_options(started, pair):
    done, (kind, given) = started[pair], SCRIPTS[pair[1]]
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout[done.stdout.index("{") :])
    assert told["command"] in (pair[1], f"musubi {pair[1]}", f"musubi {kind} wan")
    for flag, value in zip(given[::2], given[1::2], strict=True):
        found = told["options"][flag.removeprefix("--")]
        assert found == {"value": value, "source": "command line"}
    assert "Traceback" not in done.stderr


def test_every_script_and_every_form_is_in_the_matrix():
    assert {script for _, script in MATRIX} == set(SCRIPTS)
    kinds = {"file", "src", "module", "package", "musubi", "accelerate"}
    assert kinds <= {word for name, _ in MATRIX for word in name.split()}


def test_a_users_fault_keeps_code_2_and_fails_under_accelerate():
    with ThreadPoolExecutor(2) as pool:
        alone = pool.submit(start, "file", "wan_train_network", ["--dataset_confg", "x"])
        launched = pool.submit(start, "accelerate file", "wan_train_network", ["--dataset_confg", "x"])
    assert alone.result().returncode == 2
    said = "wan_train_network: error: --dataset_confg is not an option of this command; did you mean --dataset_config?"
    assert alone.result().stderr.strip() == said
    assert launched.result().returncode != 0
    assert said in launched.result().stderr
