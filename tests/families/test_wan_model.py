"""Wan's transformer against fixtures, published manifests and diffusers' implementation."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from golden_data import REFERENCE, TOLERANCE, distance, golden, manifest
from musubi_tuner.config.errors import UserError
from musubi_tuner.families import registry
from musubi_tuner.families.wan.model import WanConfig, WanModel
from musubi_tuner.families.wan.options import ModelOptions
from musubi_tuner.nn.checkpointing import checkpointed
from musubi_tuner.nn.runner import direct
from musubi_tuner.weights.load import materialize
from musubi_tuner.weights.policy import Fp8Policy, WeightPolicy
from musubi_tuner.weights.reader import open_checkpoint
from tiny_models import header_of as header_of_tiny
from wan_files import PUBLISHED, header_of, to_diffusers

FAMILY = registry.get("wan")


@pytest.fixture(scope="module")
def case():
    return golden("wan2_1_t2v_a")


@pytest.fixture(scope="module")
def model(case) -> WanModel:
    sizes = ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_len")
    model = WanModel(WanConfig(**{name: case.config[name] for name in sizes}))
    model.load_state_dict(case.weights)
    return model.requires_grad_(False)


def run_case(model, case, run=direct):
    x = case.inputs["x"].clone().requires_grad_()
    sample = model(x, case.inputs["t"], case.inputs["context"], run=run)
    sample.square().mean().backward()
    return sample.detach(), x.grad


def test_output_and_gradient_equal_the_fixture(model, case):
    sample, grad = run_case(model, case)
    assert distance(sample, case.outputs["sample"]) < TOLERANCE
    assert distance(grad, case.outputs["grad_x"]) < TOLERANCE


def test_predict_gives_the_model_a_thousand_t(model, case):
    v = FAMILY.predict(model, case.inputs["x"], case.inputs["t"].double() / 1000, {"text": case.inputs["context"]})
    assert distance(v, case.outputs["sample"]) < TOLERANCE


def test_text_that_ends_early_is_padded_with_zeros_that_are_attended_to(model, case):
    """The fixture's second caption has 4 tokens; cut to them, the result must not change."""
    lengths = case.inputs["context_lens"].tolist()
    entries = [{"text": row[:n]} for row, n in zip(case.inputs["context"], lengths, strict=True)]
    v = FAMILY.predict(model, case.inputs["x"], case.inputs["t"].double() / 1000, FAMILY.collate(entries))
    assert distance(v, case.outputs["sample"]) < TOLERANCE


def test_a_batch_of_two_equals_two_batches(model, case):
    x, t, text = case.inputs["x"], case.inputs["t"], case.inputs["context"]
    together = model(x, t, text)
    apart = torch.cat([model(x[i : i + 1], t[i : i + 1], text[i : i + 1]) for i in range(2)])
    assert distance(together, apart) < 1e-6


