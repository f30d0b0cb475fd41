"""Guidance is the published formula, by one call or two."""

import pytest
import torch

from musubi_tuner.sampling import guidance


def conditional(x, t):
    return x.sin() + t


def unconditional(x, t):
    return x.cos() - 2 * t


X = torch.linspace(-1, 1, 12).view(2, 3, 1, 2, 1)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5])
def test_guidance_extrapolates_from_without_to_with(scale):
    got = guidance.classifier_free(conditional, unconditional, scale)(X, 0.25)
    torch.testing.assert_close(got, (1 - scale) * unconditional(X, 0.25) + scale * conditional(X, 0.25))


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_rescaled_guidance_has_the_spread_of_the_prompt_alone(share):
    """Each sample by its own standard deviations (Lin et al. 2023, section 3.4)."""
    x = X + torch.tensor([0.0, 3.0]).view(2, 1, 1, 1, 1)
    plain = guidance.classifier_free(conditional, unconditional, 4.5)(x, 0.25)
    got = guidance.classifier_free(conditional, unconditional, 4.5, rescale=share)(x, 0.25)
    for n in range(2):
        factor = conditional(x, 0.25)[n].std() / plain[n].std()
        torch.testing.assert_close(got[n], share * factor * plain[n] + (1 - share) * plain[n])
    assert not torch.allclose(got, plain, rtol=0.05)


def test_one_call_of_twice_the_batch_gives_the_same():
    sizes = []

    def both(x, t):
        sizes.append(len(x))
        with_prompt, without = x.chunk(2)
        return torch.cat([conditional(with_prompt, t), unconditional(without, t)])

    joint = guidance.classifier_free_joint(both, 4.5)(X, 0.25)
    assert sizes == [4]
    assert torch.equal(joint, guidance.classifier_free(conditional, unconditional, 4.5)(X, 0.25))
    joint = guidance.classifier_free_joint(both, 4.5, rescale=0.5)(X, 0.25)
    assert torch.equal(joint, guidance.classifier_free(conditional, unconditional, 4.5, rescale=0.5)(X, 0.25))


def test_conditioning_moves_with_its_nesting():
    value = {"a": torch.ones(1), "b": [torch.ones(2), (torch.ones(1), 3)], "c": "text"}
    moved = guidance.on_device(value, torch.device("meta"))
    assert moved["a"].is_meta
    assert moved["b"][0].is_meta
    assert moved["b"][1][0].is_meta
    assert moved["b"][1][1] == 3
    assert moved["c"] == "text"
