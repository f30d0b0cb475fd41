import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from musubi_tuner.adapters.attach import NetworkArgs, attach, attach_tensors
from musubi_tuner.adapters.formats import lora_name, resolve
from musubi_tuner.adapters.lora import Dropout, DropoutKey, LoraLinear, initial_down
from musubi_tuner.config.errors import UserError
from musubi_tuner.families import registry
from musubi_tuner.nn.linear import Fp8Linear

Load = Callable[..., nn.Module]
TARGETS = registry.get("wan").spec.adapter
FIRST = "blocks.0.self_attn.q"


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def randomised(adapters: object, seed: int = 0) -> None:
    """Give the up factors values, as training would."""
    g = torch.Generator().manual_seed(seed)
    for slot in adapters.modules:  # type: ignore[attr-defined]
        with torch.no_grad():
            slot.up.copy_(0.1 * torch.randn(slot.up.shape, generator=g))


def test_the_golden_module_computes_the_golden_output(
    golden: dict[str, Tensor], lora: dict[str, Tensor], load: Load
) -> None:
    model = load()
    adapters = attach_tensors(model, lora)
    assert len(adapters.names) == 10
    y = model.get_submodule(FIRST)(golden["in.x"])
    assert relative(y, golden["out.y"]) < 1e-6


def test_the_established_forward_cases_hold(reference: Path) -> None:
    """Base and adapter in float32 and bfloat16, alpha 0, multiplier 0.7."""
    tensors = load_file(reference / "behaviour" / "lora_forward.safetensors")
    for case in json.loads((reference / "behaviour" / "lora.json").read_text())["forward"]:
        part = {k.split(".")[1]: v for k, v in tensors.items() if k.startswith(case["id"] + ".")}
        base = nn.Linear(part["w"].shape[1], part["w"].shape[0], dtype=part["w"].dtype)
        with torch.no_grad():
            base.weight.copy_(part["w"])
            base.bias.copy_(part["b"])
        slot = LoraLinear(
            "x", base, rank=case["dim"], alpha=case["alpha"], multiplier=case["multiplier"], dtype=part["down"].dtype
        )
        with torch.no_grad():
            slot.down.copy_(part["down"])
            slot.up.copy_(part["up"])
        assert slot.scale == case["scale"]
        y = slot(part["x"])
        assert y.dtype == part["y"].dtype
        exact = part["x"].double() @ part["w"].double().T + part["b"].double()
        exact += (
            case["scale"] * case["multiplier"] * (part["x"].double() @ part["down"].double().T @ part["up"].double().T)
        )
        assert relative(y, exact) < (1e-6 if y.dtype == torch.float32 else 4e-3), case["id"]
        assert relative(y, part["y"]) < (1e-6 if y.dtype == torch.float32 else 6e-3), case["id"]


@pytest.mark.parametrize("fp8", [False, True])
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_adds_its_delta(load: Load, fp8: bool) -> None:
    plain, model = load(fp8=fp8), load(fp8=fp8)
    adapters = attach(model, TARGETS, rank=4, alpha=2.0, seed=5)
    slot = model.get_submodule(FIRST)
    assert isinstance(slot, LoraLinear)
    assert isinstance(slot.base, Fp8Linear) is fp8
    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1))
    before = plain.get_submodule(FIRST)(x)
    assert torch.equal(slot(x), before)
    randomised(adapters)
    expected = before.double() + 0.5 * (x.double() @ slot.down.double().T @ slot.up.double().T)
    assert relative(slot(x), expected) < 1e-6
    adapters.multiplier = -0.25
    expected = before.double() - 0.125 * (x.double() @ slot.down.double().T @ slot.up.double().T)
    assert relative(slot(x), expected) < 1e-6
    with adapters.disabled():
        assert torch.equal(slot(x), before)
    assert not torch.equal(slot(x), before)


@pytest.mark.parametrize("fp8", [False, True])
def test_gradients_are_those_of_the_formula(load: Load, fp8: bool) -> None:
    model = load(fp8=fp8)
    adapters = attach(model, TARGETS, rank=3, alpha=6.0)
    randomised(adapters)
    slot = model.get_submodule(FIRST)
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
    slot(x).square().sum().backward()
    weight = slot.base.dequantized() if fp8 else slot.base.weight
    w, b = weight.double(), slot.base.bias.double()
    xd, down, up = (t.detach().double().requires_grad_() for t in (x, slot.down, slot.up))
    (xd @ w.T + b + 2.0 * (xd @ down.T @ up.T)).square().sum().backward()
    for mine, exact in ((x.grad, xd.grad), (slot.down.grad, down.grad), (slot.up.grad, up.grad)):
        assert relative(mine, exact) < 2e-6
    assert all(p.grad is None for p in slot.base.parameters())


