"""The generate command with a real family in small: measured weights, files in the original layouts, a tokenizer."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from musubi_tuner.config.errors import UserError
from musubi_tuner.config.options import parse
from musubi_tuner.families import registry
from musubi_tuner.memory import plan
from musubi_tuner.sampling import assembly, clips, generate, outputs
from real_media import CLIPS
from swap_stand_in import StandIn

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "data" / "reference" / "golden"
DIT = {"num_heads": 3, "text_len": 10}
VAE = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
T5 = {"num_heads": 4, "max_length": 10}


def weights(case):
    found = load_file(GOLDEN / f"{case}.safetensors")
    return {key[2:]: tensor for key, tensor in found.items() if key.startswith("w.")}


def write_tokenizer(folder):
    """One token per letter, an end token, in the form that the text encoder's folder has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = [(letter, -2.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz0123456789"]
    model = models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters], unk_id=2, byte_fallback=False)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"unk_token": "<unk>"}), encoding="utf-8")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with dit, vae, t5 and tokenizer; the text width is that of the transformer."""
    folder = tmp_path_factory.mktemp("models")
    draw = torch.Generator().manual_seed(11)

    def widened(tensor):
        shape = [56 if size == 32 else size for size in tensor.shape]
        return torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=draw) * 0.3

    save_file(weights("wan2_1_t2v_a"), folder / "dit.safetensors", {"musubi.config": json.dumps(DIT)})
    save_file(weights("wan_vae_a"), folder / "vae.safetensors", {"musubi.config": json.dumps(VAE)})
    text = {key: widened(tensor) for key, tensor in weights("wan_umt5_a").items()}
    save_file(text, folder / "t5.safetensors", {"musubi.config": json.dumps(T5)})
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture
def run(models, tmp_path):
    family = registry.get("wan")
    groups = (*generate.GROUPS, *family.option_groups("generate"))

    def command(*words, folder="out"):
        argv = ["--save_path", str(tmp_path / folder), "--task", "t2v-1.3B", "--video_size", "32", "48"]
        argv += ["--infer_steps", "3", "--seed", "5", "--device", "cpu"]
        for name in ("dit", "vae", "t5"):
            argv += [f"--{name}", str(models / f"{name}.safetensors")]
        generate.run(family, parse(groups, [*argv, *map(str, words)], prog="generate", description=""))
        return sorted((tmp_path / folder).iterdir())

    return command


def latents_of(files):
    (path,) = (path for path in files if path.name.endswith("_latent.safetensors"))
    return outputs.read_latents(str(path), "wan")[0]


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_text_becomes_a_clip_and_a_picture(run):
    clip, latent = run("--prompt", "a red seven", "--video_length", "5", "--output_type", "both")
    assert clip.suffix == ".mp4"
    assert latents_of([latent]).shape == (16, 2, 4, 6)
    (picture,) = run("--prompt", "a red seven", "--video_length", "1", folder="one")
    with Image.open(picture) as image:
        assert image.size == (48, 32)
        assert len(image.getcolors(48 * 32)) > 20, "not a flat picture"


def test_the_prompt_the_seed_and_the_guidance_matter_and_the_batch_does_not(run, tmp_path):
    def latents(folder, *words):
        return latents_of(run("--video_length", "1", "--output_type", "latent", *words, folder=folder))

    base = latents("a", "--prompt", "a red seven")
    assert torch.equal(latents("b", "--prompt", "a red seven"), base)
    assert relative(latents("c", "--prompt", "a blue two"), base) > 1e-3
    assert relative(latents("d", "--prompt", "a red seven", "--seed", "6"), base) > 0.1
    assert relative(latents("e", "--prompt", "a red seven", "--guidance_scale", "1"), base) > 1e-3
    assert relative(latents("f", "--prompt", "a red seven", "--cfg_batch"), base) < 1e-4
    prompts = tmp_path / "p.txt"
    prompts.write_text("a blue two --d 9\na red seven\n", encoding="utf-8")
    files = run(
        "--from_file", prompts, "--video_length", "1", "--output_type", "latent", "--sample_batch_size", "2",
        folder="g",
    )  # fmt: skip
    assert relative(latents_of([p for p in files if "_5_" in p.name]), base) < 1e-4


@pytest.mark.shows("fp8")
def test_fp8_stays_close_and_a_lora_moves_it(run, models, tmp_path):
    words = ("--prompt", "a red seven", "--video_length", "1", "--output_type", "latent")
    exact = latents_of(run(*words, folder="exact"))
    scaled = latents_of(run(*words, "--fp8", "--fp8_scaled", folder="scaled"))
    assert 0 < relative(scaled, exact) < 0.1
    draw = torch.Generator().manual_seed(2)
    name = "lora_unet_blocks_0_self_attn_q"
    factors = {
        f"{name}.lora_down.weight": torch.randn(2, 96, generator=draw),
        f"{name}.lora_up.weight": torch.randn(96, 2, generator=draw),
        f"{name}.alpha": torch.tensor(2.0),
    }
    save_file(factors, tmp_path / "lora.safetensors")
    lora = ("--lora_weight", tmp_path / "lora.safetensors")
    assert torch.equal(latents_of(run(*words, *lora, "--lora_multiplier", "0", folder="zero")), exact)
    moved = latents_of(run(*words, *lora, folder="moved"))
    merged = weights("wan2_1_t2v_a")
    key = "blocks.0.self_attn.q.weight"
    merged[key] = merged[key] + factors[f"{name}.lora_up.weight"] @ factors[f"{name}.lora_down.weight"]
    save_file(merged, tmp_path / "merged.safetensors", {"musubi.config": json.dumps(DIT)})
    by_hand = latents_of(run(*words, "--dit", tmp_path / "merged.safetensors", folder="by_hand"))
    assert relative(moved, by_hand) < 1e-5
    assert relative(moved, exact) > 1e-3


def test_wan_too_multiplies_fast_merges_into_a_file_and_begins_from_a_video(run, models, tmp_path, caplog):
    """The options of generation that all families share, on its own weights, VAE and a real video."""
    words = ("--prompt", "a red seven", "--video_length", "5", "--output_type", "latent")
    scaled = latents_of(run(*words, "--fp8", "--fp8_scaled", folder="scaled"))
    with caplog.at_level("INFO"):
        fast = latents_of(run(*words, "--fp8", "--fp8_scaled", "--fp8_fast", folder="fast"))
    assert caplog.text.count("FP8 layers multiply int8 activations") == 1
    assert 1e-5 < relative(fast, scaled) < 0.05
    name = "lora_unet_blocks_0_ffn_0"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, 96), f"{name}.lora_up.weight": torch.full((160, 2), 0.05)},
        tmp_path / "lora.safetensors",
    )
    lora = ("--lora_weight", tmp_path / "lora.safetensors")
    run(*lora, "--save_merged_model", tmp_path / "merged.safetensors", folder=".")
    merged = latents_of(run(*words, "--dit", tmp_path / "merged.safetensors", "--fp8", folder="merged"))
    assert torch.equal(merged, latents_of(run(*words, *lora, "--fp8", folder="lora")))
    video = ("--video_path", CLIPS / "carphone_pristine.mp4", "--infer_steps", "4")
    near, far = (latents_of(run(*words, *video, "--strength", s, folder=s)) for s in ("0.25", "1"))
    vae = registry.get("wan").load_vae(str(models / "vae.safetensors"), device=CPU, dtype=torch.float32)
    source = vae.encode(clips.read(str(video[1]), 5, 48, 32, CPU, option="video_path")[None])[0]
    assert relative(near, source) < 0.8 * relative(far, source)


@pytest.mark.shows("compile_args", "attn_mode")
def test_compiled_blocks_sample_the_same(run, monkeypatch, caplog):
    """Both spellings, and the old one, reach the transformer; the samples are those of the plain blocks."""
    from torch._dynamo.utils import counters

    made = []
    compiler = assembly.compile_blocks
    monkeypatch.setattr(assembly, "compile_blocks", lambda *given: made.append(given[2]) or compiler(*given))
    words = ("--prompt", "a red seven", "--video_length", "1", "--output_type", "latent", "--attn_mode", "torch")
    plain = latents_of(run(*words, folder="plain"))
    assert made == []
    torch.compiler.reset()
    counters.clear()
    compiled = latents_of(run(*words, "--compile", "--compile_backend", "eager", "--compile_fullgraph", folder="a"))
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert relative(compiled, plain) < 1e-5
    old = ("--compile", "--compile_args", "eager", "max-autotune-no-cudagraphs", "False", "True")
    with pytest.raises(UserError, match="True or False"):
        run(*words, *old[:-1], "yes", folder="b")
    monkeypatch.setattr(assembly, "compile_blocks", lambda _dit, _lists, settings: made.append(settings))
    run(*words, *old, folder="c")
    run(*words, "--dynamo_backend", "EAGER", folder="d")
    run(*words, *old[1:], folder="e")
    assert [(s.backend, s.mode, s.dynamic, s.fullgraph) for s in made] == [
        ("eager", None, None, True),
        ("eager", "max-autotune-no-cudagraphs", False, True),
        ("eager", None, None, False),
    ]
    assert "--compile_args has no effect without --compile" in caplog.text
    torch.compiler.reset()


@pytest.mark.parametrize(
    "more",
    [(), ("--fp8", "--fp8_scaled"), ("--fp8", "--fp8_fast"), ("--magcache_mag_ratios", "1,0.9,0.95")],
)
def test_swapped_blocks_sample_the_same(run, monkeypatch, caplog, more):
    """On a stand-in for a device: both branches of guidance, FP8, skipped steps, and the terminal's prompts."""
    devices = []

    def stand_in(_device, *, pinned):
        devices.append(StandIn(pinned=pinned))
        return devices[-1]

    words = ("--prompt", "a red seven", "--video_length", "1", "--output_type", "latent", *more)
    expected = latents_of(run(*words, folder="plain"))
    run(*words, "--blocks_to_swap", "1", folder="cpu")
    assert "blocks_to_swap has no effect on cpu, where all weights are in host memory already" in caplog.text
    monkeypatch.setattr(plan, "has_lanes", lambda _: True)
    monkeypatch.setattr(plan, "lanes_for", stand_in)
    swap = ("--blocks_to_swap", "1", "--block_swap_ring_size", "1", "--img_in_txt_in_offloading")
    assert torch.equal(latents_of(run(*words, *swap, folder="swapped")), expected)
    assert len(devices[-1].slots) == 1
    assert len(devices[-1].copies) > 3
    with pytest.raises(UserError, match=r"blocks_to_swap = 9: this model has \d blocks, and one of each must stay"):
        run(*words, "--blocks_to_swap", "9", folder="many")
