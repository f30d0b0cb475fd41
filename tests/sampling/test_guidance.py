"""Guidance is the published formula, by one call or two."""

import pytest
import torch

from musubi_tuner.config.guidance_steps import GuidanceSteps
from musubi_tuner.sampling import guidance


def conditional(x, t):
    return x.sin() + t


def unconditional(x, t):
    return x.cos() - 2 * t


X = torch.linspace(-1, 1, 12).view(2, 3, 1, 2, 1)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5])
def test_guidance_extrapolates_from_without_to_with(scale):
    got = guidance.classifier_free(conditional, unconditional, guidance.Guide((scale,)))(X, 0.25)
    torch.testing.assert_close(got, (1 - scale) * unconditional(X, 0.25) + scale * conditional(X, 0.25))


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_rescaled_guidance_has_the_spread_of_the_prompt_alone(share):
    """Each sample by its own standard deviations (Lin et al. 2023, section 3.4)."""
    x = X + torch.tensor([0.0, 3.0]).view(2, 1, 1, 1, 1)
    plain = guidance.classifier_free(conditional, unconditional, guidance.Guide((4.5,)))(x, 0.25)
    got = guidance.classifier_free(conditional, unconditional, guidance.Guide((4.5,), rescale=share))(x, 0.25)
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

    joint = guidance.classifier_free_joint(both, guidance.Guide((4.5,)))(X, 0.25)
    assert sizes == [4]
    assert torch.equal(joint, guidance.classifier_free(conditional, unconditional, guidance.Guide((4.5,)))(X, 0.25))
    rescaled = guidance.Guide((4.5,), rescale=0.5)
    joint = guidance.classifier_free_joint(both, rescaled)(X, 0.25)
    assert torch.equal(joint, guidance.classifier_free(conditional, unconditional, rescaled)(X, 0.25))


def test_conditioning_moves_with_its_nesting():
    value = {"a": torch.ones(1), "b": [torch.ones(2), (torch.ones(1), 3)], "c": "text"}
    moved = guidance.on_device(value, torch.device("meta"))
    assert moved["a"].is_meta
    assert moved["b"][0].is_meta
    assert moved["b"][1][0].is_meta
    assert moved["b"][1][1] == 3
    assert moved["c"] == "text"


@pytest.mark.parametrize(
    ("mode", "pattern"),
    [
        ("early", "SSSSAAAAAA"),
        ("late", "AAAAAASSSS"),
        ("middle", "AAASSSSAAA"),
        ("early_late", "SSAAAAAASS"),
        ("alternate", "SASASAASAS"),
        ("none", "AAAAAAAAAA"),
    ],
)
def test_the_steps_without_guidance_are_the_established_ones(mode, pattern):
    """A: guided, S: skipped; six of ten steps."""
    assert "".join("SA"[on] for on in guidance.applied(mode, 0.6, 10)) == pattern


def test_a_step_without_guidance_calls_one_branch():
    calls = []

    def counted(name, branch):
        return lambda x, t: (calls.append(name), branch(x, t))[1]

    chosen = GuidanceSteps(mode="late", ratio=0.5)
    guide = guidance.guide_of(chosen, [3.0] * 4)
    velocity = guidance.classifier_free(counted("c", conditional), counted("u", unconditional), guide)
    found = [velocity(X, 0.25) for _ in range(4)]
    assert "".join(calls) == "cucucc"
    assert torch.equal(found[3], conditional(X, 0.25))
    assert torch.equal(found[0], unconditional(X, 0.25) + 3.0 * (conditional(X, 0.25) - unconditional(X, 0.25)))
    calls.clear()
    guide = guidance.guide_of(chosen, [3.0] * 4, every=True)
    velocity = guidance.classifier_free(counted("c", conditional), counted("u", unconditional), guide)
    again = [velocity(X, 0.25) for _ in range(4)]
    assert "".join(calls) == "cucucucu", "a step cache counts its calls"
    torch.testing.assert_close(again, found)


@pytest.mark.parametrize("mode", ["original", "uncond"])
def test_a_branch_with_blocks_left_out_leads_away_or_stands_in(mode):
    def lesser(x, t):
        return x * 0.5

    guide = guidance.guide_of(GuidanceSteps(layers=(1,), layer_mode=mode, scale=2.0, start=0.25, end=0.75), [3.0] * 4)
    velocity = guidance.classifier_free(conditional, unconditional, guide, lesser)
    c, u, s = conditional(X, 0.5), unconditional(X, 0.5), lesser(X, 0.5)
    plain = u + 3.0 * (c - u)
    skipped = plain + 2.0 * (c - s) if mode == "original" else s + 3.0 * (c - s)
    for expected in (plain, skipped, skipped, plain):
        torch.testing.assert_close(velocity(X, 0.5), expected)


def test_blocks_are_left_out_by_number():
    blocks = [torch.nn.Identity() for _ in range(4)]
    seen = []
    run = guidance.without_blocks((1, 3), lambda left, h, ctx: seen.append((left, h, ctx)))
    run(blocks, "h", "ctx")
    assert seen == [([blocks[0], blocks[2]], "h", "ctx")]