def test_initial_values_are_keyed_and_kaiming_uniform() -> None:
    down = initial_down(64, 400, 7, "a")
    bound = 1 / math.sqrt(400)
    assert float(down.abs().max()) <= bound
    assert float(down.abs().max()) > 0.999 * bound
    assert abs(float(down.mean())) < 4 * bound / math.sqrt(3 * down.numel())
    assert abs(float(down.std()) - bound / math.sqrt(3)) < 0.01 * bound
    assert torch.equal(down, initial_down(64, 400, 7, "a"))
    assert not torch.equal(down, initial_down(64, 400, 8, "a"))
    assert not torch.equal(down, initial_down(64, 400, 7, "b"))


def test_initial_values_do_not_depend_on_what_else_is_adapted(load: Load) -> None:
    whole, part = load(), load()
    all_of_it = attach(whole, TARGETS, seed=3)
    some = attach(part, TARGETS, seed=3, args=NetworkArgs(include_patterns=(r".*ffn\.2",)))
    key = "lora_unet_blocks_0_ffn_2.lora_down.weight"
    assert some.paths == ("blocks.0.ffn.2",)
    assert torch.equal(dict(all_of_it.named_parameters())[key], dict(some.named_parameters())[key])


@pytest.mark.parametrize("fp8", [False, True])
def test_saving_and_loading_gives_the_same_output_to_the_bit(load: Load, fp8: bool) -> None:
    first, second, third = load(fp8=fp8), load(fp8=fp8), load(fp8=fp8)
    trained = attach(first, TARGETS, rank=5, alpha=3.0)
    randomised(trained)
    tensors = trained.state_dict()
    attach(second, TARGETS, rank=5, alpha=1.0, seed=9).load(tensors)
    attach_tensors(third, tensors)
    x = torch.randn(1, 3, 48)
    for path in trained.paths:
        inputs = x if first.get_submodule(path).in_features == 48 else torch.randn(1, 3, 64)
        expected = first.get_submodule(path)(inputs)
        assert torch.equal(second.get_submodule(path)(inputs), expected)
        assert torch.equal(third.get_submodule(path)(inputs), expected)


def test_rank_alpha_and_targets_are_those_of_the_file(load: Load) -> None:
    tensors = attach(
        load(), TARGETS, rank=6, alpha=2.0, args=NetworkArgs(include_patterns=(r".*cross.*",))
    ).state_dict()
    for key in [k for k in tensors if "cross_attn_v" in k and "alpha" not in k]:
        tensors[key] = tensors[key][:2] if "down" in key else tensors[key][:, :2]  # ranks may differ by module
    del tensors["lora_unet_blocks_0_cross_attn_k.alpha"]
    adapters = attach_tensors(load(), tensors)
    assert adapters.paths == tuple(f"blocks.0.cross_attn.{n}" for n in "qkvo")
    assert [(slot.rank, slot.alpha) for slot in adapters.modules] == [(6, 2.0), (6, 6.0), (2, 2.0), (6, 2.0)]


def test_a_file_of_another_rank_or_set_is_refused_by_an_adapter(load: Load) -> None:
    tensors = attach(load(), TARGETS, rank=6).state_dict()
    adapters = attach(load(), TARGETS, rank=4)
    with pytest.raises(UserError, match=r"10 differences: .* \(rank 6, this adapter has 4\)"):
        adapters.load(tensors, label="x.safetensors")
    tensors = {k: v for k, v in attach(load(), TARGETS, rank=4).state_dict().items() if "ffn_0" not in k}
    with pytest.raises(UserError, match=r"1 differences: blocks\.0\.ffn\.0"):
        adapters.load(tensors)
    with pytest.raises(UserError, match=r"1 differences: stray\.lora_up\.weight"):
        adapters.load({**adapters.state_dict(), "stray.lora_up.weight": torch.ones(1)})


def test_detaching_restores_the_model(load: Load) -> None:
    model = load()
    before = {name: (id(m), type(m)) for name, m in model.named_modules()}
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    adapters = attach(model, TARGETS)
    randomised(adapters)
    kept = adapters.state_dict()
    adapters.detach()
    adapters.detach()  # again does nothing
    assert {name: (id(m), type(m)) for name, m in model.named_modules()} == before
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(t, kept[key]) for key, t in adapters.state_dict().items())


