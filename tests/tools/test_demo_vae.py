"""The VAE's pre-training: the quick convolution is the causal one, the unclamped decode and the fold are exact."""

import pytest
import torch
from torch import Tensor

from musubi_tuner.tools.demo import pretrain_vae, world

MEAN = [0.1 * i - 0.7 for i in range(16)]
STD = [1.0 + 0.1 * i for i in range(16)]


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    stage = pretrain_vae.Stage(steps=1, size=32, images=2, clips=2, clip_share=1.0)
    return pretrain_vae.batch(world.load_glyphs(held_out=True), stage, True, generator)


def _vaes() -> tuple[torch.nn.Module, torch.nn.Module]:
    from diffusers import AutoencoderKLWan

    quick = pretrain_vae.build(seed=2)
    plain = AutoencoderKLWan(**pretrain_vae.ARCHITECTURE)
    plain.load_state_dict(quick.state_dict())
    return quick, plain


@pytest.mark.parametrize("frames", [1, 5])
def test_quick_convolutions_equal_the_causal_ones(pixels: Tensor, frames: int) -> None:
    quick, plain = _vaes()
    with torch.no_grad():
        ours = pretrain_vae.encode(quick, pixels[:, :, :frames])
        torch.testing.assert_close(ours, plain.encode(pixels[:, :, :frames]).latent_dist.mean, atol=1e-5, rtol=1e-5)
        decoded = pretrain_vae.decode_unclamped(quick, ours)
        expected = plain.decode(ours).sample
        torch.testing.assert_close(decoded.clamp(-1, 1), expected, atol=1e-5, rtol=1e-5)


def test_fold_gives_the_wanted_statistics_and_keeps_the_pictures(pixels: Tensor) -> None:
    vae = pretrain_vae.build(seed=2)
    with torch.no_grad():
        before = pretrain_vae.decode_unclamped(vae, pretrain_vae.encode(vae, pixels))
        pretrain_vae.fold_statistics(vae, [pixels], MEAN, STD)
        latents = pretrain_vae.encode(vae, pixels)
        flat = latents.transpose(0, 1).flatten(1)
        torch.testing.assert_close(flat.mean(1), torch.tensor(MEAN), atol=1e-3, rtol=0)
        torch.testing.assert_close(flat.std(1), torch.tensor(STD), atol=1e-3, rtol=1e-3)
        after = pretrain_vae.decode_unclamped(vae, latents)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_a_few_steps_reduce_the_loss() -> None:
    recipe = pretrain_vae.VaeRecipe()
    glyphs, stage = world.load_glyphs(held_out=False), recipe.stages[0]
    vae = pretrain_vae.build(seed=2)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    losses = []
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        loss = pretrain_vae.loss_of(vae, pretrain_vae.batch(glyphs, stage, False, generator), recipe, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_stages_follow_one_another() -> None:
    recipe = pretrain_vae.VaeRecipe()
    first, second, *_, last = recipe.stages
    assert recipe.stage_at(0) is first
    assert recipe.stage_at(first.steps) is second
    assert recipe.stage_at(recipe.steps - 1) is last
    assert pretrain_vae.rate_at(recipe.steps, recipe) == pytest.approx(recipe.last_rate)


def test_the_decoder_alone_is_trained_once_the_encoder_is_settled(pixels: Tensor) -> None:
    recipe, average, model = pretrain_vae.VaeRecipe(), pretrain_vae.build(seed=2), pretrain_vae.build(seed=3)
    pretrain_vae.settle_encoder(model, average)
    pretrain_vae.loss_of(model, pixels, recipe, torch.Generator().manual_seed(1)).backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("encoder.", "quant_conv.")):
            assert parameter.grad is None
            assert torch.equal(parameter, average.get_parameter(name))
    assert model.get_parameter("post_quant_conv.weight").grad is not None
    assert model.get_parameter("decoder.conv_in.weight").grad.abs().sum() > 0