@pytest.mark.parametrize("offload", [False, True])
def test_checkpointing_changes_no_bit(model, case, offload):
    plain, again = run_case(model, case), run_case(model, case, checkpointed(cpu_offload=offload))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_checkpointing_keeps_one_tensor_per_block(model, case):
    """Bytes that autograd holds fall by far more than the blocks' inputs cost."""

    def held(run) -> int:
        total: dict[int, int] = {}

        def pack(tensor):
            total[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(case.inputs["x"].clone().requires_grad_(), case.inputs["t"], case.inputs["context"], run=run)
        return sum(total.values())

    assert held(checkpointed()) < 0.5 * held(direct)


def test_blocks_run_through_the_callable(model, case):
    """Skipping a block from outside gives the fixture's result for a skipped block: nothing loops inside."""
    skip = set(case.config["skip_blocks_for_sample_skip_blocks"])
    sample = model(
        case.inputs["x"],
        case.inputs["t"],
        case.inputs["context"],
        run=lambda blocks, h, ctx: direct([b for i, b in enumerate(blocks) if i not in skip], h, ctx),
    )
    assert distance(sample, case.outputs["sample_skip_blocks"]) < TOLERANCE


def test_bf16_weights_give_bf16_activations_and_a_close_result(model, case):
    half = WanModel(model.config)
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    v = half(case.inputs["x"], case.inputs["t"], case.inputs["context"])
    assert v.dtype == torch.float32, "the result has x's dtype"
    assert 1e-4 < distance(v, case.outputs["sample"]) < 2e-2


def test_autocast_halves_the_blocks_and_leaves_time_and_head_in_float32(case, model):
    kinds = {}
    dit = copy.deepcopy(model)
    for name in ("patch_embedding", "blocks.0", "blocks.1.ffn", "blocks.1.self_attn", "head"):
        dit.get_submodule(name).register_forward_hook(lambda _m, _i, y, name=name: kinds.update({name: y.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        v = dit(case.inputs["x"], case.inputs["t"], case.inputs["context"])
    assert kinds.pop("head") == torch.float32
    assert len(kinds) == 4
    assert set(kinds.values()) == {torch.bfloat16}
    assert v.dtype == torch.float32
    assert 1e-4 < distance(v, case.outputs["sample"]) < 2e-2


def test_the_time_vector_does_not_know_the_weights_precision(model, case):
    """With weights that bf16 holds exactly, time vectors of both precisions agree to float32, at late times too."""
    half, full = WanModel(model.config), WanModel(model.config)
    half.load_state_dict(model.state_dict())
    full.load_state_dict(half.to(torch.bfloat16).state_dict())
    t = torch.tensor([999.123456, 17.5], dtype=torch.float64)
    assert half.time_vector(t).dtype == torch.float32
    assert torch.equal(half.time_vector(t), full.time_vector(t))


@pytest.mark.parametrize("scaled", [True, False])
def test_fp8_slots_are_the_spec_s_and_keep_the_result_close(model, case, tmp_path, scaled):
    sizes = {"num_heads": 3, "text_len": 10}
    save_file(case.weights, tmp_path / "tiny.safetensors", {"musubi.config": json.dumps(sizes)})
    with open_checkpoint(tmp_path / "tiny.safetensors") as checkpoint:
        dit = FAMILY.build_dit(checkpoint.header)
        policy = WeightPolicy(None, Fp8Policy(FAMILY.spec.fp8, scaled=scaled))
        report = materialize(dit, checkpoint, rename=FAMILY.rename_dit_key, policy=policy, progress=False)
    assert len(report.fp8) == 2 * 10
    v, grad = run_case(dit, case)
    assert 1e-4 < distance(v, case.outputs["sample"]) < 0.05
    assert 1e-4 < distance(grad, case.outputs["grad_x"]) < 0.05


def test_diffusers_with_the_same_weights_agrees(model, case):
    from diffusers import WanTransformer3DModel

    c = model.config
    other = WanTransformer3DModel(
        num_attention_heads=c.num_heads,
        attention_head_dim=c.head_dim,
        text_dim=c.text_dim,
        freq_dim=c.freq_dim,
        ffn_dim=c.ffn_dim,
        num_layers=c.num_layers,
        rope_max_seq_len=64,
    ).eval()
    other.load_state_dict({to_diffusers(key): value for key, value in model.state_dict().items()})
    with torch.no_grad():
        theirs = other(case.inputs["x"], case.inputs["t"], case.inputs["context"], return_dict=False)[0]
    assert distance(theirs, case.outputs["sample"]) < TOLERANCE
    assert distance(model(case.inputs["x"], case.inputs["t"], case.inputs["context"]), theirs) < TOLERANCE


def test_a_file_in_diffusers_names_is_read(model):
    keys = list(model.state_dict())
    renamed = [to_diffusers(key) for key in keys]
    assert [FAMILY.rename_dit_key(key) for key in renamed] == keys
    shapes = {to_diffusers(key): shape for key, shape in manifest("wan2_1_t2v_1_3b").items()}
    config = FAMILY.build_dit(header_of(shapes)).config
    assert (config.dim, config.ffn_dim, config.num_heads, config.num_layers) == (1536, 8960, 12, 30)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_model_built_from_a_header_has_the_published_keys_and_shapes(name, prefix):
    shapes = manifest(name)
    dit = FAMILY.build_dit(header_of({prefix + key: shape for key, shape in shapes.items()}))
    built = {key: tuple(value.shape) for key, value in dit.state_dict().items()}
    assert built == shapes
    assert all(value.is_meta for value in dit.state_dict().values())
    assert {FAMILY.rename_dit_key(prefix + key) for key in shapes} == set(built)


def test_sizes_that_shapes_cannot_tell_come_from_the_file_itself(case, tmp_path):
    """Three heads of 32 and a text of 10 tokens: metadata `musubi.config` says so."""
    sizes = {"num_heads": 3, "text_len": 10}
    save_file(case.weights, tmp_path / "tiny.safetensors", {"musubi.config": json.dumps(sizes)})
    with open_checkpoint(tmp_path / "tiny.safetensors") as checkpoint:
        config = FAMILY.build_dit(checkpoint.header).config
        given = FAMILY.build_dit(checkpoint.header, {"text_len": 12}).config
    assert (config.num_heads, config.text_len, config.dim, config.num_layers) == (3, 10, 96, 2)
    assert given.text_len == 12


ODD = {"patch_embedding.weight": (5120, 52, 1, 2, 2)}


@pytest.mark.parametrize(
    ("shapes", "metadata", "message"),
    [
        (manifest("wan2_1_t2v_14b") | ODD, {}, "takes 52 input channels and no picture features: this version runs"),
        (manifest("wan2_1_vae"), {}, "is not a Wan transformer: it has no patch_embedding.weight"),
        (manifest("flux_kontext_dev"), {}, "is not a Wan transformer"),
        (manifest("wan2_1_t2v_1_3b"), {"musubi.config": '{"heads": 3}'}, "heads is not a size of this model; use dim"),
        (manifest("wan2_1_t2v_1_3b"), {"musubi.config": "{"}, "musubi.config is not JSON"),
        (manifest("wan2_1_t2v_1_3b"), {"musubi.config": '{"num_heads": 7}'}, "dim = 1536, num_heads = 7"),
    ],
)
def test_another_file_is_refused_in_one_sentence(shapes, metadata, message):
    with pytest.raises(UserError, match=message):
        FAMILY.build_dit(header_of(shapes, metadata))


@pytest.mark.parametrize("shape", [(2, 11, 56), (2, 10, 64)])
def test_text_that_another_encoder_made_is_refused(model, case, shape):
    told = f"text of {shape[1]} tokens, {shape[2]} wide: this model takes at most 10 tokens, 56 wide"
    with pytest.raises(UserError, match=told):
        model(case.inputs["x"], case.inputs["t"], torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "task", "right"),
    [
        ("wan2_1_t2v_1_3b", "t2v-14B", "t2v-1.3B"),
        ("wan2_1_t2v_14b", "t2v-1.3B", "t2v-14B or t2i-14B or t2v-A14B"),
        ("wan2_1_i2v_14b", "t2v-14B", "i2v-14B"),
        ("wan2_2_i2v_a14b", "i2v-14B", "i2v-A14B"),
        ("wan2_1_flf2v_14b", "i2v-14B", "flf2v-14B"),
        ("wan2_1_t2v_1_3b_fc", "t2v-14B-FC", "t2v-1.3B-FC"),
    ],
)
@pytest.mark.shows("task")
def test_a_task_that_the_file_cannot_do_is_refused_with_the_one_it_can(name, task, right):
    header = header_of(manifest(name))
    with pytest.raises(UserError, match=f"--task {task}: .*; say --task {right}"):
        FAMILY.build_dit(header, None, ModelOptions(task=task))
    assert FAMILY.build_dit(header, None, ModelOptions(task=right.split()[0])).config.dim in (1536, 5120)


@pytest.mark.parametrize(("name", "task"), PUBLISHED.items())
def test_every_published_file_goes_with_its_task_and_has_its_fp8_targets(name, task):
    header = header_of(manifest(name))
    dit = FAMILY.build_dit(header, None, ModelOptions(task=task))
    expected = json.loads((REFERENCE / "fp8_targets.json").read_text())["models"][name]
    chosen = [key for key in dit.state_dict() if Fp8Policy(FAMILY.spec.fp8).selects(key)]
    assert len(chosen) == expected["quantized_tensors"]


def test_a_model_of_an_unusual_width_goes_with_any_task_of_its_kind():
    assert FAMILY.build_dit(header_of_tiny("wan"), None, ModelOptions(task="t2i-14B")).config.dim == 64