def test_only_the_adapter_is_trained(load: Load) -> None:
    model = load()
    adapters = attach(model, TARGETS)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapters.parameters()}
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}


def test_state_dict_is_a_copy_in_the_asked_precision(load: Load) -> None:
    adapters = attach(load(), TARGETS)
    state = adapters.state_dict(torch.bfloat16)
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    state = adapters.state_dict()
    state["lora_unet_blocks_0_self_attn_q.lora_down.weight"].zero_()
    assert adapters.modules[0].down.any()


def test_lora_plus_gives_the_up_factors_their_own_rate(load: Load) -> None:
    adapters = attach(load(), TARGETS)
    (one,) = adapters.parameter_groups(1e-3)
    assert len(one["params"]) == 20
    downs, ups = adapters.parameter_groups(1e-3, 4.0)
    assert (downs["lr"], ups["lr"]) == (1e-3, 4e-3)
    assert {id(p) for p in ups["params"]} == {id(slot.up) for slot in adapters.modules}
    assert len(downs["params"]) == 10


@pytest.mark.parametrize(("how", "told"), [({"rank": 0}, "network_dim 0"), ({"dropout": 1.0}, "network_dropout 1.0")])
def test_impossible_sizes_are_told(load: Load, how: dict[str, float], told: str) -> None:
    with pytest.raises(UserError, match=told):
        attach(load(), TARGETS, **how)  # type: ignore[arg-type]


def test_a_model_is_adapted_once(load: Load) -> None:
    model = load()
    adapters = attach(model, TARGETS)
    path = adapters.paths[0]
    with pytest.raises(UserError, match="has an adapter already; detach it first"):
        attach(model, TARGETS)
    assert isinstance(model.get_submodule(path).base, nn.Linear)


# Dropout


def constant_slot(dropout: Dropout) -> tuple[LoraLinear, DropoutKey]:
    """Base 0, down and up constant: without dropout every output is 1."""
    key = DropoutKey()
    base = nn.Linear(8, 8, bias=False)
    nn.init.zeros_(base.weight)
    slot = LoraLinear("m", base, rank=16, alpha=16, dropout=dropout, key=key)
    with torch.no_grad():
        slot.down.fill_(1 / 8)
        slot.up.fill_(1 / 16)
    return slot.train(), key


def test_dropout_is_off_in_evaluation_and_needs_a_key_in_training() -> None:
    slot, _ = constant_slot(Dropout(activation=0.5, rank=0.5, module=0.5))
    assert torch.allclose(slot.eval()(torch.ones(2, 3, 8)), torch.ones(2, 3, 8))
    with pytest.raises(RuntimeError, match="begin_step"):
        slot.train()(torch.ones(2, 3, 8))


def test_rank_dropout_is_one_mask_for_all_tokens_of_an_item() -> None:
    """The distribution of the reference data: kept ranks / 16 / 0.75, binomial."""
    slot, key = constant_slot(Dropout(rank=0.25))
    key.begin_step(0, 0, tuple(range(2000)))
    y = slot(torch.ones(2000, 5, 8)).detach()
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    kept = y[:, 0, 0] * 16 * 0.75
    assert torch.allclose(kept, kept.round(), atol=1e-4)
    assert abs(float(y[:, 0, 0].mean()) - 1) < 4 * 0.1443 / math.sqrt(2000)
    assert abs(float(y[:, 0, 0].std()) - math.sqrt(0.25 / 0.75 / 16)) < 0.01


def test_activation_dropout_differs_by_token_and_keeps_the_mean() -> None:
    slot, key = constant_slot(Dropout(activation=0.5))
    key.begin_step(0, 0, (0, 1))
    y = slot(torch.ones(2, 3000, 8)).detach()
    assert y[0, :, 0].unique().numel() > 8
    assert abs(float(y.mean()) - 1) < 0.02


def test_module_dropout_drops_all_or_nothing_without_rescaling() -> None:
    slot, key = constant_slot(Dropout(module=0.3))
    values = []
    for step in range(400):
        key.begin_step(0, step, (1, 2))
        y = slot(torch.ones(2, 3, 8)).detach()
        assert torch.equal(y, y.flatten()[0].expand_as(y))
        values.append(float(y.flatten()[0]))
    assert set(values) == {0.0, 1.0}
    assert abs(values.count(0.0) / 400 - 0.3) < 4 * math.sqrt(0.21 / 400)


