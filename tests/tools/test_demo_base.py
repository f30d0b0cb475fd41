"""The shipped base model: it loads as a user's files do, draws what it is told, and needs no more than its files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from musubi_tuner.config.errors import UserError
from musubi_tuner.tools.demo import examine, judge, pretrain, pretrain_vae, world
from musubi_tuner.tools.demo.base import Base, find_base

SHIPPED = Path(__file__).parents[2] / "examples" / "digits"


@pytest.fixture(scope="module")
def base() -> Base:
    found = Base(SHIPPED)
    found.require()
    return found


def _keys(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 no mapping


@pytest.mark.parametrize(
    ("file", "manifest", "deeper"),
    [
        ("dit.safetensors", "wan2_1_t2v_1_3b", ("blocks.",)),
        ("vae.safetensors", "wan2_1_vae", ("downsamples.", "upsamples.")),
        ("t5.safetensors", "wan_umt5_xxl_encoder", ("blocks.",)),
    ],
)
def test_files_have_the_published_key_layouts(base: Base, file: str, manifest: str, deeper: tuple[str, ...]) -> None:
    """Outside the numbered stages the keys are the published ones; inside, the same kinds of parameters."""
    reference = Path(__file__).parents[1] / "data" / "reference" / "checkpoints" / f"{manifest}.json"
    published = set(json.loads(reference.read_text(encoding="utf-8"))["tensors"])
    ours = set(_keys(base.folder / file))

    def outside(keys: set[str]) -> set[str]:
        return {key for key in keys if not any(part in key for part in deeper)}

    def kinds(keys: set[str]) -> set[str]:
        return {".".join(p for p in key.split(".") if not p.isdigit()) for key in keys - outside(keys)}

    assert outside(ours) == outside(published)
    assert kinds(ours) <= kinds(published)
    assert any(part in key for part in deeper for key in ours)


def test_the_folder_is_about_ten_megabytes(base: Base) -> None:
    size = sum(path.stat().st_size for path in base.folder.rglob("*") if path.is_file())
    assert 5e6 < size < 12e6


def test_latents_have_unit_scale_under_the_published_statistics(base: Base) -> None:
    vae, parts = base.load_vae(), pretrain_vae.typical_pixels(seed=5, count=80)
    stills = torch.cat([vae.encode(part) for part in parts if part.shape[2] == 1])
    assert stills.transpose(0, 1).flatten(1).mean(1).abs().max() < 0.4
    assert 0.7 < stills.std() < 1.3


def test_vae_rebuilds_the_rainbow_that_no_caption_told(base: Base) -> None:
    vae, sets = base.load_vae(), pretrain_vae.fixed_sets(world.load_glyphs(held_out=True), count=12)
    for name, least in (("plain", 30.0), ("rainbow", 26.0)):
        error = (vae.decode(vae.encode(sets[name])) - sets[name]).square().mean()
        assert 10 * torch.log10(4 / error) >= least, name


def test_judge_reads_scans_it_never_saw(base: Base) -> None:
    glyphs, reader = world.load_glyphs(held_out=True), judge.load_judge(base.judge)
    assert judge.accuracy(reader, world.paint(glyphs.masks, world.rainbow()), glyphs.digits) > 0.97
    shuffled = glyphs.digits.roll(7)
    assert judge.accuracy(reader, world.paint(glyphs.masks, world.rainbow()), shuffled) < 0.3


def test_base_draws_the_digits_it_is_told_in_fp8(base: Base) -> None:
    requests = examine.ordinary_requests(40)
    pixels = pretrain.render(base, base.load_dit(fp8=True), requests)[:, :, 0]
    reader = judge.load_judge(base.judge)
    assert judge.accuracy(reader, pixels, pretrain.asked_digits(40)) >= 0.9
    inks = torch.stack([(_mean_ink(picture)) for picture in pixels])
    palette = torch.tensor(tuple(world.COLORS.values()))
    nearest = torch.cdist(inks, palette).argmin(1)
    assert (nearest == torch.arange(40) % len(palette)).float().mean() >= 0.9


def _mean_ink(picture: torch.Tensor) -> torch.Tensor:
    strokes = judge.strokes(picture[None])[0] > 0.8
    return ((picture + 1) / 2)[:, strokes].mean(1)


def test_moves_right_sees_where_a_clip_goes() -> None:
    masks = world.load_glyphs(held_out=True).masks[:4]
    ways = list(world.DIRECTIONS)
    clips = torch.stack(
        [
            world.paint(world.moving(m, way), world.solid("red")).transpose(0, 1)
            for m, way in zip(masks, ways, strict=True)
        ]
    )
    assert pretrain.moves_right(clips, ways) == 1.0
    assert pretrain.moves_right(clips, ways[::-1]) == 0.0


def test_a_missing_base_is_told_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no vae\.safetensors.*--base"):
        find_base(str(tmp_path)).require()


def test_a_checkout_is_found_without_being_named(tmp_path: Path) -> None:
    assert find_base(None, (tmp_path / "absent", SHIPPED)).folder == SHIPPED
