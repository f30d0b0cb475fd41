"""The command lines of the configuration page, as they stand there but for the paths of models and data.

A working folder has what the page's user has: `src`, `config.toml`, a transformer and its caches. Lines of
`accelerate launch` are taken apart by accelerate's own parser and run in this process; one runs as a process, as do, in
the slow tier, the lines that compile with the inductor.
"""

import logging
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from musubi_tuner.config.show import toml_value
from training_place import make_place

ROOT = Path(__file__).parents[2]

SECTIONS = {
    "optimizer": {"optimizer_type": "AdamW", "learning_rate": 1e-4},
    "training": {"max_train_epochs": 10, "save_every_n_epochs": 2, "mixed_precision": "bf16"},
    "output": {"output_name": "my_lora", "logging_dir": "./logs"},
}
"""The page's option file beside its paths and the adapter, which stand at the top."""


def option_file(**top: object) -> str:
    """The file as text."""
    top |= {"network_module": "networks.lora", "network_dim": 32, "network_alpha": 16}
    lines = [f"{key} = {toml_value(value)}" for key, value in top.items()]
    for section, values in SECTIONS.items():
        lines += [f"[{section}]", *(f"{key} = {toml_value(value)}" for key, value in values.items())]
    return "\n".join(lines)


LAUNCH = "accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 src/musubi_tuner/hv_train_network.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A tiny transformer and caches by family; twelve single blocks, so that there is one from the tenth on."""
    places = {
        "hv": ("hunyuan_video", {"num_single_blocks": 12}),
        "small": ("hunyuan_video", {"num_double_blocks": 1, "num_single_blocks": 1}),
        "wan": ("wan", {}),
    }
    return {key: make_place(tmp_path_factory.mktemp(key), name, **sizes) for key, (name, sizes) in places.items()}


@pytest.fixture
def work(models, tmp_path, monkeypatch) -> Path:
    """The working folder, with the page's option file."""
    (tmp_path / "src").symlink_to(ROOT / "src")
    place = models["small"]
    paths = {"dit": place / "dit.safetensors", "dataset_config": place / "data.toml", "output_dir": tmp_path / "out"}
    (tmp_path / "config.toml").write_text(option_file(**paths), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


def environment() -> dict[str, str]:
    bin_folder = str(Path(sys.executable).parent)  # `accelerate` and `python` are found there
    return {**os.environ, "PATH": bin_folder + os.pathsep + os.environ["PATH"], "OMP_NUM_THREADS": "1"}


@pytest.fixture
def shell(work, models, monkeypatch):
    """Runs a line in this process, as a shell and accelerate would, with `...` in it filled in; gives its exit code."""

    def run(line: str, *, steps: int = 2, fill: bool = True) -> int:
        place = models["wan" if "/wan_" in line else "hv"]
        rest = f"--dataset_config {place / 'data.toml'} --output_dir out --output_name my_lora --seed 1"
        rest += f" --max_train_steps {steps} --max_data_loader_n_workers 0 --learning_rate 1e-2"
        line = line.replace("--dit ...", f"--dit {place / 'dit.safetensors'}")
        if "--dit " not in line:
            rest = f"--dit {place / 'dit.safetensors'} {rest}"
        line = line.replace("accelerate launch ...", LAUNCH).removesuffix(" ...")
        words = [*shlex.split(line.replace(" ... ", " ")), *(shlex.split(rest) if fill else [])]
        if words[:2] == ["accelerate", "launch"]:
            from accelerate.commands.launch import launch_command_parser

            launched = launch_command_parser().parse_args(words[2:])
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched.mixed_precision or "no")
            script, arguments = launched.training_script, launched.training_script_args
        else:
            script, arguments = words[1], words[2:]
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
        return ended.value.code

    return run


def metadata(path: str = "out/my_lora.safetensors") -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def modules(path: str = "out/my_lora.safetensors") -> set[str]:
    return {key.removesuffix(".alpha") for key in load_file(path) if key.endswith(".alpha")}


