"""Whole runs from options on a tiny transformer and ready caches: files, names, metadata, logs, resuming weights."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import Resolved, parse
from musubi_tuner.families import registry
from musubi_tuner.flow import keyed
from musubi_tuner.training import checks, run
from musubi_tuner.weights.write import atomic_save_safetensors
from tiny_models import TINY, tiny_dit

FAMILY = registry.get("wan")
RARE = ("--min_timestep", "990", "--preserve_distribution_shape")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with dit.safetensors, data.toml and the caches of five items of two shapes, as other tools name them."""
    root = tmp_path_factory.mktemp("run")
    state = {key: value.contiguous() for key, value in tiny_dit("wan").state_dict().items()}
    atomic_save_safetensors(root / "dit.safetensors", state, {"musubi.config": json.dumps(TINY["wan"].sizes)})
    cache = root / "cache"
    cache.mkdir()
    for i in range(5):
        width = 48 if i < 3 else 64
        latents = keyed.normal((16, 1, 4, width // 8), "run", i)
        write_cache(cache / f"p{i}_{width:04d}x0032_wan.safetensors", {f"latents_1x4x{width // 8}_float32": latents})
        write_cache(cache / f"p{i}_wan_te.safetensors", {"varlen_t5_float32": keyed.normal((2 + i % 3, 24), "text", i)})
    (root / "data.toml").write_text(
        "[general]\nresolution = [48, 32]\nbatch_size = 2\nenable_bucket = true\n"
        f'[[datasets]]\nimage_directory = "{root}/gone"\ncache_directory = "{cache}"\n'
    )
    return root


def write_cache(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    atomic_save_safetensors(path, tensors, {"architecture": "wan", "format_version": "1.0.1", "width": "48"})


def options_of(place: Path, out: Path, *words: str) -> Resolved:
    given = ["--dit", str(place / "dit.safetensors"), "--dataset_config", str(place / "data.toml")]
    given += ["--output_dir", str(out), "--output_name", "study", "--seed", "3", "--mixed_precision", "no"]
    groups = (*run.GROUPS, *FAMILY.option_groups("train"))
    return parse(groups, [*given, *words], prog="train", description="")


def lora(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


@pytest.mark.shows("output_dir", "output_name", "dit", "dataset_config", "save_every_n_epochs", "save_every_n_steps")
def test_a_run_leaves_the_established_files(place, tmp_path, caplog):
    """Names of epoch, step and final files; the final one continues from the same weights as the last step."""
    words = ["--network_dim", "3", "--network_alpha", "2", "--learning_rate", "1e-2", "--max_train_epochs", "3"]
    words += ["--save_every_n_epochs", "2", "--save_every_n_steps", "4", "--fp8_base", "--fp8_scaled"]
    with caplog.at_level(logging.INFO):
        run.run(FAMILY, options_of(place, tmp_path, *words))
    # 3 and 2 items of two shapes in batches of two: three batches an epoch
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "study-000002.safetensors",
        "study-step00000004.safetensors",
        "study-step00000008.safetensors",
        "study.safetensors",
    ]
    tensors, metadata = lora(tmp_path / "study.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert tensors["lora_unet_blocks_0_ffn_0.lora_down.weight"].shape == (3, 64)
    assert float(tensors["lora_unet_blocks_2_self_attn_q.alpha"]) == 2.0
    assert all(t.abs().max() > 0 for key, t in tensors.items() if "lora_up" in key)
    assert (metadata["ss_steps"], metadata["ss_epoch"], metadata["ss_max_train_steps"]) == ("9", "3", "9")
    assert lora(tmp_path / "study-000002.safetensors")[1]["ss_epoch"] == "2"
    assert "LoRA of rank 3 on 30 modules" in caplog.text
    assert "caches in" in caplog.text


@pytest.mark.shows("seed")
def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(place, tmp_path):
    files = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        words = ["--max_train_steps", "4", "--learning_rate", "1e-2", "--seed", seed, "--network_dropout", "0.3"]
        run.run(FAMILY, options_of(place, tmp_path / name, *words))
        files.append(lora(tmp_path / name / "study.safetensors")[0])
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert not torch.equal(*(f["lora_unet_blocks_0_ffn_0.lora_up.weight"] for f in files[1:]))


def test_checkpointing_and_offloading_change_no_bit(place, tmp_path):
    files = []
    for name, words in (
        ("plain", []),
        ("again", ["--gradient_checkpointing"]),
        ("kept", ["--gradient_checkpointing", "--gradient_checkpointing_cpu_offload"]),
    ):
        run.run(FAMILY, options_of(place, tmp_path / name, "--max_train_steps", "3", "--learning_rate", "1e-2", *words))
        files.append(lora(tmp_path / name / "study.safetensors")[0])
    for other in files[1:]:
        assert all(torch.equal(files[0][key], other[key]) for key in files[0])


@pytest.mark.shows("training_comment", "no_metadata")
def test_metadata_of_a_lora_file_has_the_established_keys(place, tmp_path):
    listed = json.loads((Path(__file__).parents[1] / "data/reference/lora/metadata_keys.json").read_text())
    words = ["--max_train_steps", "1", "--network_args", "exclude_patterns=[r'.*ffn.*']", "--training_comment", "a b"]
    words += ["--optimizer_args", "weight_decay=0.1", "--min_timestep", "200", "--metadata_author", "me"]
    run.run(FAMILY, options_of(place, tmp_path / "full", *words))
    metadata = lora(tmp_path / "full/study.safetensors")[1]
    # of another path: no VAE was given; guidance is not an input of this family
    expected = set(listed["training"]) - {"ss_vae_name", "ss_guidance_scale"}
    assert expected <= set(metadata)
    assert metadata["ss_optimizer"] == "torch.optim.adamw.AdamW(weight_decay=0.1)"
    assert json.loads(metadata["ss_network_args"]) == {"exclude_patterns": [".*ffn.*"]}
    assert (metadata["ss_network_module"], metadata["ss_network_dim"]) == ("networks.lora_wan", "4")
    assert metadata["ss_network_dropout"] == "None"
    assert (metadata["ss_base_model_version"], metadata["modelspec.architecture"]) == ("wan", "wan2.1/lora")
    assert (metadata["modelspec.author"], metadata["modelspec.timestep_range"]) == ("me", "200,1000")
    assert metadata["modelspec.title"] == "study"
    assert metadata["ss_sd_model_name"] == "dit.safetensors"
    assert json.loads(metadata["ss_datasets"])[0]["batch_size_per_device"] == 2
    assert not any("/" in metadata[key] for key in metadata if key.startswith("ss_") and "data" in key)
    run.run(FAMILY, options_of(place, tmp_path / "least", "--no_metadata", *words))
    least = lora(tmp_path / "least/study.safetensors")[1]
    assert {key for key in least if key.startswith("ss_")} == set(listed["minimum"])


@pytest.mark.shows("network_weights")
def test_a_run_goes_on_from_network_weights(place, tmp_path):
    """Rank and alpha come from the file; a rate of next to nothing leaves its weights."""
    first = ["--max_train_steps", "3", "--learning_rate", "1e-2", "--network_dim", "5", "--network_alpha", "2"]
    run.run(FAMILY, options_of(place, tmp_path / "one", *first))
    file = tmp_path / "one/study.safetensors"
    more = ["--max_train_steps", "1", "--learning_rate", "1e-9", "--network_weights", str(file)]
    run.run(FAMILY, options_of(place, tmp_path / "two", *more))
    before, (after, metadata) = lora(file)[0], lora(tmp_path / "two/study.safetensors")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("5", "2.0")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], atol=1e-7) for key in before)
    with pytest.raises(UserError, match="rank 5"):
        run.run(FAMILY, options_of(place, tmp_path / "three", *more, "--network_dim", "2"))


@pytest.mark.shows("full_finetune")
def test_full_fine_tuning_saves_the_checkpoint_s_own_layout(place, tmp_path):
    words = ["--full_finetune", "--max_train_steps", "3", "--learning_rate", "1e-3"]
    run.run(FAMILY, options_of(place, tmp_path, *words))
    before, after = load_file(place / "dit.safetensors"), load_file(tmp_path / "study.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
    assert sum(not torch.equal(before[key], after[key]) for key in before) > 0.9 * len(before)
    with safe_open(tmp_path / "study.safetensors", "pt") as file:
        assert json.loads(file.metadata()["musubi.config"]) == TINY["wan"].sizes
        assert file.metadata()["modelspec.architecture"] == "wan2.1"
    again = options_of(place, tmp_path / "next", "--dit", str(tmp_path / "study.safetensors"), "--max_train_steps", "1")
    run.run(FAMILY, again)


@pytest.mark.shows("logging_dir", "log_prefix", "log_config")
def test_tensorboard_has_the_frozen_tags(place, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["--max_train_epochs", "2", "--logging_dir", str(tmp_path / "log"), "--log_prefix", "try-", "--log_config"]
    run.run(FAMILY, options_of(place, tmp_path / "out", *words))
    (folder,) = (tmp_path / "log").iterdir()
    assert re.fullmatch(r"try-\d{14}", folder.name)
    events = EventAccumulator(str(folder / "network_train"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    bands = {tag for tag in tags if tag.startswith("loss/t_")}
    assert bands <= {"loss/t_0000_0250", "loss/t_0250_0500", "loss/t_0500_0750", "loss/t_0750_1000"}
    assert bands
    frozen = {"loss/current", "loss/average", "loss/epoch", "lr/unet"}
    assert tags - bands == frozen | {"grad_norm", "time/seconds_per_step", "memory/peak_gib"}
    assert [e.step for e in events.Scalars("loss/current")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events.Scalars("loss/epoch")] == [1, 2]
    assert events.Scalars("lr/unet")[0].value == pytest.approx(2e-6)
    losses = [e.value for e in events.Scalars("loss/current")]
    assert events.Scalars("loss/epoch")[0].value == pytest.approx(sum(losses[:3]) / 3, rel=1e-5)


def test_the_bar_tells_the_average_loss(place, tmp_path, capfd):
    run.run(FAMILY, options_of(place, tmp_path, "--max_train_steps", "2"))
    assert re.search(r"steps: +100%.*2/2.*avr_loss=\d", capfd.readouterr().err)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--fp8_scaled"], r"--fp8_base"),
        (["--sage_attn"], "no backward pass"),
        (["--flash_attn"], "flash_attn is not installed"),
        (["--min_timestep", "800", "--max_timestep", "300"], "min_timestep = 800"),
        (["--network_module", "networks.dora"], "use networks.lora_wan or networks.lora"),
        (["--network_args", "rank_dropuot=0.1"], "did you mean 'rank_dropout'"),
        (["--optimizer_type", "Adamm"], "did you mean Adam"),
        (["--lr_scheduler", "cosin"], "did you mean cosine"),
        (["--lr_warmup_steps", "5"], "constant_with_warmup"),
        (["--sample_every_n_steps", "5"], "--sample_prompts"),
        (["--log_with", "tensorboard"], "--logging_dir"),
        (["--full_finetune", "--fp8_base"], "leave out --fp8_base"),
        (["--network_weights", "/nowhere/x.safetensors"], "no such file"),
        (["--dit", "/nowhere/x.safetensors"], "no such file"),
        (["--dataset_config", "/nowhere/x.toml"], "x.toml"),
        (["--output_name", "a/b"], "plain file name"),
        (["--timestep_sampling", "logsnr", "--logit_mean", "9", *RARE], "a mass of"),
    ],
)  # fmt: skip
def test_one_wrong_option_gives_one_sentence_before_the_model_is_loaded(place, tmp_path, words, sentence, monkeypatch):
    def too_late(*_args, **_kwargs):
        raise AssertionError("the weights were read first")

    monkeypatch.setattr("musubi_tuner.sampling.models.materialize", too_late)
    with pytest.raises(UserError, match=sentence) as fault:
        run.run(FAMILY, options_of(place, tmp_path, *words))
    assert "\n" not in str(fault.value)


def test_options_without_effect_are_named(place, tmp_path):
    words = ["--discrete_flow_shift", "3", "--lr_scheduler_power", "2", "--gradient_checkpointing_cpu_offload"]
    words += ["--weighting_scheme", "mode", "--mode_scale", "1.1", "--log_prefix", "x", "--max_train_steps", "5"]
    told = checks.ineffective(options_of(place, tmp_path, *words))
    assert [sentence.split(" ")[0] for sentence in told] == [
        "discrete_flow_shift",
        "lr_scheduler_power",
        "gradient_checkpointing_cpu_offload",
        "log_prefix",
    ]
    assert "timestep_sampling = sigma" in told[0]
    used = ["--timestep_sampling", "shift", "--discrete_flow_shift", "3", "--sigmoid_scale", "2"]
    assert checks.ineffective(options_of(place, tmp_path, *used)) == []
