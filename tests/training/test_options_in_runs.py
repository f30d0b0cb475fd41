"""Options whose effect shows in a whole run on a tiny transformer: FP8, norms, ranks, optimizers, compilation, logs."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from musubi_tuner.config.errors import UserError
from musubi_tuner.training import checks, run
from musubi_tuner.weights.write import atomic_save_safetensors
from training_place import FAMILY, make_place, options_of


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def train(place: Path, out: Path, *words: str) -> dict[str, torch.Tensor]:
    run.run(FAMILY, options_of(place, out, "--max_train_steps", "2", *words))
    return load_file(out / "study.safetensors")


def metadata(out: Path) -> dict[str, str]:
    with safe_open(out / "study.safetensors", "pt") as file:
        return file.metadata()


def scalars(log: Path) -> EventAccumulator:
    (folder,) = log.glob("*/network_train")
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def rows_of(path: Path) -> dict[str, tuple[float, float, int]]:
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    assert lines[0] == ["weight", "relative_error", "sqnr_db", "bytes_saved"]
    return {name: (float(error), float(db), int(saved)) for name, error, db, saved in lines[1:]}


@pytest.mark.shows("fp8_base", "fp8_scaled", "fp8_mode", "fp8_block_size", "fp8_format", "fp8_exclude", "fp8_report")
def test_the_fp8_report_ranks_formats_and_leaves_out_what_is_excluded(place, tmp_path, caplog):
    """e4m3 beats e5m2 by its extra bit, small blocks beat whole tensors, and a plain cast is no better than blocks."""
    mean = {}
    for name, words in {
        "block": ["--fp8_scaled", "--fp8_block_size", "32"],
        "tensor": ["--fp8_scaled", "--fp8_mode", "tensor"],
        "e5m2": ["--fp8_scaled", "--fp8_format", "e5m2"],
        "cast": [],
    }.items():
        with caplog.at_level(logging.INFO):
            train(place, tmp_path / name, "--fp8_base", "--fp8_report", "--mixed_precision", "bf16", *words)
        rows = rows_of(tmp_path / name / "study-fp8.tsv")
        assert len(rows) == 30
        mean[name] = sum(error for error, _, _ in rows.values()) / len(rows)
    assert mean["block"] < mean["tensor"] < mean["e5m2"]
    assert mean["block"] < mean["cast"]
    assert mean["e5m2"] / mean["tensor"] == pytest.approx(2.0, rel=0.2)
    assert caplog.text.count("FP8 error of 30 weights") == 4
    words = ["--fp8_base", "--fp8_scaled", "--fp8_report", "--fp8_exclude", "ffn", "blocks.1."]
    train(place, tmp_path / "less", *words)
    assert len(rows_of(tmp_path / "less/study-fp8.tsv")) == 16
    assert not [name for name in rows_of(tmp_path / "less/study-fp8.tsv") if "ffn" in name or "blocks.1." in name]


@pytest.mark.shows("allow_prequantized")
def test_fp8_checkpoints_of_others_need_a_word(place, tmp_path):
    state = load_file(place / "dit.safetensors")
    with safe_open(place / "dit.safetensors", "pt") as file:
        sizes = file.metadata()
    name = next(key for key in state if "blocks.0.ffn.0.weight" in key)
    state[name] = state[name].to(torch.float8_e4m3fn)
    atomic_save_safetensors(tmp_path / "fp8.safetensors", state, sizes)
    words = ["--dit", str(tmp_path / "fp8.safetensors"), "--fp8_base", "--fp8_scaled"]
    with pytest.raises(UserError, match="allow_prequantized"):
        train(place, tmp_path / "a", *words)
    train(place, tmp_path / "b", *words, "--allow_prequantized")


@pytest.mark.shows("scale_weight_norms")
def test_norms_stay_below_the_limit_and_are_logged(place, tmp_path):
    words = ["--scale_weight_norms", "0.05", "--learning_rate", "0.1", "--logging_dir", str(tmp_path / "log")]
    tensors = train(place, tmp_path / "out", *words)
    names = [key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")]
    norms = [
        float(torch.linalg.norm(tensors[f"{n}.lora_up.weight"] @ tensors[f"{n}.lora_down.weight"])) / 4 for n in names
    ]
    assert max(norms) <= 0.05 * (1 + 1e-5)
    found = scalars(tmp_path / "log")
    assert found.Scalars("max_norm/keys_scaled")[-1].value == sum(n > 0.05 * (1 - 1e-5) for n in norms) > 0
    assert found.Scalars("max_norm/max_key_norm")[-1].value == pytest.approx(0.05)
    assert found.Scalars("max_norm/average_key_norm")[-1].value == pytest.approx(sum(norms) / len(norms), rel=1e-4)


@pytest.mark.shows("dim_from_weights")
def test_ranks_come_from_the_file_module_by_module(place, tmp_path):
    first = train(place, tmp_path / "one", "--network_dim", "4", "--network_args", "include_patterns=.*ffn.*")
    mixed = dict(first)
    for key in [k for k in first if "blocks_0" in k]:
        if "lora_down" in key:
            mixed[key] = first[key][:2]
        elif "lora_up" in key:
            mixed[key] = first[key][:, :2].contiguous()
    atomic_save_safetensors(tmp_path / "mixed.safetensors", mixed, {})
    words = ["--network_weights", str(tmp_path / "mixed.safetensors"), "--learning_rate", "1e-9"]
    after = train(place, tmp_path / "two", *words, "--network_dim", "16", "--dim_from_weights")
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in mixed.items()}
    assert all(torch.allclose(after[key], mixed[key], atol=1e-7) for key in mixed)
    with pytest.raises(UserError, match="rank"):
        train(place, tmp_path / "three", *words, "--network_dim", "16")


@pytest.mark.shows("base_weights", "base_weights_multiplier")
def test_base_weights_change_what_the_adapter_learns_on(place, tmp_path):
    first = train(place, tmp_path / "one", "--max_train_steps", "6", "--learning_rate", "0.05")
    file = str(tmp_path / "one/study.safetensors")
    merged = train(place, tmp_path / "two", "--base_weights", file)
    zero = train(place, tmp_path / "three", "--base_weights", file, "--base_weights_multiplier", "0")
    plain = train(place, tmp_path / "four")
    assert first.keys() == merged.keys()
    assert all(torch.allclose(zero[key], plain[key], atol=1e-6) for key in plain)
    assert not all(torch.allclose(merged[key], plain[key], atol=1e-3) for key in plain)


def test_both_groups_of_loraplus_have_their_rate_in_the_log(place, tmp_path):
    words = ["--network_args", "loraplus_lr_ratio=4", "--lr_scheduler", "linear", "--learning_rate", "1e-3"]
    train(place, tmp_path / "out", *words, "--logging_dir", str(tmp_path / "log"))
    found = scalars(tmp_path / "log")
    assert [e.value for e in found.Scalars("lr/unet")] == pytest.approx([1e-3, 5e-4])
    assert [e.value for e in found.Scalars("lr/unet plus")] == pytest.approx([4e-3, 2e-3])


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "torch.optim.adamw.AdamW"),
        (["--optimizer_type", ""], "torch.optim.adamw.AdamW"),
        (["--optimizer_type", "AdaFactor"], "transformers.optimization.Adafactor"),
        (["--optimizer_type", "SGD", "--optimizer_args", "momentum=0.9"], "torch.optim.sgd.SGD(momentum=0.9)"),
        (["--optimizer_type", "schedulefree.AdamWScheduleFree"], "schedulefree.adamw_schedulefree.AdamWScheduleFree"),
    ],
)  # fmt: skip
def test_optimizers_train_and_are_recorded(place, tmp_path, words, name):
    tensors = train(place, tmp_path, *words)
    assert metadata(tmp_path)["ss_optimizer"] == name
    assert all(t.isfinite().all() for t in tensors.values())
    assert all(t.abs().max() > 0 for key, t in tensors.items() if "lora_up" in key)


def test_adafactor_sets_its_own_rate_unless_told_otherwise(place, tmp_path, caplog):
    train(place, tmp_path / "a", "--optimizer_type", "AdaFactor")
    assert "Adafactor sets its own rate: lr_scheduler has no effect" in caplog.text
    caplog.clear()
    words = ["--optimizer_args", "relative_step=False", "scale_parameter=False", "warmup_init=False"]
    log = ["--logging_dir", str(tmp_path / "log"), "--lr_scheduler", "linear", "--learning_rate", "1e-3"]
    train(place, tmp_path / "b", "--optimizer_type", "AdaFactor", *words, *log)
    assert "sets its own rate" not in caplog.text
    assert [e.value for e in scalars(tmp_path / "log").Scalars("lr/unet")] == pytest.approx([1e-3, 5e-4])


def test_adamw8bit_that_is_missing_is_told(place, tmp_path, monkeypatch):
    monkeypatch.setattr("musubi_tuner.optim.build._packages", lambda: frozenset({"torch"}))
    with pytest.raises(UserError, match="bitsandbytes is not installed; `pip install` it"):
        train(place, tmp_path, "--optimizer_type", "AdamW8bit")


def test_adamw8bit_keeps_its_moments_in_8_bits_learns_as_adamw_and_goes_on_from_a_state(place, tmp_path, monkeypatch):
    """Tensors of 4096 values and more have 8-bit moments; the run that a state cuts in two ends as the whole one."""
    pytest.importorskip("bitsandbytes", reason="made for Linux on x86-64 alone")
    kept = {}
    whole = run.train

    def noting(step, *rest, **more):
        kept["optimizer"] = step.optimizer
        return whole(step, *rest, **more)

    monkeypatch.setattr(run, "train", noting)
    words = ["--network_dim", "64", "--max_train_steps", "4", "--max_grad_norm", "0"]
    plain = train(place, tmp_path / "plain", *words)
    bits = [*words, "--optimizer_type", "AdamW8bit"]
    tensors = train(place, tmp_path / "bits", *bits)
    assert metadata(tmp_path / "bits")["ss_optimizer"] == "bitsandbytes.optim.adamw.AdamW8bit"
    moments = [state["state1"] for state in kept["optimizer"].state.values()]
    assert {m.dtype for m in moments if m.numel() >= 4096} == {torch.uint8}
    moved = torch.cat([t.flatten() for key, t in plain.items() if "lora_up" in key])
    found = torch.cat([t.flatten() for key, t in tensors.items() if "lora_up" in key])
    assert 0 < float((found - moved).norm() / moved.norm()) < 0.2
    train(place, tmp_path / "cut", *bits, "--max_train_steps", "2", "--save_state_on_train_end")
    again = train(place, tmp_path / "cut", *bits, "--resume", str(tmp_path / "cut/study-state"))
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


@pytest.mark.shows("lr_scheduler_type")
def test_a_scheduler_class_sets_the_rate(place, tmp_path):
    words = ["--lr_scheduler_type", "torch.optim.lr_scheduler.ExponentialLR", "--lr_scheduler_args", "gamma=0.5"]
    log = ["--logging_dir", str(tmp_path / "log"), "--learning_rate", "1e-3", "--max_train_steps", "3"]
    train(place, tmp_path / "out", *words, *log)
    rates = [e.value for e in scalars(tmp_path / "log").Scalars("lr/unet")]
    assert rates == pytest.approx([1e-3, 5e-4, 2.5e-4])
    assert metadata(tmp_path / "out")["ss_lr_scheduler"] == "torch.optim.lr_scheduler.ExponentialLR"


def test_buckets_change_the_times_and_a_run_of_them_repeats(place, tmp_path):
    words = ["--num_timestep_buckets", "5", "--timestep_sampling", "shift", "--max_train_steps", "3"]
    one, two = (train(place, tmp_path / name, *words) for name in "ab")
    other = train(place, tmp_path / "c", *words[2:])
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's look
def test_a_compiled_run_is_an_eager_run(place, tmp_path, caplog):
    plain = train(place, tmp_path / "a", "--max_train_steps", "1")
    with caplog.at_level(logging.INFO):
        words = ["--max_train_steps", "1", "--dynamo_backend", "EAGER", "--dynamo_fullgraph"]
        compiled = train(place, tmp_path / "b", *words)
    assert "3 blocks are compiled with eager, as one graph each" in caplog.text
    assert all(torch.allclose(plain[key], compiled[key], rtol=1e-4, atol=1e-6) for key in plain)


def test_options_of_this_page_without_effect_are_named(place, tmp_path):
    words = ["--fp8_mode", "tensor", "--fp8_exclude", "x", "--dynamo_mode", "default", "--compile_backend", "eager"]
    words += ["--num_timestep_buckets", "1", "--wandb_run_name", "x", "--network_dim", "4", "--dim_from_weights"]
    told = [sentence.split(" ")[0] for sentence in checks.ineffective(options_of(place, tmp_path, *words))]
    assert sorted(told) == [
        "compile_backend",
        "dynamo_mode",
        "fp8_exclude",
        "fp8_mode",
        "network_dim",
        "num_timestep_buckets",
        "wandb_run_name",
    ]
    both = ["--fp8_base", "--fp8_scaled", "--fp8_mode", "channel", "--fp8_block_size", "32"]
    (sentence,) = checks.ineffective(options_of(place, tmp_path, *both))
    assert sentence == "fp8_block_size has no effect with fp8_mode = channel"
