"""FramePack's transformer against fixtures, the published manifest and diffusers' implementation."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from golden_data import REFERENCE, TOLERANCE, distance, fixture_sinusoid, golden, manifest
from musubi_tuner.adapters.attach import attach
from musubi_tuner.config.errors import UserError
from musubi_tuner.families import registry
from musubi_tuner.families.framepack.model import FramePackConfig, FramePackModel
from musubi_tuner.families.framepack.options import ModelOptions, TrainedModelOptions
from musubi_tuner.flow import keyed
from musubi_tuner.nn.checkpointing import checkpointed
from musubi_tuner.nn.linear import Fp8Linear
from musubi_tuner.nn.rope import RopeScaling
from musubi_tuner.nn.runner import direct
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import Header, TensorInfo, open_checkpoint

FAMILY = registry.get("framepack")
SPEC = FAMILY.spec
CASES = ("framepack_a", "framepack_b")
FIELDS = {
    "text": "text_states",
    "mask": "text_mask",
    "pooled": "pooled",
    "image": "image_embeddings",
    "indices": "latent_indices",
    "clean": "clean_latents",
    "clean_indices": "clean_latent_indices",
    "clean_2x": "clean_latents_2x",
    "clean_2x_indices": "clean_latent_2x_indices",
    "clean_4x": "clean_latents_4x",
    "clean_4x_indices": "clean_latent_4x_indices",
}


@pytest.fixture(autouse=True)
def _frequencies_of_the_fixtures(monkeypatch):
    monkeypatch.setattr("musubi_tuner.nn.dual_stream.sinusoid", fixture_sinusoid)


def config_of(case, **changes) -> FramePackConfig:
    names = FramePackConfig.__dataclass_fields__
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in case.config.items() if k in names}
    return FramePackConfig(**(sizes | changes))


def model_of(case, **changes) -> FramePackModel:
    model = FramePackModel(config_of(case), **changes)
    model.load_state_dict(case.weights)
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return golden(request.param)


@pytest.fixture(scope="module")
def case_a():
    return golden("framepack_a")


@pytest.fixture(scope="module")
def case_b():
    return golden("framepack_b")


def entries_of(case, **more):
    """The fixture's conditioning as cache entries; guidance in natural units."""
    given, count = case.inputs, len(case.inputs["x"])
    told = [{name: given[key][i] for name, key in FIELDS.items()} for i in range(count)]
    return [{**entry, "guidance": given["guidance"][i] / 1000, **more} for i, entry in enumerate(told)]


def run_case(model, case, entries=None, run=direct):
    x = case.inputs["x"].clone().requires_grad_()
    cond = FAMILY.collate(entries_of(case) if entries is None else entries)
    v = FAMILY.predict(model, x, case.inputs["timestep"].double() / 1000, cond, run=run)
    v.square().mean().backward()
    return v.detach(), x.grad


def test_output_and_gradient_equal_the_fixture(case):
    v, grad = run_case(model_of(case), case)
    assert distance(v, case.outputs["sample"]) < TOLERANCE
    assert distance(grad, case.outputs["grad_x"]) < TOLERANCE


def test_rope_scaling_acts_from_its_threshold_on(case_a):
    """The fixture's timestep is 480, its threshold 400, its factor 0.5."""
    scaled, _ = run_case(model_of(case_a, rope_scaling=RopeScaling(400, 0.5)), case_a)
    assert distance(scaled, case_a.outputs["sample_rope_scaled"]) < TOLERANCE
    below, _ = run_case(model_of(case_a, rope_scaling=RopeScaling(481, 0.5)), case_a)
    assert distance(below, case_a.outputs["sample"]) < TOLERANCE


