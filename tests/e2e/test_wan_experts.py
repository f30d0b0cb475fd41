"""Wan 2.2's two experts through the real commands: caches, one LoRA over both, resume, and samples by both."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner import cli
from musubi_tuner.config.options import parse
from musubi_tuner.families import registry
from musubi_tuner.flow import keyed
from musubi_tuner.flow.solvers import SOLVERS
from musubi_tuner.sampling import generate, models, outputs
from musubi_tuner.sampling.options import ModelOptions, located
from musubi_tuner.sampling.request import Request, initial_noise
from musubi_tuner.weights.policy import WeightPolicy

FAMILY = registry.get("wan")
CPU = torch.device("cpu")


def musubi(command: str, *words: str) -> None:
    """Run a command in this process; it must succeed."""
    assert cli.main([command, *words]) == 0


@pytest.fixture(scope="module")
def shop(workshop):
    """The workshop with caches, and `high.safetensors` beside its transformer, the one for low noise."""
    musubi("wan_cache_latents", *workshop.caching())
    musubi("wan_cache_text_encoder_outputs", *workshop.text())
    state = {
        key: (value.float() + 0.05 * keyed.normal(value.shape, "high noise", key)).bfloat16()
        for key, value in load_file(workshop.dit).items()
    }
    save_file(state, high(workshop), {"musubi.config": json.dumps({"num_heads": 2, "text_len": 16})})
    return workshop


def high(shop):
    return shop.root / "high.safetensors"


def both(shop) -> list[str]:
    return ["--task", "t2v-A14B", "--dit_high_noise", str(high(shop)), "--timestep_boundary", "600"]


@pytest.fixture(scope="module")
def trained(shop):
    """One LoRA over both, on scaled FP8, with checkpointing, buckets and a state after each epoch."""
    musubi("wan_train_network", *shop.training("experts", *both(shop), *STATES))
    return shop


STATES = ("--save_state", "--num_timestep_buckets", "5")


def test_one_lora_over_both_resumes_to_the_byte(trained):
    state = trained.out / "experts-000001-state"
    musubi("wan_train_network", *trained.training("resumed", *both(trained), *STATES, "--resume", str(state)))
    a, b = (load_file(trained.out / f"{name}.safetensors") for name in ("experts", "resumed"))
    assert len(a) == 3 * 3 * 10, "a LoRA of one network: three blocks of ten linear layers, three tensors each"
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert all(a[key].abs().sum() > 0 for key in a if key.endswith("lora_up.weight"))


def generated(shop, folder, *words: str) -> torch.Tensor:
    given = shop.generation(folder, *both(shop), "--video_length", "5", "--output_type", "latent", *words)
    musubi("wan_generate_video", *given, "--sample_solver", "vanilla", "--infer_steps", "4", "--flow_shift", "1")
    (path,) = folder.glob("*_latent.safetensors")
    return outputs.read_latents(str(path), "wan")[0]


@pytest.fixture(scope="module")
def plain(shop, tmp_path_factory):
    """Guidance 3 below the boundary, 5 from it on: t = 1 and 0.75 are the high expert's, 0.5 and 0.25 the other's."""
    return generated(shop, tmp_path_factory.mktemp("plain"), "--guidance_scale_high_noise", "5")


@pytest.mark.shows("guidance_scale_high_noise")
def test_each_expert_samples_on_its_side_with_its_guidance(shop, plain):
    """The same by hand: Euler steps of both transformers, told apart by t."""
    request = Request("a red roof", 5, 32, 32, frames=5)
    own = FAMILY.option_groups("generate")[0](t5=str(shop.t5))
    texts = models.encode_prompts(FAMILY, own, [request], device=CPU, dtype=torch.bfloat16)
    cond, uncond = (FAMILY.collate([texts[text]]) for text in ("a red roof", ""))
    low, other = (models.open_dit(FAMILY, str(path)).load(WeightPolicy(None), CPU) for path in (shop.dit, high(shop)))
    x, schedule = initial_noise(request, FAMILY.spec)[None], SOLVERS["vanilla"].schedule(4, 1.0)
    with torch.no_grad():
        for i, t in enumerate(schedule.times.tolist()):
            dit, scale = (other, 5.0) if t >= 0.6 else (low, 3.0)
            v, without = (FAMILY.predict(dit, x, torch.tensor([t]), c) for c in (cond, uncond))
            x = x + (schedule.sigmas[i + 1] - schedule.sigmas[i]).item() * (without + scale * (v - without))
    assert float((x[0] - plain).norm() / plain.norm()) < 1e-5


@pytest.mark.shows("lazy_loading")
def test_where_the_other_expert_rests_changes_nothing(shop, plain, tmp_path, caplog):
    words = ("--guidance_scale_high_noise", "5")
    assert torch.equal(generated(shop, tmp_path / "lazy", *words, "--lazy_loading"), plain)
    loads = [record.message for record in caplog.records if "tensors, " in record.message]
    assert [name for line in loads for name in ("high.safetensors", "dit.safetensors") if name in line] == [
        "high.safetensors",
        "dit.safetensors",
    ], "each once, the one for high noise first"
    assert torch.equal(generated(shop, tmp_path / "offload", *words, "--offload_inactive_dit"), plain)


@pytest.mark.shows("lora_weight_high_noise", "lora_multiplier_high_noise")
def test_each_expert_has_its_loras(trained, plain, tmp_path):
    """With all t on one side a LoRA does what it does to that transformer alone; on the other side it does nothing."""
    lora, words = str(trained.out / "experts.safetensors"), ("--guidance_scale_high_noise", "5")
    for_high = ("--lora_weight_high_noise", lora, "--lora_multiplier_high_noise", "0.5")
    changed = generated(trained, tmp_path / "high", *words, *for_high)
    assert not torch.allclose(changed, plain, atol=1e-3)
    off = generated(trained, tmp_path / "off", *words, *for_high[:-1], "0")
    assert torch.equal(off, plain)
    for_both = generated(trained, tmp_path / "both", *words, *for_high, "--lora_weight", lora)
    assert not torch.allclose(for_both, changed, atol=1e-3)
    all_high = generated(
        trained, tmp_path / "a", *words, "--timestep_boundary", "0.01", *for_high, "--lora_weight", lora
    )
    alone = (*trained.generation(tmp_path / "b"), "--task", "t2v-14B", "--dit", str(high(trained)))
    more = ("--video_length", "5", "--output_type", "latent", "--sample_solver", "vanilla", "--infer_steps", "4")
    merged = ("--flow_shift", "1", "--guidance_scale", "5", "--lora_weight", lora, "--lora_multiplier", "0.5")
    musubi("wan_generate_video", *alone, *more, *merged)
    (path,) = (tmp_path / "b").glob("*_latent.safetensors")
    assert torch.equal(outputs.read_latents(str(path), "wan")[0], all_high)


def test_faults_are_told_before_any_model_is_read(shop, tmp_path, capsys):
    given = shop.generation(tmp_path)
    for words, sentence in (
        (("--dit_high_noise", str(high(shop))), "--task t2v-1.3B, which has one transformer"),
        ((*both(shop), "--lora_multiplier_high_noise", "1"), "1 values of --lora_multiplier_high_noise for 0 files"),
        ((*both(shop), "--dit_high_noise", str(shop.vae)), "is not a Wan transformer"),
    ):
        assert cli.main(["wan_generate_video", *given, *words]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.shows("cfg_skip_mode", "cfg_apply_ratio", "slg_layers", "slg_mode", "slg_scale", "slg_start", "slg_end")
def test_guidance_in_some_steps_and_with_blocks_left_out(shop, plain, tmp_path, capsys):
    words = ("--guidance_scale_high_noise", "5")
    skipping = ("--cfg_skip_mode", "late", "--cfg_apply_ratio")
    assert torch.equal(generated(shop, tmp_path / "all", *words, *skipping, "1"), plain)
    none = generated(shop, tmp_path / "none", *words, *skipping, "0")
    assert torch.equal(none, generated(shop, tmp_path / "one", "--guidance_scale_high_noise", "1", *ONE))
    half = generated(shop, tmp_path / "half", *words, *skipping, "0.5")
    assert not torch.allclose(half, plain, atol=1e-3)
    assert not torch.allclose(half, none, atol=1e-3)
    layers = ("--slg_layers", "1", "--slg_start", "0.25", "--slg_end", "0.75")
    away = generated(shop, tmp_path / "away", *words, *layers, "--slg_mode", "original", "--slg_scale", "2")
    stands_in = generated(shop, tmp_path / "in", *words, *layers, "--slg_mode", "uncond")
    assert len({tuple(x.flatten().tolist()) for x in (plain, away, stands_in)}) == 3
    zero = generated(shop, tmp_path / "zero", *words, *layers, "--slg_mode", "original", "--slg_scale", "0")
    assert torch.allclose(zero, plain, atol=1e-6)
    assert torch.equal(generated(shop, tmp_path / "no", *words, *layers[:2]), plain), "--slg_mode turns it on"
    given = shop.generation(tmp_path / "x", *both(shop), "--slg_mode", "uncond", "--slg_layers", "1,3")
    assert cli.main(["wan_generate_video", *given]) == 2
    assert "--slg_layers 3: this model has 3 blocks, 0 to 2" in capsys.readouterr().err


ONE = ("--guidance_scale", "1")


@pytest.mark.shows("ckpt_dir")
def test_files_that_are_not_given_are_found_in_the_published_folder(shop, plain, tmp_path, capsys):
    """Both transformers by the folder's names for them; what is given wins; another folder is told."""
    for name, path in (("low_noise_model", shop.dit), ("high_noise_model", high(shop))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "diffusion_pytorch_model.safetensors").symlink_to(path)
    given = shop.generation(tmp_path / "out")
    at = given.index("--dit")
    given = [*given[:at], *given[at + 2 :], "--task", "t2v-A14B", "--timestep_boundary", "600", "--ckpt_dir"]
    more = ("--video_length", "5", "--output_type", "latent", "--guidance_scale_high_noise", "5")
    grid = ("--sample_solver", "vanilla", "--infer_steps", "4", "--flow_shift", "1")
    musubi("wan_generate_video", *given, str(tmp_path), *more, *grid)
    (path,) = (tmp_path / "out").glob("*_latent.safetensors")
    assert torch.equal(outputs.read_latents(str(path), "wan")[0], plain)
    assert cli.main(["wan_generate_video", *given, str(shop.root)]) == 2
    assert "is not the folder of a published repository: it holds none of low_noise_model" in capsys.readouterr().err


def test_what_is_given_wins_over_what_a_folder_holds(tmp_path):
    names = ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "diffusion_pytorch_model.safetensors")
    for name in names:
        (tmp_path / name).touch()
    groups = (*generate.GROUPS, *FAMILY.option_groups("generate"))
    words = ["--save_path", "x", "--vae", "mine.safetensors", "--ckpt_dir", str(tmp_path)]
    found = located(FAMILY, parse(groups, words, prog="generate", description=""))
    chosen, own = found[ModelOptions], found[FAMILY.option_groups("generate")[0]]
    assert (chosen.vae, chosen.dit, own.t5, own.clip) == (
        "mine.safetensors",
        str(tmp_path / names[2]),
        str(tmp_path / names[1]),
        None,
    )
    assert (found.source("dit"), found.source("vae")) == ("--ckpt_dir", "command line")
    assert found.as_dict()["t5"] == own.t5
