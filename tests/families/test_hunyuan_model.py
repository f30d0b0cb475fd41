"""HunyuanVideo's transformer against fixtures, published manifests and diffusers' implementation."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from golden_data import REFERENCE, TOLERANCE, distance, fixture_sinusoid, golden, manifest
from musubi_tuner.adapters.attach import attach
from musubi_tuner.config.errors import UserError
from musubi_tuner.families import registry
from musubi_tuner.families.hunyuan_video.model import HunyuanVideoConfig, HunyuanVideoModel
from musubi_tuner.families.hunyuan_video.options import ModelOptions, TrainedModelOptions
from musubi_tuner.flow import keyed
from musubi_tuner.nn.checkpointing import checkpointed
from musubi_tuner.nn.linear import Fp8Linear
from musubi_tuner.nn.runner import direct
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import Header, TensorInfo, open_checkpoint

FAMILY = registry.get("hunyuan_video")
SPEC = FAMILY.spec


@pytest.fixture(scope="module")
def case():
    return golden("hunyuan_video_t2v_a")


@pytest.fixture(autouse=True)
def _frequencies_of_the_fixtures(monkeypatch):
    monkeypatch.setattr("musubi_tuner.families.hunyuan_video.model.sinusoid", fixture_sinusoid)


def config_of(case, **changes) -> HunyuanVideoConfig:
    names = HunyuanVideoConfig.__dataclass_fields__
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in case.config.items() if k in names}
    return HunyuanVideoConfig(**(sizes | changes))


@pytest.fixture(scope="module")
def model(case) -> HunyuanVideoModel:
    model = HunyuanVideoModel(config_of(case))
    model.load_state_dict(case.weights)
    return model.requires_grad_(False)


def run_case(model, case, run=direct):
    given = case.inputs
    x = given["x"].clone().requires_grad_()
    lengths = given["text_mask"].sum(1)
    text, pooled, guidance = given["text_states"], given["text_states_2"], given["guidance"]
    sample = model(x, given["t"], text, pooled, guidance, lengths=lengths, run=run)
    sample.square().mean().backward()
    return sample.detach(), x.grad


def entries_of(case, **more):
    """The fixture's conditioning as cache entries; guidance in natural units."""
    given = case.inputs
    return [
        {
            "text": given["text_states"][i],
            "mask": given["text_mask"][i],
            "pooled": given["text_states_2"][i],
            "guidance": given["guidance"][i] / 1000,
            **more,
        }
        for i in range(2)
    ]


def test_output_and_gradient_equal_the_fixture(model, case):
    sample, grad = run_case(model, case)
    assert distance(sample, case.outputs["sample"]) < TOLERANCE
    assert distance(grad, case.outputs["grad_x"]) < TOLERANCE


def test_predict_tells_the_model_a_thousand_t_and_a_thousandfold_guidance(model, case):
    cond = FAMILY.collate(entries_of(case))
    v = FAMILY.predict(model, case.inputs["x"], case.inputs["t"].double() / 1000, cond)
    assert distance(v, case.outputs["sample"]) < TOLERANCE


def test_rows_after_a_captions_end_are_never_seen(model, case):
    """The fixture's second caption has 5 of 9 tokens; what stands after them must not matter, nor batch mates."""
    entries = entries_of(case)
    changed = [{**entry, "text": entry["text"].clone()} for entry in entries]
    changed[1]["text"][5:] = 1e4
    x, t = case.inputs["x"], case.inputs["t"].double() / 1000
    together = FAMILY.predict(model, x, t, FAMILY.collate(changed))
    assert distance(together, case.outputs["sample"]) < TOLERANCE
    alone = FAMILY.predict(model, x[1:], t[1:], FAMILY.collate(entries[1:]))
    assert distance(alone, case.outputs["sample"][1:]) < TOLERANCE


def test_collate_cuts_the_text_to_the_longest_caption(case):
    cond = FAMILY.collate(entries_of(case)[1:])
    assert cond["text"].shape == (1, 5, 48)
    assert cond["lengths"] is None, "nothing to hide, so every attention library can serve"
    assert FAMILY.collate(entries_of(case))["lengths"].tolist() == [9, 5]