@pytest.mark.parametrize("offload", [False, True])
def test_checkpointing_changes_no_bit(case_b, offload):
    model = model_of(case_b)
    plain, again = run_case(model, case_b), run_case(model, case_b, run=checkpointed(cpu_offload=offload))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_samples_of_a_batch_have_positions_and_lengths_of_their_own(case_b):
    """Two sections of one video in one batch lie at different times; each must be as it is alone."""
    model, entries = model_of(case_b), entries_of(case_b)
    moved = {name: entries[1][name] + 7 for name in FIELDS if name.endswith("indices")}
    pair = [entries[0], {**entries[1], **moved}]
    together, _ = run_case(model, case_b, pair)
    assert distance(together[0], case_b.outputs["sample"][0]) < TOLERANCE
    assert distance(together[1], case_b.outputs["sample"][1]) > 1e-3
    x, t = case_b.inputs["x"][1:], case_b.inputs["timestep"][1:].double() / 1000
    alone = FAMILY.predict(model, x, t, FAMILY.collate(pair[1:]))
    assert distance(together[1:], alone) < TOLERANCE


def test_rows_after_a_captions_end_are_never_seen(case_b):
    entries = entries_of(case_b)
    entries[1] = {**entries[1], "text": entries[1]["text"].clone()}
    entries[1]["text"][3:] = 1e4
    assert distance(run_case(model_of(case_b), case_b, entries)[0], case_b.outputs["sample"]) < TOLERANCE


@pytest.mark.parametrize("missing", ["clean_2x", "clean_4x"])
def test_history_can_be_left_out(case_a, missing):
    entries = [{k: v for k, v in e.items() if not k.startswith(missing)} for e in entries_of(case_a)]
    v, grad = run_case(model_of(case_a), case_a, entries)
    assert torch.isfinite(v).all()
    assert grad.abs().sum() > 0
    assert distance(v, case_a.outputs["sample"]) > 1e-3


def test_history_of_different_lengths_is_refused_in_one_batch(case_b):
    entries = entries_of(case_b)
    entries[1] = {**entries[1], "clean": entries[1]["clean"][:, :1]}
    with pytest.raises(UserError, match=r"items of one batch have clean of different sizes .*batch_size = 1"):
        FAMILY.collate(entries)


def test_bf16_weights_give_a_close_result_in_xs_dtype(case):
    half = model_of(case).to(torch.bfloat16)
    v, _ = run_case(half, case)
    assert v.dtype == torch.float32
    assert 1e-4 < distance(v, case.outputs["sample"]) < 3e-2


def test_autocast_leaves_the_vector_and_the_projection_in_float32(case_a):
    model, given = model_of(case_a), case_a.inputs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vector = model.time_text_embed(given["timestep"], given["pooled"], given["guidance"])
        out = model.head(torch.ones(1, 2, 64, dtype=torch.bfloat16), vector)
    assert torch.equal(vector, model.time_text_embed(given["timestep"], given["pooled"], given["guidance"]))
    assert (vector.dtype, out.dtype) == (torch.float32, torch.float32)


def test_guidance_is_told_a_thousandfold_in_training_too(case_a, caplog):
    header = header_of({key: tuple(value.shape) for key, value in case_a.weights.items()})
    sizes = {"rope_axes_dims": [8, 12, 12]}
    with caplog.at_level("INFO"):
        told = FAMILY.build_dit(header, sizes, TrainedModelOptions(guidance_scale=10.0))
    assert told.guidance == 10000.0
    assert "told guidance 10000, a thousand times guidance_scale" in caplog.text
    assert FAMILY.build_dit(header, sizes).guidance == 1000.0
    plain = [{k: v for k, v in entry.items() if k != "guidance"} for entry in entries_of(case_a)]
    assert (
        distance(run_case(model_of(case_a, guidance=10000.0), case_a, plain)[0], case_a.outputs["sample"]) < TOLERANCE
    )


