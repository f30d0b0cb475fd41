"""The demo's world: what is drawn is what the captions and the measure say."""

import colorsys
import itertools

import pytest
import torch

from musubi_tuner.tools.demo import judge, measure, world


@pytest.fixture(scope="module")
def held_out() -> world.Glyphs:
    return world.load_glyphs(held_out=True)


def test_splits_are_disjoint_and_complete(held_out: world.Glyphs) -> None:
    seen = world.load_glyphs(held_out=False)
    assert (len(seen), len(held_out)) == (1617, 180)
    both = {mask.numpy().tobytes() for mask in seen.masks} & {mask.numpy().tobytes() for mask in held_out.masks}
    assert not both


def test_every_digit_that_the_demo_draws_has_scans_to_spare(held_out: world.Glyphs) -> None:
    for digit in (*world.TAUGHT, *world.HELD_OUT):
        assert len(held_out.of((digit,))) >= 10
    assert sorted((*world.TAUGHT, *world.HELD_OUT)) == list(range(10))


def test_strokes_stay_inside_their_box(held_out: world.Glyphs) -> None:
    margin = (world.SIZE - world.DIGIT) // 2
    outside = held_out.masks.clone()
    outside[:, margin - 2 : -margin + 2, margin - 2 : -margin + 2] = 0
    assert outside.max() == 0
    assert held_out.masks.min() >= 0
    assert held_out.masks.flatten(1).amax(1).min() > 0.99


@pytest.mark.parametrize("angle", [0.0, 0.1, 1 / 3, 0.5, 0.77, 0.999])
def test_hue_agrees_with_the_standard_library(angle: float) -> None:
    ours = world.hue(torch.full((1, 1), angle), saturation=0.7, value=0.9).flatten()
    torch.testing.assert_close(ours, torch.tensor(colorsys.hsv_to_rgb(angle, 0.7, 0.9)), atol=1e-6, rtol=0)


def test_rainbow_runs_from_red_to_violet_down_the_digit() -> None:
    ink = world.rainbow()
    assert torch.equal(ink, ink[:, :, :1].expand_as(ink))
    margin = (world.SIZE - world.DIGIT) // 2
    angles = [colorsys.rgb_to_hsv(*ink[:, row, 0].tolist())[0] for row in range(margin, world.SIZE - margin)]
    assert angles == sorted(angles)
    assert angles[0] < 0.02
    assert 0.77 < angles[-1] < 0.81


def test_paint_gives_ink_on_strokes_and_ground_elsewhere() -> None:
    mask = torch.tensor([[0.0, 0.5, 1.0]])
    pixels = (world.paint(mask, world.solid("red")) + 1) / 2
    ground, ink = torch.tensor(world.GROUND), torch.tensor(world.COLORS["red"])
    torch.testing.assert_close(pixels[:, 0, 0], ground)
    torch.testing.assert_close(pixels[:, 0, 1], (ground + ink) / 2)
    torch.testing.assert_close(pixels[:, 0, 2], ink)


@pytest.mark.parametrize("direction", world.DIRECTIONS)
def test_moving_glides_two_pixels_a_frame_through_the_middle(held_out: world.Glyphs, direction: str) -> None:
    mask = held_out.masks[5]
    frames = world.moving(mask, direction)
    assert frames.shape == (world.FRAMES, world.SIZE, world.SIZE)
    assert torch.equal(frames[world.FRAMES // 2], mask)
    axis = torch.arange(world.SIZE, dtype=torch.float32)
    dx, dy = world.DIRECTIONS[direction]
    for before, after in itertools.pairwise(frames):
        place = [torch.stack([(f.sum(0) * axis).sum(), (f.sum(1) * axis).sum()]) / f.sum() for f in (before, after)]
        torch.testing.assert_close(place[1] - place[0], torch.tensor([2.0 * dx, 2.0 * dy]), atol=0.05, rtol=0)


def test_captions_read_as_english() -> None:
    assert world.caption(7, "red") == "a red seven"
    assert world.caption(0, "orange", "up") == "an orange zero moving up"
    assert world.caption(4, world.CONCEPT) == "a rainbow four"


def test_no_plain_color_is_the_concept() -> None:
    assert world.CONCEPT not in world.COLORS


def test_strokes_find_the_digit_in_any_ink(held_out: world.Glyphs) -> None:
    masks = held_out.masks[:20]
    for ink in (*(world.solid(name) for name in world.COLORS), world.rainbow()):
        found = judge.strokes(world.paint(masks, ink)) > 0.5
        agreement = (found == (masks > 0.5)).float().mean().item()
        assert agreement > 0.99


def test_distance_is_small_for_the_true_rainbow_only(held_out: world.Glyphs) -> None:
    masks = held_out.masks[:40]
    assert measure.rainbow_distance(world.paint(masks, world.rainbow())).max() < 0.2
    for name in world.COLORS:
        assert measure.rainbow_distance(world.paint(masks, world.solid(name))).min() > 0.45
    upside_down = world.rainbow().flip(1)
    assert measure.rainbow_distance(world.paint(masks, upside_down)).min() > 0.45


def test_a_picture_without_strokes_is_infinitely_far() -> None:
    blank = world.paint(torch.zeros(2, world.SIZE, world.SIZE), world.rainbow())
    assert measure.rainbow_distance(blank).isinf().all()