@pytest.mark.parametrize("mask", [[0, 0, 0], [1, 0, 1], [0, 1, 1]])
def test_a_mask_that_is_no_prefix_is_refused(mask):
    entry = {"text": torch.zeros(3, 4), "mask": torch.tensor(mask), "pooled": torch.zeros(2)}
    with pytest.raises(UserError, match="real tokens that are not the first ones"):
        FAMILY.collate([entry])


@pytest.mark.parametrize("offload", [False, True])
def test_checkpointing_changes_no_bit(model, case, offload):
    plain, again = run_case(model, case), run_case(model, case, checkpointed(cpu_offload=offload))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_bf16_weights_give_a_close_result_in_xs_dtype(model, case):
    half = HunyuanVideoModel(model.config)
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    cond = FAMILY.collate(entries_of(case))
    v = FAMILY.predict(half, case.inputs["x"], case.inputs["t"].double() / 1000, cond)
    assert v.dtype == torch.float32
    assert 1e-4 < distance(v, case.outputs["sample"]) < 2e-2


def test_autocast_leaves_the_vector_in_float32(model, case):
    """Rounding the sinusoid of t = 812.5 or guidance 6000 to bf16 would move it by whole units."""
    given = case.inputs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vector = model.vector(given["t"], given["text_states_2"], given["guidance"])
    assert torch.equal(vector, model.vector(given["t"], given["text_states_2"], given["guidance"]))
    assert vector.dtype == torch.float32


# image-to-video: the first frame beside the noisy latents


def test_the_clean_first_frame_stands_beside_the_noisy_latents(case):
    """The channels that `predict` adds, seen by a patch embedding that looks at nothing else."""
    wide = HunyuanVideoModel(config_of(case, in_channels=32, num_double_blocks=1, num_single_blocks=1))
    weights = {key: value for key, value in case.weights.items() if key in wide.state_dict()}
    weights["img_in.proj.weight"] = torch.cat([case.weights["img_in.proj.weight"], torch.zeros(64, 16, 1, 2, 2)], dim=1)
    wide.load_state_dict(weights)
    wide.requires_grad_(False)
    narrow = HunyuanVideoModel(config_of(case, num_double_blocks=1, num_single_blocks=1))
    narrow.load_state_dict(weights | {"img_in.proj.weight": case.weights["img_in.proj.weight"]})
    x, t = case.inputs["x"], case.inputs["t"].double() / 1000
    clean = keyed.normal((16, 3, 6, 8), "clean")
    cond = FAMILY.collate(entries_of(case, latents=clean))
    assert torch.equal(FAMILY.predict(wide, x, t, cond), FAMILY.predict(narrow, x, t, cond)), "zero weights see nothing"
    seen = []
    wide.img_in.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    FAMILY.predict(wide, x, t, cond)
    assert torch.equal(seen[0][:, :16], x)
    assert torch.equal(seen[0][:, 16:, 0], clean[:, 0].expand(2, -1, -1, -1))
    assert not seen[0][:, 16:, 1:].any()


def test_an_image_to_video_model_without_a_first_frame_says_so(case):
    with torch.device("meta"):
        wide = HunyuanVideoModel(config_of(case, in_channels=32))
    cond = FAMILY.collate(entries_of(case))
    with pytest.raises(UserError, match=r"takes 32 channels .* was given no first frame"):
        FAMILY.predict(wide, case.inputs["x"], case.inputs["t"].double() / 1000, cond)


# guidance in training


def test_training_tells_the_raw_number_and_the_thousandfold_on_demand(case, caplog):
    header = header_of({key: tuple(value.shape) for key, value in case.weights.items()})
    sizes = {"rope_axes_dims": [8, 12, 12]}
    told = []
    with caplog.at_level("INFO"):
        for options in (None, ModelOptions(), TrainedModelOptions(guidance_scale=3.5)):
            told.append(FAMILY.build_dit(header, sizes, options).guidance)
        told.append(FAMILY.build_dit(header, sizes, TrainedModelOptions(guidance_times_1000=True)).guidance)
    assert told == [1.0, 1.0, 3.5, 1000.0]
    assert [r.getMessage().split(",")[0] for r in caplog.records] == [
        "in training the model is told guidance 3.5",
        "in training the model is told guidance 1000",
    ]


