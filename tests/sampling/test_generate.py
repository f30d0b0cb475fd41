"""The generate command on a toy family: what it writes is what the formulas say, and bad input costs no model."""

import logging
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from musubi_tuner.config.errors import UserError
from musubi_tuner.flow import solvers
from musubi_tuner.sampling import outputs
from musubi_tuner.sampling.request import Request

GAIN = 0.7


def expected(toy, request, gain=GAIN):
    """Latents of a request, by the solver called with the toy's formula."""
    solver = solvers.get(request.solver)

    def velocity(x, t):
        cond = (gain * x + toy.number_of(request.prompt)).tanh() + t
        uncond = (gain * x + toy.number_of(request.negative)).tanh() + t
        guided = uncond + request.guidance * (cond - uncond)
        return guided * (1 - request.rescale + request.rescale * cond.std() / guided.std())

    noise = torch.randn(
        3, (request.frames - 1) // 4 + 1, request.height // 8, request.width // 8,
        generator=torch.Generator().manual_seed(request.seed),
    )  # fmt: skip
    return solver.solve(velocity, noise, solver.schedule(request.steps, request.shift))


def test_the_task_fills_in_what_is_not_said(world, toy):
    (path,) = world("--prompt", "a cat", "--seed", "9", "--output_type", "latent", vae=False)
    assert path.name.endswith("_9_latent.safetensors")
    latents, values = outputs.read_latents(str(path), "toy")
    request = Request(**values)
    assert request == Request(
        "a cat", 9, width=32, height=48, frames=5, fps=8, steps=4, guidance=3.0, shift=2.0, solver="unipc"
    )
    torch.testing.assert_close(latents, expected(toy, request), rtol=1e-5, atol=1e-6)


@pytest.mark.shows(
    "video_size",
    "video_length",
    "fps",
    "infer_steps",
    "guidance_scale",
    "guidance_rescale",
    "flow_shift",
    "sample_solver",
    "negative_prompt",
    "prompt",
)
def test_every_option_reaches_the_request(world, toy):
    words = "--video_size 32 64 --video_length 9 --fps 12 --infer_steps 3 --guidance_scale 2 --flow_shift 4"
    words += " --sample_solver dpm++ --seed 4 --output_type latent --negative_prompt blurry --cfg_batch"
    words += " --guidance_rescale 0.5"
    (path,) = world("--prompt", "a dog", *words.split())
    latents, values = outputs.read_latents(str(path), "toy")
    request = Request(
        "a dog", 4, width=64, height=32, frames=9, fps=12, steps=3, guidance=2.0, shift=4.0, solver="dpm++",
        negative="blurry", rescale=0.5,
    )  # fmt: skip
    assert Request(**values) == request
    torch.testing.assert_close(latents, expected(toy, request), rtol=1e-5, atol=1e-6)