def check_files_of_the_option_file(work: Path, rate: str) -> None:
    names = sorted(path.name for path in (work / "out").iterdir())
    assert names == [*(f"my_lora-{n:06d}.safetensors" for n in (2, 4, 6, 8)), "my_lora.safetensors"]
    told = metadata()
    expected = {"ss_network_dim": "32", "ss_network_alpha": "16.0", "ss_learning_rate": rate, "ss_epoch": "10"}
    assert expected.items() <= told.items()
    assert (told["ss_mixed_precision"], told["ss_optimizer"]) == ("bf16", "torch.optim.adamw.AdamW")
    (log,) = (work / "logs").iterdir()
    assert list(log.glob("network_train/events.out*"))


def test_the_page_s_option_file_under_accelerate(work):
    done = subprocess.run(
        ["bash", "-c", f"{LAUNCH} --config_file config.toml"],
        cwd=work,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    check_files_of_the_option_file(work, "0.0001")


def test_the_command_line_wins_over_the_file_whose_ending_may_be_left_out(shell, work):
    line = "accelerate launch --mixed_precision bf16 src/musubi_tuner/hv_train_network.py"
    assert shell(f"{line} --config_file config --learning_rate 2e-4", fill=False) == 0
    check_files_of_the_option_file(work, "0.0002")


DOUBLE = {"lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_1_txt_mlp_fc2"}


@pytest.mark.parametrize(
    ("words", "count", "present", "absent"),
    [
        ("", 2 * 8 + 12 * 2, DOUBLE, "modulation"),
        ("--network_args \"exclude_patterns=[r'.*single_blocks.*']\"", 2 * 8, DOUBLE, "single_blocks"),
        (
            "--network_args \"exclude_patterns=[r'.*']\" "
            "\"include_patterns=[r'.*single_blocks\\.\\d{2}\\.linear.*']\"",
            2 * 2,
            {"lora_unet_single_blocks_10_linear1", "lora_unet_single_blocks_11_linear2"},
            "double_blocks",
        ),
        (
            "--network_args \"exclude_patterns=[r'.*single_blocks.*', r'.*double_blocks\\.[0-9]\\..*']\" "
            "\"include_patterns=[r'.*single_blocks\\.0\\.linear.*']\"",
            2,
            {"lora_unet_single_blocks_0_linear1"},
            "double_blocks",
        ),
    ],
    ids=["default", "double", "single from 10", "both"],
)  # fmt: skip
def test_target_modules_are_those_of_the_patterns(shell, words, count, present, absent):
    line = f"{LAUNCH} --dit ... --network_module networks.lora --network_dim 32 {words} ..."
    assert shell(line, steps=1) == 0
    found = modules()
    assert len(found) == count
    assert present <= found
    assert not [name for name in found if absent in name]


def test_network_args_of_the_page(shell, caplog, capfd):
    start = f"{LAUNCH} --dit ... --network_module networks.lora --network_dim 32 --network_args"
    with caplog.at_level(logging.INFO):
        assert shell(f'{start} "verbose=True" "rank_dropout=0.1" ...') == 0
    assert "single_blocks.11.linear2" in caplog.text + capfd.readouterr().err
    assert metadata()["ss_network_args"] == '{"rank_dropout": 0.1, "verbose": true}'
    assert shell(f'{start} "key1=value1" "key2=value2" ...') == 2
    assert "key1" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (f'{LAUNCH} --dit ... --network_module networks.lora --network_dim 32 --network_args "loraplus_lr_ratio=4" ...',
         {"ss_network_args": '{"loraplus_lr_ratio": 4.0}'}),
        ("accelerate launch ... --timestep_sampling logsnr --logit_mean -6.0 --logit_std 2.0",
         {"ss_timestep_sampling": "logsnr", "ss_logit_mean": "-6.0", "ss_logit_std": "2.0"}),
        ("accelerate launch ... --timestep_sampling qinglong_flux --logit_mean -6.0 --logit_std 2.0",
         {"ss_timestep_sampling": "qinglong_flux"}),
        ("accelerate launch ... --min_timestep 500 --max_timestep 1000", {"modelspec.timestep_range": "500,1000"}),
        ("accelerate launch ... --min_timestep 0 --max_timestep 500", {"modelspec.timestep_range": "0,500"}),
        ("accelerate launch ... --timestep_sampling shift --discrete_flow_shift 3.0 "
         "--min_timestep 200 --max_timestep 800 --preserve_distribution_shape",
         {"modelspec.timestep_range": "200,800"}),
        ("accelerate launch ... --num_timestep_buckets 5", {"ss_steps": "2"}),
        ("accelerate launch ... --optimizer_type schedulefree.AdamWScheduleFree "
         '--optimizer_args "weight_decay=0.01" "betas=(0.9,0.95)"',
         {"ss_optimizer":
          "schedulefree.adamw_schedulefree.AdamWScheduleFree(weight_decay=0.01,betas=(0.9,0.95))"}),
        ('accelerate launch ... --lr_scheduler rex --lr_scheduler_args "rex_alpha=0.1" "rex_beta=0.9"',
         {"ss_lr_scheduler": "rex"}),
        ("accelerate launch --mixed_precision bf16 src/musubi_tuner/wan_train_network.py ... --fp8_base --fp8_scaled",
         {"ss_fp8_base": "True", "ss_base_model_version": "wan"}),
    ],
    ids=["lora+", "logsnr", "qinglong", "late", "early", "cut", "buckets", "schedulefree", "rex", "fp8"],
)  # fmt: skip
def test_lines_of_the_page_train(shell, line, told):
    assert shell(line) == 0
    assert told.items() <= metadata().items()
    ups = [tensor for key, tensor in load_file("out/my_lora.safetensors").items() if "lora_up" in key]
    assert all(tensor.isfinite().all() for tensor in ups)
    assert any(tensor.abs().max() > 0 for tensor in ups)