@pytest.mark.shows("rope_scaling_timestep_threshold", "rope_scaling_factor")
def test_rope_scaling_is_an_option_of_sampling(case_a):
    header = header_of({key: tuple(value.shape) for key, value in case_a.weights.items()})
    sizes = {"rope_axes_dims": [8, 12, 12]}
    assert FAMILY.build_dit(header, sizes, ModelOptions()).rope_scaling is None
    built = FAMILY.build_dit(header, sizes, ModelOptions(rope_scaling_timestep_threshold=800.0))
    assert built.rope_scaling == RopeScaling(800.0, 0.5)
    chosen = ModelOptions(rope_scaling_timestep_threshold=800.0, rope_scaling_factor=0.7)
    assert FAMILY.build_dit(header, sizes, chosen).rope_scaling == RopeScaling(800.0, 0.7)


# published files


def header_of(shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Header:
    path = Path("framepack.safetensors")
    tensors = {key: TensorInfo(shape=shape, dtype=torch.bfloat16, file=path) for key, shape in shapes.items()}
    return Header(tensors=tensors, metadata=metadata or {}, paths=(path,))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_model_built_from_a_header_has_the_published_keys_and_shapes(prefix):
    shapes = manifest("framepack")
    dit = FAMILY.build_dit(header_of({prefix + key: shape for key, shape in shapes.items()}))
    assert {key: tuple(value.shape) for key, value in dit.state_dict().items()} == shapes
    assert all(value.is_meta for value in dit.state_dict().values())
    about = json.loads((REFERENCE / "checkpoints" / "framepack.json").read_text())["config"]
    for field in FramePackConfig.__dataclass_fields__:
        if field in about:
            found = getattr(dit.config, field)
            assert (list(found) if isinstance(found, tuple) else found) == about[field], field


def test_default_lora_and_fp8_targets_are_the_published_modules():
    about = json.loads((REFERENCE / "lora" / "framepack.json").read_text())
    row = json.loads((REFERENCE / "fp8_targets.json").read_text())["models"]["framepack"]
    shapes = manifest("framepack")
    modules = {path for _, path in about["modules"]}
    policy = Fp8Policy(SPEC.fp8)
    chosen = {key for key in shapes if policy.selects(key)}
    assert {key.removesuffix(".weight") for key in chosen} == modules
    assert len(chosen) == row["quantized_tensors"] == 440
    assert SPEC.fp8.include == tuple(row["target_substrings"])
    assert SPEC.fp8.exclude == tuple(row["exclude_substrings"])
    dit = FAMILY.build_dit(header_of(shapes))
    adapters = attach(dit, SPEC.adapter, rank=4, alpha=1, seed=0)
    assert [[a.name, path] for a, path in zip(adapters.modules, adapters.paths, strict=True)] == about["modules"]
    found = {f"{a.name}.lora_down.weight": [4, a.in_features] for a in adapters.modules}
    found |= {f"{a.name}.lora_up.weight": [a.out_features, 4] for a in adapters.modules}
    assert found | {f"{a.name}.alpha": [] for a in adapters.modules} == about["tensors"]


def test_shards_load_and_compute_in_fp8(case_a, tmp_path):
    keys = sorted(case_a.weights)
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({key: case_a.weights[key] for key in part}, tmp_path / name)
    with open_checkpoint(tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors") as checkpoint:
        dit = FAMILY.build_dit(checkpoint.header, {"rope_axes_dims": [8, 12, 12]})
        policy = WeightPolicy(torch.float32, Fp8Policy(SPEC.fp8))
        report = materialize(dit, checkpoint, rename=FAMILY.rename_dit_key, policy=policy, progress=False)
    assert len(report.fp8) == 12 + 2 * 5
    assert isinstance(dit.transformer_blocks[0].attn.to_out[0], Fp8Linear)
    assert 1e-3 < distance(run_case(dit.requires_grad_(False), case_a)[0], case_a.outputs["sample"]) < 0.1


def test_sizes_that_shapes_cannot_tell_come_from_the_file_itself(case_a, tmp_path):
    save_file(case_a.weights, tmp_path / "tiny.safetensors", {"musubi.config": '{"rope_axes_dims": [8, 12, 12]}'})
    with open_checkpoint(tmp_path / "tiny.safetensors") as checkpoint:
        assert FAMILY.build_dit(checkpoint.header).config == config_of(case_a)


@pytest.mark.parametrize(
    ("shapes", "metadata", "message"),
    [
        (manifest("hunyuan_video_vae"), {}, "is not a FramePack transformer: it has no x_embedder.proj.weight"),
        (manifest("hunyuan_video_t2v"), {}, "is not a FramePack transformer"),
        (manifest("siglip_so400m_patch14_384"), {}, "is not a FramePack transformer"),
        (manifest("framepack"), {"musubi.config": '{"heads": 3}'}, "heads is not a size of this model"),
        (manifest("framepack"), {"musubi.config": '{"num_heads": 7}'}, "hidden_size = 3072, num_heads = 7"),
    ],
)
def test_another_file_is_refused_in_one_sentence(shapes, metadata, message):
    with pytest.raises(UserError, match=message):
        FAMILY.build_dit(header_of(shapes, metadata))


@pytest.mark.parametrize(("field", "width"), [("text", 41), ("pooled", 20), ("image", 27)])
def test_conditioning_that_another_encoder_made_is_refused(case_a, field, width):
    entry = entries_of(case_a)[0]
    entry[field] = torch.zeros(*entry[field].shape[:-1], width)
    with pytest.raises(UserError, match="this model takes 40, 24 and 28; make the caches with the encoders"):
        run_case(model_of(case_a), case_a, [entry])


# diffusers


def test_diffusers_with_the_same_weights_agrees(case_a, monkeypatch):
    """Its class has the same keys. It takes one index list for a batch, so the first fixture is compared."""
    from diffusers import HunyuanVideoFramepackTransformer3DModel
    from diffusers.models import embeddings

    monkeypatch.setattr(
        embeddings.Timesteps, "forward", lambda self, t: fixture_sinusoid(t, self.num_channels, torch.float32)
    )
    c, given = config_of(case_a), case_a.inputs
    other = HunyuanVideoFramepackTransformer3DModel(
        num_attention_heads=c.num_heads,
        attention_head_dim=c.head_dim,
        num_layers=c.num_double_blocks,
        num_single_layers=c.num_single_blocks,
        num_refiner_layers=c.num_refiner_blocks,
        mlp_ratio=c.mlp_ratio,
        text_embed_dim=c.text_dim,
        pooled_projection_dim=c.pooled_text_dim,
        rope_theta=c.rope_theta,
        rope_axes_dim=c.rope_axes_dims,
        has_image_proj=True,
        image_proj_dim=c.image_embed_dim,
        has_clean_x_embedder=True,
    ).eval()
    other.load_state_dict(case_a.weights)
    with torch.no_grad():
        theirs = other(
            given["x"],
            given["timestep"],
            given["text_states"],
            given["text_mask"],
            given["pooled"],
            given["image_embeddings"],
            given["latent_indices"][0],
            given["guidance"],
            given["clean_latents"],
            given["clean_latent_indices"][0],
            given["clean_latents_2x"],
            given["clean_latent_2x_indices"][0],
            given["clean_latents_4x"],
            given["clean_latent_4x_indices"][0],
            return_dict=False,
        )[0]
    assert distance(theirs, case_a.outputs["sample"]) < TOLERANCE
    assert distance(run_case(model_of(case_a), case_a)[0], theirs) < TOLERANCE


def test_history_of_the_published_lengths_runs(case_a):
    """19 frames of history at the resolution of a real latent grid that divides by nothing: 9 x 7 patches."""
    size = (18, 14)
    entry = entries_of(case_a)[0]
    for name, frames in (("clean", 2), ("clean_2x", 2), ("clean_4x", 16)):
        entry[name] = keyed.normal((16, frames, *size), name)
        entry[f"{name}_indices"] = torch.arange(frames) + 10
    v = FAMILY.predict(
        model_of(case_a), keyed.normal((1, 16, 3, *size), "x"), torch.tensor([0.5]), FAMILY.collate([entry])
    )
    assert v.shape == (1, 16, 3, *size)
    assert torch.isfinite(v).all()