def test_one_frame_is_a_png_with_its_settings(world, toy):
    (path,) = world("--prompt", "x", "--video_length", "1", "--seed", "2", "--video_size", "32", "32")
    request = Request("x", 2, width=32, height=32, frames=1, fps=8, steps=4, guidance=3.0, shift=2.0)
    want = expected(toy, request)
    with Image.open(path) as image:
        assert image.text["seed"] == "2"
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 32, 3)
    got = pixels[::8, ::8].permute(2, 0, 1)
    torch.testing.assert_close(got, ((want[:, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), rtol=0, atol=1)


@pytest.mark.parametrize(
    ("output_type", "suffixes"),
    [
        ("video", [".mp4"]),
        ("images", [""]),
        ("both", [".mp4", "_latent.safetensors"]),
        ("latent_images", ["", "_latent.safetensors"]),
    ],
)
@pytest.mark.shows("output_type", "save_path")
def test_output_types_write_their_files(world, output_type, suffixes):
    files = world("--prompt", "x", "--seed", "1", "--output_type", output_type)
    stem = files[0].name.removesuffix(".mp4")
    assert [path.name for path in files] == [stem + suffix for suffix in suffixes]
    if "" in suffixes:
        assert len(list(files[0].iterdir())) == 5


@pytest.mark.shows("from_file")
def test_a_prompt_file_gives_a_file_per_line_in_one_batch(world, toy, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("one --d 1\ntwo words --d 1 --s 2\nthree --d 5 --l 1 --i no.png\n", encoding="utf-8")
    files = world("--from_file", prompts, "--output_type", "latent", "--sample_batch_size", "3")
    found = {}
    for path in files:
        latents, values = outputs.read_latents(str(path), "toy")
        found[values["prompt"]] = (latents, Request(**values))
    assert set(found) == {"one", "two words", "three"}
    assert (found["two words"][1].steps, found["three"][1].guidance, found["three"][1].seed) == (2, 1.0, 5)
    for latents, request in found.values():
        torch.testing.assert_close(latents, expected(toy, request), rtol=1e-5, atol=1e-6)


def lora(path, down=0.5, up=0.4, alpha=2.0, name="lora_unet_blocks_0_gain"):
    tensors = {
        f"{name}.lora_down.weight": torch.full((1, 1), down),
        f"{name}.lora_up.weight": torch.full((1, 1), up),
        f"{name}.alpha": torch.tensor(alpha),
    }
    save_file(tensors, path)
    return path


@pytest.mark.shows("lora_weight", "lora_multiplier")
def test_loras_are_merged_with_their_multipliers_in_turn(world, toy, tmp_path):
    first, second = lora(tmp_path / "a.safetensors"), lora(tmp_path / "b.safetensors", down=-0.3)
    (path,) = world(
        "--prompt", "x", "--seed", "3", "--output_type", "latent", "--lora_weight", first, second,
        "--lora_multiplier", "0.5",
    )  # fmt: skip
    latents, values = outputs.read_latents(str(path), "toy")
    gain = GAIN + 0.5 * 2.0 * 0.5 * 0.4 + 1.0 * 2.0 * -0.3 * 0.4
    torch.testing.assert_close(latents, expected(toy, Request(**values), gain), rtol=1e-5, atol=1e-6)


def test_a_module_without_a_place_is_told_before_any_model_is_loaded(world, tmp_path, caplog):
    wrong = lora(tmp_path / "a.safetensors", name="lora_unet_blocks_7_gain")
    words = ("--prompt", "x", "--seed", "3", "--output_type", "latent", "--lora_weight", wrong)
    with pytest.raises(UserError, match="blocks_7_gain"):
        world(*words, "--strict_lora")
    assert world.family.loaded == ()
    both = load_file(wrong) | load_file(lora(tmp_path / "b.safetensors"))
    save_file(both, wrong)
    with caplog.at_level(logging.WARNING):
        world(*words)
    assert len([r for r in caplog.records if "blocks_7_gain" in r.getMessage()]) == 1


def test_fp8_weights_are_quantised_after_the_merge(world, toy, tmp_path):
    """A 1 x 1 weight cannot be scaled in blocks; the plain cast of the merged gain is what the branch sees."""
    (path,) = world(
        "--prompt", "x", "--seed", "3", "--output_type", "latent", "--fp8", "--lora_weight",
        lora(tmp_path / "a.safetensors"),
    )  # fmt: skip
    latents, values = outputs.read_latents(str(path), "toy")
    gain = torch.tensor(GAIN + 0.4).to(torch.float8_e4m3fn).float().item()
    assert not math.isclose(gain, GAIN + 0.4, abs_tol=1e-3)
    torch.testing.assert_close(latents, expected(toy, Request(**values), gain), rtol=1e-5, atol=1e-6)


@pytest.mark.shows("include_patterns", "exclude_patterns")
def test_patterns_choose_among_the_keys_of_each_file(world, toy, tmp_path):
    """The second file's keys are all excluded but for its LoRA; of the first only the included one counts."""
    first, second = lora(tmp_path / "a.safetensors"), lora(tmp_path / "b.safetensors", down=-0.3)
    extra = load_file(lora(tmp_path / "c.safetensors", name="lora_unet_blocks_9_gain"))
    save_file(load_file(first) | extra, first)
    save_file(load_file(second) | extra, second)
    (path,) = world(
        "--prompt", "x", "--seed", "3", "--output_type", "latent", "--strict_lora", "--lora_weight", first, second,
        "--include_patterns", "blocks_0_", "--exclude_patterns", "", "blocks_9",
    )  # fmt: skip
    latents, values = outputs.read_latents(str(path), "toy")
    gain = GAIN + 2.0 * 0.5 * 0.4 + 2.0 * -0.3 * 0.4
    torch.testing.assert_close(latents, expected(toy, Request(**values), gain), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="2 values of --include_patterns for 1 files"):
        world("--prompt", "x", "--lora_weight", first, "--include_patterns", "a", "b")


@pytest.mark.shows("exclude_single_blocks")
@pytest.mark.parametrize("name", ["lora_unet_single_blocks_3_linear1", "transformer.single_transformer_blocks.3.proj"])
def test_single_stream_blocks_of_a_lora_are_left_out(world, toy, tmp_path, name):
    path, more = lora(tmp_path / "a.safetensors"), lora(tmp_path / "b.safetensors", name=name)
    save_file(load_file(path) | load_file(more), path)
    words = ("--prompt", "x", "--seed", "3", "--output_type", "latent", "--strict_lora", "--lora_weight", path)
    with pytest.raises(UserError, match="3 entries do not apply"):
        world(*words)
    (made,) = world(*words, "--exclude_single_blocks")
    latents, values = outputs.read_latents(str(made), "toy")
    torch.testing.assert_close(latents, expected(toy, Request(**values), GAIN + 0.4), rtol=1e-5, atol=1e-6)


@pytest.mark.shows("save_merged_model")
def test_a_merged_model_is_written_and_nothing_else_is_done(world, toy, tmp_path, caplog):
    target, words = tmp_path / "merged.safetensors", ("--prompt", "x", "--seed", "3", "--output_type", "latent")
    with caplog.at_level(logging.INFO):
        generated = ("--lora_weight", lora(tmp_path / "a.safetensors"), "--lora_multiplier", "0.5")
        with pytest.raises(FileNotFoundError):
            world(*words, *generated, "--save_merged_model", target, "--fp8")
    assert world.family.loaded == ()
    assert "--fp8 has no effect" in caplog.text
    assert "1 weights merged with a.safetensors x 0.5" in caplog.text
    assert load_file(target)["blocks.0.gain.weight"].item() == pytest.approx(GAIN + 0.2)
    (path,) = world(*words, "--dit", target)
    latents, values = outputs.read_latents(str(path), "toy")
    torch.testing.assert_close(latents, expected(toy, Request(**values), GAIN + 0.2), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="name the LoRA files"):
        world(*words, "--save_merged_model", target)


@pytest.mark.shows("fp8_fast")
def test_fast_fp8_products_are_used_and_their_error_is_told_once(world, monkeypatch, caplog):
    """The toy's layer is never called, so its own product is asked; what is told is shown in nn/test_fast_products."""
    fast = []

    def multiply_fast(dit, *, compiled):
        fast.append((type(dit.blocks[0].gain).__name__, compiled))

    monkeypatch.setattr("musubi_tuner.sampling.assembly.multiply_fast", multiply_fast)
    words = ("--prompt", "x", "--seed", "3", "--output_type", "latent", "--fp8")
    world(*words)
    assert fast == []
    world(*words, "--fp8_fast")
    assert fast == [("Fp8Linear", False)]
    with pytest.raises(UserError, match="--fp8_fast chooses how FP8 weights are multiplied: give --fp8 too"):
        world(*words[:-1], "--fp8_fast")


@pytest.mark.shows("latent_path", "trim_tail_frames")
def test_stored_latents_are_decoded_without_the_other_models(world, tmp_path):
    (latent,) = world("--prompt", "x", "--seed", "3", "--output_type", "latent", vae=False)
    world.family.loaded = ()
    files = world("--latent_path", latent, "--trim_tail_frames", "2", "--output_type", "images", dit=False)
    folder = next(path for path in files if path.is_dir())
    assert len(list(folder.iterdir())) == 3
    assert world.family.loaded == ("vae",)


def test_a_seed_of_chance_is_named_in_the_file(world):
    world("--prompt", "x", "--output_type", "latent")
    files = world("--prompt", "x", "--output_type", "latent")
    seeds = [outputs.read_latents(str(path), "toy")[1]["seed"] for path in files]
    assert len(set(seeds)) == 2
    for path, seed in zip(files, seeds, strict=True):
        assert path.name.endswith(f"_{seed}_latent.safetensors")


def test_the_same_seed_again_overwrites_nothing_and_gives_the_same(world, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _format: "20260101-000000")
    world("--prompt", "x", "--seed", "3", "--output_type", "latent")
    first, second = world("--prompt", "x", "--seed", "3", "--output_type", "latent")
    assert [p.name for p in (first, second)] == [
        "20260101-000000_3_2_latent.safetensors",
        "20260101-000000_3_latent.safetensors",
    ]
    assert torch.equal(load_file(first)["latent"], load_file(second)["latent"])


def test_of_several_processes_one_works(world, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(FileNotFoundError):
        world("--prompt", "x")
    assert world.family.loaded == ()


def test_no_metadata_leaves_the_prompt_out(world):
    (path,) = world("--prompt", "secret words", "--seed", "1", "--video_length", "1", "--no_metadata")
    assert b"secret" not in path.read_bytes()


def test_a_negative_prompt_without_guidance_is_named_as_idle(world, caplog):
    with caplog.at_level(logging.WARNING):
        world("--prompt", "x", "--negative_prompt", "y", "--guidance_scale", "1", "--output_type", "latent")
    assert "--negative_prompt has no effect" in caplog.text
    with caplog.at_level(logging.WARNING):
        world("--prompt", "x", "--guidance_rescale", "0.5", "--guidance_scale", "1", "--output_type", "latent")
    assert "--guidance_rescale has no effect" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--prompt or from --from_file; neither was given"),
        ("--prompt a --from_file b", "both were given"),
        ("--prompt a --video_length 6", "frames must be 1 \\+ 4 k.*nearest that fits: 5 frames, 48 x 32"),
        ("--prompt a --video_size 40 40", "nearest that fits: 5 frames, 32 x 32"),
        ("--prompt a --fp8_scaled", "--fp8_scaled chooses how FP8 weights are made: give --fp8 too"),
        ("--prompt a --lora_multiplier 1", "1 values of --lora_multiplier for 0 files"),
        ("--prompt a --lora_weight no.safetensors", "no.safetensors"),
        ("--prompt a --dit no.safetensors", "no.safetensors"),
        ("--prompt a --vae no.safetensors", "no.safetensors"),
        ("--prompt a --device cuda:99", "--device cuda:99: this machine offers"),
        ("--prompt a --device tpux", "--device tpux is no device"),
        ("--prompt a --attn_mode flash3", "package flash_attn_interface is not installed"),
        ("--prompt a --sample_solver ddim", "sample_solver"),
        ("--prompt a --task z", "--task z: use one of t"),
        ("--latent_path x --output_type both", "with --latent_path: use video or images"),
    ],
)
def test_faults_are_told_before_any_model_is_loaded(world, words, message):
    with pytest.raises(UserError, match=message):
        world(*words.split())
    assert world.family.loaded == ()
    assert not (world.folder / "out").exists()


def test_what_is_missing_is_named(world):
    with pytest.raises(UserError, match="--dit is required"):
        world("--prompt", "a", dit=False)
    with pytest.raises(UserError, match="--vae is required to decode samples"):
        world("--prompt", "a", vae=False)


def test_a_missing_text_encoder_is_named_by_its_option(world, monkeypatch):
    monkeypatch.setattr(world.family, "load_encoders", lambda options, *, device, dtype: None)
    with pytest.raises(UserError, match="without toy's text encoder: name its file with --words"):
        world("--prompt", "a")


def test_a_target_that_is_a_file_is_refused(world, tmp_path):
    for name in ("dit.safetensors", "clip.mp4"):
        with pytest.raises(UserError, match=f"--save_path .*{name} (is|looks like) a file"):
            world("--prompt", "a", "--save_path", tmp_path / name)
    assert world.family.loaded == ()


def test_faulty_lines_of_a_prompt_file_are_told_together(world, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("one --f 6\ntwo --w 32\nthree --s 0\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"p.txt line 1: .*5 frames.*; p.txt line 3: steps = 0"):
        world("--from_file", prompts)