def test_what_the_page_refuses(shell, capfd):
    """Scaled FP8 without its base, and the range that stands under the page's last two plots (a slip of the pen)."""
    line = "accelerate launch --mixed_precision bf16 src/musubi_tuner/wan_train_network.py ... --fp8_scaled"
    assert shell(line) == 2
    assert "give both" in capfd.readouterr().err
    assert shell("accelerate launch ... --min_timestep 500 --max_timestep 100") == 2
    assert "min_timestep = 500, max_timestep = 100" in capfd.readouterr().err


def test_logs_lie_where_the_page_says_and_tensorboard_reads_them(shell, work):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    assert shell("accelerate launch ... --logging_dir=logs --log_prefix=lora_setting1_", steps=3) == 0
    (folder,) = (work / "logs").iterdir()
    assert folder.name.startswith("lora_setting1_20")
    board = EventMultiplexer().AddRunsFromDirectory("logs").Reload()  # what `tensorboard --logdir=logs` does
    ((run, tags),) = board.Runs().items()
    assert run == f"{folder.name}/network_train"
    assert {"loss/current", "loss/average", "lr/unet"} <= set(tags["scalars"])


def test_the_distribution_is_drawn(shell, work):
    line = "accelerate launch ... --timestep_sampling shift --discrete_flow_shift 3.0 --show_timesteps image"
    assert shell(line) == 0
    with Image.open(work / "out/my_lora-timesteps.png") as picture:
        assert picture.size[0] > 600
    assert not (work / "out/my_lora.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "max-autotune --dynamo_fullgraph"])
def test_the_lines_that_compile(work, models, mode):
    line = f"python src/musubi_tuner/hv_train_network.py --dynamo_backend INDUCTOR --dynamo_mode {mode}"
    rest = "--config_file config.toml --max_train_epochs 1 --mixed_precision no"
    done = subprocess.run(
        ["bash", "-c", f"{line} {rest}"], cwd=work, env=environment(), capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2 blocks are compiled with inductor" in done.stderr
    assert (work / "out/my_lora.safetensors").is_file()