def test_masks_belong_to_items_not_to_batches() -> None:
    slot, key = constant_slot(Dropout(activation=0.4, rank=0.2))
    key.begin_step(3, 1, (10, 20, 30))
    together = slot(torch.ones(3, 4, 8))
    key.begin_step(3, 1, (30, 10))
    apart = slot(torch.ones(2, 4, 8))
    assert torch.equal(apart[0], together[2])
    assert torch.equal(apart[1], together[0])
    assert torch.equal(slot(torch.ones(2, 4, 8)), apart)  # a recomputation draws the same
    key.begin_step(3, 2, (30, 10))
    assert not torch.equal(slot(torch.ones(2, 4, 8)), apart)


# Other spellings


@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    [
        ("diffusion_model.", ".lora_A.weight", ".lora_B.weight"),
        ("transformer.", ".lora_A.weight", ".lora_B.weight"),
        ("", ".lora_A.default.weight", ".lora_B.default.weight"),
        ("base_model.model.", ".lora_A.weight", ".lora_B.weight"),
        ("diffusion_model.", ".lora.down.weight", ".lora.up.weight"),
    ],
)
def test_dotted_spellings_load_as_the_default_one(
    lora: dict[str, Tensor], load: Load, prefix: str, down: str, up: str
) -> None:
    model = load()
    paths = {path.replace(".", "_"): path for path, _ in model.named_modules()}
    renamed = {}
    for key, tensor in lora.items():
        name, _, part = key.partition(".")
        suffix = {"lora_down.weight": down, "lora_up.weight": up, "alpha": ".alpha"}[part]
        renamed[f"{prefix}{paths[name.removeprefix('lora_unet_')]}{suffix}"] = tensor
    shapes = {path: tuple(m.weight.shape) for path, m in model.named_modules() if type(m) is nn.Linear}
    found = resolve(renamed, shapes)
    assert found.unmatched == ()
    assert {lora_name(path) for path in found.modules} == {key.partition(".")[0] for key in lora}
    for path, factors in found.modules.items():
        name = lora_name(path)
        assert factors.down is not None
        assert factors.up is not None
        assert torch.equal(factors.down, lora[f"{name}.lora_down.weight"])
        assert torch.equal(factors.up, lora[f"{name}.lora_up.weight"])
        assert factors.alpha == float(lora[f"{name}.alpha"])


def test_the_established_converted_form_has_the_same_delta(
    golden: dict[str, Tensor], lora: dict[str, Tensor], load: Load
) -> None:
    other = {k.removeprefix("out.other_format."): v for k, v in golden.items() if k.startswith("out.other_format.")}
    shapes = {path: tuple(m.weight.shape) for path, m in load().named_modules() if type(m) is nn.Linear}
    converted, default = resolve(other, shapes), resolve(lora, shapes)
    assert converted.modules.keys() == default.modules.keys()
    for path, factors in default.modules.items():
        assert converted.modules[path].alpha is None
        assert relative(converted.modules[path].delta(), factors.delta()) < 1e-6


def test_what_does_not_apply_is_counted_and_named(
    lora: dict[str, Tensor], load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {
        **lora,
        "lora_unet_nowhere.lora_down.weight": torch.ones(2, 3),
        "lora_unet_blocks_0_ffn_0.dora_scale": torch.ones(2, 2),
        "lora_unet_head_head.lora_up.weight": torch.ones(64, 2),
        "lora_unet_text_embedding_0.lora_down.weight": torch.ones(2, 5),
        "lora_unet_text_embedding_0.lora_up.weight": torch.ones(48, 2),
    }
    with pytest.raises(UserError, match=r"LoRA f: 4 entries do not apply to this model"):
        attach_tensors(load(), tensors, label="f")
    adapters = attach_tensors(load(), tensors, strict=False, label="f")
    assert len(adapters.names) == 10
    (record,) = caplog.records
    told = record.getMessage()
    for part in (
        "4 entries",
        "lora_unet_nowhere.lora_down.weight",
        "dora_scale",
        "head.head (only its up factor is there)",
        "text_embedding.0 (down [2, 5] and up [48, 2] for a weight [48, 24])",
    ):
        assert part in told


def test_a_lora_of_another_family_is_an_error_even_when_lenient(load: Load) -> None:
    tensors = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 3)}
    with pytest.raises(UserError, match=r"none of its 1 entries fits this model.*double_blocks.*another family"):
        attach_tensors(load(), tensors, strict=False)


def test_one_module_under_two_spellings_is_refused(lora: dict[str, Tensor], load: Load) -> None:
    tensors = {**lora, "diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.ones(4, 48)}
    with pytest.raises(UserError, match=r"blocks\.0\.ffn\.0 has its 'down' twice"):
        attach_tensors(load(), tensors)