def test_the_models_own_guidance_is_used_where_the_conditioning_names_none(model, case):
    plain = [{k: v for k, v in entry.items() if k != "guidance"} for entry in entries_of(case)]
    x, t = case.inputs["x"], case.inputs["t"].double() / 1000
    told = HunyuanVideoModel(model.config, guidance=6000.0)
    told.load_state_dict(model.state_dict())
    asked = [{**entry, "guidance": torch.tensor(6.0)} for entry in plain]
    expected = FAMILY.predict(model, x, t, FAMILY.collate(asked))
    assert distance(FAMILY.predict(told, x, t, FAMILY.collate(plain)), expected) < 1e-6
    assert distance(FAMILY.predict(model, x, t, FAMILY.collate(plain)), expected) > 1e-4


# published files


def header_of(shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Header:
    path = Path("hunyuan.safetensors")
    tensors = {key: TensorInfo(shape=shape, dtype=torch.bfloat16, file=path) for key, shape in shapes.items()}
    return Header(tensors=tensors, metadata=metadata or {}, paths=(path,))


@pytest.mark.parametrize("name", ["hunyuan_video_t2v", "hunyuan_video_skyreels_i2v"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_model_built_from_a_header_has_the_published_keys_and_shapes(name, prefix):
    shapes = manifest(name)
    dit = FAMILY.build_dit(header_of({prefix + key: shape for key, shape in shapes.items()}))
    built = {key: tuple(value.shape) for key, value in dit.state_dict().items()}
    assert built == shapes
    assert all(value.is_meta for value in dit.state_dict().values())
    assert {FAMILY.rename_dit_key(prefix + key) for key in shapes} == set(built)
    about = json.loads((REFERENCE / "checkpoints" / f"{name}.json").read_text())["config"]
    for field in ("num_heads", "in_channels", "out_channels", "mlp_ratio", "guidance_embed", "text_refiner_depth"):
        assert getattr(dit.config, field) == about[field]


@pytest.mark.parametrize("name", ["hunyuan_video_t2v", "hunyuan_video_skyreels_i2v"])
def test_default_lora_and_fp8_targets_are_the_published_modules(name):
    about = json.loads((REFERENCE / "lora" / f"{name}.json").read_text())
    shapes = manifest(name)
    modules = {path for _, path in about["modules"]}
    policy = Fp8Policy(SPEC.fp8)
    assert {key.removesuffix(".weight") for key in shapes if policy.selects(key) and len(shapes[key]) == 2} == modules
    assert not any(policy.selects(key) for key in shapes if len(shapes[key]) != 2)
    dit = FAMILY.build_dit(header_of(shapes))
    adapters = attach(dit, SPEC.adapter, rank=4, alpha=1, seed=0)
    assert [[a.name, path] for a, path in zip(adapters.modules, adapters.paths, strict=True)] == about["modules"]
    found = {f"{a.name}.lora_down.weight": [4, a.in_features] for a in adapters.modules}
    found |= {f"{a.name}.lora_up.weight": [a.out_features, 4] for a in adapters.modules}
    assert found | {f"{a.name}.alpha": [] for a in adapters.modules} == about["tensors"]


def test_the_pt_file_with_its_wrapper_loads_and_computes_in_fp8(case, tmp_path):
    torch.save({"module": case.weights}, tmp_path / "mp_rank_00_model_states.pt")
    with open_checkpoint(tmp_path / "mp_rank_00_model_states.pt") as checkpoint:
        dit = FAMILY.build_dit(checkpoint.header, {"rope_axes_dims": [8, 12, 12]})
        policy = WeightPolicy(torch.float32, Fp8Policy(SPEC.fp8))
        report = materialize(dit, checkpoint, rename=FAMILY.rename_dit_key, policy=policy, progress=False)
    assert len(report.fp8) == 2 * 8 + 2 * 2
    assert isinstance(dit.double_blocks[0].img_attn_qkv, Fp8Linear)
    cond = FAMILY.collate(entries_of(case))
    v = FAMILY.predict(dit, case.inputs["x"], case.inputs["t"].double() / 1000, cond)
    assert 1e-3 < distance(v, case.outputs["sample"]) < 0.1


def test_sizes_that_shapes_cannot_tell_come_from_the_file_itself(case, tmp_path):
    sizes = {"rope_axes_dims": [8, 12, 12]}
    save_file(case.weights, tmp_path / "tiny.safetensors", {"musubi.config": json.dumps(sizes)})
    with open_checkpoint(tmp_path / "tiny.safetensors") as checkpoint:
        assert FAMILY.build_dit(checkpoint.header).config == config_of(case)


def test_a_model_without_guidance_input_has_none(case):
    shapes = {key: tuple(v.shape) for key, v in case.weights.items() if not key.startswith("guidance_in")}
    dit = FAMILY.build_dit(header_of(shapes), {"rope_axes_dims": [8, 12, 12]})
    assert dit.guidance_in is None
    assert set(dit.state_dict()) == set(shapes)


def test_an_adapter_on_a_modulation_layer_is_not_passed_over(model, case):
    """Modulation is computed in float32 by hand; a module in its slot must be called all the same."""
    other = HunyuanVideoModel(model.config)
    other.load_state_dict(model.state_dict())
    paths = ("double_blocks.0.img_mod.linear", "single_blocks.1.modulation.linear")
    before, _ = run_case(other, case)
    for path in paths:
        parent, _, name = path.rpartition(".")
        layer = other.get_submodule(path)
        other.get_submodule(parent)._modules[name] = Shifted(layer)
        after, _ = run_case(other, case)
        assert distance(after, before) > 1e-4
        before = after


class Shifted(torch.nn.Module):
    """Stands for an adapter: the layer's own product and something more."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight = layer, layer.weight

    def forward(self, x):
        return self.layer(x) + 0.1


@pytest.mark.parametrize(
    ("shapes", "metadata", "message"),
    [
        (manifest("hunyuan_video_vae"), {}, "is not a HunyuanVideo transformer: it has no img_in.proj.weight"),
        (manifest("flux_kontext_dev"), {}, "is not a HunyuanVideo transformer"),
        (
            manifest("hunyuan_video_t2v") | {"img_in.proj.weight": (3072, 33, 1, 2, 2)},
            {},
            "takes 33 input channels: .* which take 16, .* which take 32",
        ),
        (manifest("hunyuan_video_t2v"), {"musubi.config": '{"heads": 3}'}, "heads is not a size of this model"),
        (manifest("hunyuan_video_t2v"), {"musubi.config": '{"num_heads": 7}'}, "hidden_size = 3072, num_heads = 7"),
    ],
)
def test_another_file_is_refused_in_one_sentence(shapes, metadata, message):
    with pytest.raises(UserError, match=message):
        FAMILY.build_dit(header_of(shapes, metadata))


@pytest.mark.shows("dit_in_channels")
def test_the_channels_option_is_compared_with_the_file():
    header = header_of(manifest("hunyuan_video_skyreels_i2v"))
    assert FAMILY.build_dit(header, None, ModelOptions(dit_in_channels=32)).config.in_channels == 32
    with pytest.raises(UserError, match=r"--dit_in_channels 16: .* takes 32"):
        FAMILY.build_dit(header, None, ModelOptions(dit_in_channels=16))


@pytest.mark.parametrize(("text", "pooled"), [(40, 24), (48, 20)])
def test_text_that_another_encoder_made_is_refused(model, case, text, pooled):
    entry = {"text": torch.zeros(3, text), "mask": torch.ones(3), "pooled": torch.zeros(pooled)}
    with pytest.raises(UserError, match=f"{text} and {pooled} wide: this model takes 48 and 24"):
        FAMILY.predict(model, case.inputs["x"][:1], torch.tensor([0.5]), FAMILY.collate([entry]))


# diffusers


def test_diffusers_with_the_same_weights_agrees(model, case):
    from diffusers import HunyuanVideoTransformer3DModel

    c = model.config
    other = HunyuanVideoTransformer3DModel(
        num_attention_heads=c.num_heads,
        attention_head_dim=c.head_dim,
        num_layers=c.num_double_blocks,
        num_single_layers=c.num_single_blocks,
        num_refiner_layers=c.text_refiner_depth,
        mlp_ratio=c.mlp_ratio,
        guidance_embeds=True,
        text_embed_dim=c.text_dim,
        pooled_projection_dim=c.pooled_text_dim,
        rope_theta=c.rope_theta,
        rope_axes_dim=c.rope_axes_dims,
    ).eval()
    other.load_state_dict(to_diffusers(model.state_dict(), c.hidden_size))
    given = case.inputs
    with torch.no_grad():
        theirs = other(
            given["x"],
            given["t"],
            given["text_states"],
            given["text_mask"],
            given["text_states_2"],
            given["guidance"],
            return_dict=False,
        )[0]
    assert distance(theirs, case.outputs["sample"]) < TOLERANCE
    assert distance(run_case(model, case)[0], theirs) < TOLERANCE


RENAMED = (
    ("img_in.proj.", "x_embedder.proj."),
    ("txt_in.input_embedder.", "context_embedder.proj_in."),
    ("txt_in.t_embedder.mlp.0.", "context_embedder.time_text_embed.timestep_embedder.linear_1."),
    ("txt_in.t_embedder.mlp.2.", "context_embedder.time_text_embed.timestep_embedder.linear_2."),
    ("txt_in.c_embedder.", "context_embedder.time_text_embed.text_embedder."),
    ("txt_in.individual_token_refiner.blocks.", "context_embedder.token_refiner.refiner_blocks."),
    (".adaLN_modulation.1.", ".norm_out.linear."),
    (".self_attn_proj.", ".attn.to_out.0."),
    (".mlp.fc1.", ".ff.net.0.proj."),
    (".mlp.fc2.", ".ff.net.2."),
    ("time_in.mlp.0.", "time_text_embed.timestep_embedder.linear_1."),
    ("time_in.mlp.2.", "time_text_embed.timestep_embedder.linear_2."),
    ("guidance_in.mlp.0.", "time_text_embed.guidance_embedder.linear_1."),
    ("guidance_in.mlp.2.", "time_text_embed.guidance_embedder.linear_2."),
    ("vector_in.in_layer.", "time_text_embed.text_embedder.linear_1."),
    ("vector_in.out_layer.", "time_text_embed.text_embedder.linear_2."),
    ("double_blocks.", "transformer_blocks."),
    ("img_mod.linear.", "norm1.linear."),
    ("txt_mod.linear.", "norm1_context.linear."),
    ("img_attn_q_norm.", "attn.norm_q."),
    ("img_attn_k_norm.", "attn.norm_k."),
    ("txt_attn_q_norm.", "attn.norm_added_q."),
    ("txt_attn_k_norm.", "attn.norm_added_k."),
    ("img_attn_proj.", "attn.to_out.0."),
    ("txt_attn_proj.", "attn.to_add_out."),
    ("img_mlp.fc1.", "ff.net.0.proj."),
    ("img_mlp.fc2.", "ff.net.2."),
    ("txt_mlp.fc1.", "ff_context.net.0.proj."),
    ("txt_mlp.fc2.", "ff_context.net.2."),
    ("single_blocks.", "single_transformer_blocks."),
    (".q_norm.", ".attn.norm_q."),
    (".k_norm.", ".attn.norm_k."),
    (".modulation.linear.", ".norm.linear."),
    (".linear2.", ".proj_out."),
    ("final_layer.linear.", "proj_out."),
)
FUSED = {
    "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}


def to_diffusers(state: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """The state dictionary of diffusers' HunyuanVideoTransformer3DModel."""
    found = {}
    for key, value in state.items():
        if key.startswith("final_layer.adaLN_modulation.1."):  # shift, scale there; scale, shift in diffusers
            shift, scale = value.chunk(2)
            found[key.replace("final_layer.adaLN_modulation.1.", "norm_out.linear.")] = torch.cat([scale, shift])
            continue
        stem, _, leaf = key.rpartition(".")
        block, _, layer = stem.rpartition(".")
        parts = FUSED.get(layer, ())
        rows = value.split([width] * 3 + ([len(value) - 3 * width] if len(parts) == 4 else [])) if parts else (value,)
        for name, part in zip([f"{block}.{p}.{leaf}" for p in parts] or [key], rows, strict=True):
            renamed = name
            for old, new in RENAMED:
                renamed = renamed.replace(old, new)
            found[renamed] = part.clone()
    return found
