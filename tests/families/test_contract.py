"""What every family promises the rest of the house. Runs for every folder that is found."""

import dataclasses
import re

import pytest
import torch

from musubi_tuner.adapters.attach import attach
from musubi_tuner.config.errors import UserError
from musubi_tuner.config.fields import options_of
from musubi_tuner.config.options import parse
from musubi_tuner.families import registry
from musubi_tuner.families.base import Family
from musubi_tuner.flow import keyed
from musubi_tuner.nn.checkpointing import checkpointed
from musubi_tuner.nn.runner import direct
from tiny_models import TINY, header_of, tiny_dit

COMMANDS = ("cache_latents", "cache_text", "train", "generate")


@pytest.fixture(params=registry.names())
def family(request) -> Family:
    return registry.get(request.param)


@pytest.fixture
def dit(family):
    return tiny_dit(family.spec.name)


def batch(family, lengths=(4, 2)):
    tiny = TINY[family.spec.name]
    x = keyed.normal((len(lengths), *tiny.latents), "contract", "x")
    t = torch.linspace(0.2, 0.9, len(lengths), dtype=torch.float64)
    return x, t, [tiny.entry(n) for n in lengths]


def test_there_are_families():
    assert "wan" in registry.names()


def test_an_unknown_family_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match=r"family 'wam' is not known: use one of .*wan"):
        registry.get("wam")


def test_the_spec_is_consistent(family):
    spec = family.spec
    assert spec.default_task in spec.tasks
    assert [field.name for field in spec.cache_fields].count("latents") == 1
    assert len({(f.file, f.key) for f in spec.cache_fields}) == len(spec.cache_fields)
    assert spec.network_module.startswith("networks.")
    assert re.fullmatch(r"[a-z0-9]+", spec.cache_tag)
    for pattern in spec.adapter.exclude:
        re.compile(pattern)
    for task in spec.tasks.values():
        frames, (width, height) = task.frames, task.size
        assert spec.latents.shape(frames, height, width)[0] == spec.latents.channels


def test_impossible_clip_sizes_are_refused_with_the_sizes(family):
    latents = family.spec.latents
    with pytest.raises(ValueError, match=f"height a multiple of {latents.spatial * latents.patch[1]}"):
        latents.shape(1, latents.spatial * latents.patch[1] + 1, latents.spatial * latents.patch[2])


@pytest.mark.parametrize("command", COMMANDS)
def test_option_groups_are_frozen_dataclasses_that_parse(family, command):
    groups = family.option_groups(command)
    assert len(groups) <= 2
    for group in groups:
        assert dataclasses.is_dataclass(group)
        assert group.__dataclass_params__.frozen
    required = [o.name for group in groups for o in options_of(group) if o.declared.required]
    words = [word for name in required for word in (f"--{name}", "x")]
    resolved = parse(groups, words, prog=command, description="contract")
    assert all(isinstance(resolved[group], group) for group in groups)


def test_the_transformer_is_built_on_meta_and_its_block_lists_are_there(family):
    dit = family.build_dit(header_of(family.spec.name), TINY[family.spec.name].sizes)
    assert all(parameter.is_meta for parameter in dit.parameters())
    for name in family.spec.blocks:
        assert len(dit.get_submodule(name)) > 0


def test_velocity_has_the_shape_and_dtype_of_its_input(family, dit):
    x, t, entries = batch(family)
    for dtype in (torch.float32, torch.bfloat16):
        v = family.predict(dit, x.to(dtype), t, family.collate(entries))
        assert v.shape == x.shape
        assert v.dtype == dtype
        assert torch.isfinite(v).all()


def test_ragged_samples_do_not_touch_one_another(family, dit):
    x, t, entries = batch(family)
    together = family.predict(dit, x, t, family.collate(entries))
    for i in range(2):
        alone = family.predict(dit, x[i : i + 1], t[i : i + 1], family.collate(entries[i : i + 1]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_clock_the_noise_and_the_text_all_matter(family, dit):
    x, t, entries = batch(family)
    v = family.predict(dit, x, t, family.collate(entries))
    for other in (
        family.predict(dit, x * 1.1, t, family.collate(entries)),
        family.predict(dit, x, t * 0.9, family.collate(entries)),
        family.predict(dit, x, t, family.collate(entries[::-1])),
    ):
        assert (v - other).norm() / v.norm() > 1e-5


def test_a_time_in_float64_is_not_rounded_on_the_way(family, dit):
    """t = 0.9 and the next float32 above it must give different sinusoids; half precision would merge them."""
    x, _, entries = batch(family, (3,))
    t = torch.tensor([0.9], dtype=torch.float64)
    a, b = (family.predict(dit, x, t + step, family.collate(entries)) for step in (0, 1e-4))
    assert not torch.equal(a, b)


def test_every_block_runs_through_the_callable(family, dit):
    x, t, entries = batch(family)
    seen = []

    def recording(blocks, h, ctx):
        seen.extend(blocks)
        return direct(blocks, h, ctx)

    v = family.predict(dit, x, t, family.collate(entries), run=recording)
    assert seen == [block for name in family.spec.blocks for block in dit.get_submodule(name)]
    assert torch.equal(v, family.predict(dit, x, t, family.collate(entries)))


def test_checkpointing_and_adapters_meet(family, dit):
    """Gradients of a LoRA on the default targets, with and without checkpointing, equal to the bit."""
    x, t, entries = batch(family)
    adapters = attach(dit, family.spec.adapter, rank=2, alpha=2, seed=0)
    with torch.no_grad():
        for name, parameter in adapters.named_parameters():
            parameter.copy_(keyed.normal(parameter.shape, "contract", name) * 0.1)
    found = []
    for run in (direct, checkpointed()):
        for parameter in adapters.parameters():
            parameter.grad = None
        family.predict(dit, x, t, family.collate(entries), run=run).square().mean().backward()
        found.append([p.grad.clone() for p in adapters.parameters()])
    assert found[0]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert sum(g.abs().sum() > 0 for g in found[0]) > len(found[0]) // 2


def test_wrapper_prefixes_of_repackaged_files_go(family, dit):
    keys = list(dit.state_dict())
    assert [family.rename_dit_key(f"model.diffusion_model.{key}") for key in keys] == keys
    assert [family.rename_dit_key(key) for key in keys] == keys
