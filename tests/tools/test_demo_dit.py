"""The DiT's pre-training: batches are a pure function of seed and epoch, a stopped run goes on to the same weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from musubi_tuner.families import registry
from musubi_tuner.families.wan.model import WanConfig, WanModel
from musubi_tuner.tools.demo import pretrain_dit, world
from musubi_tuner.tools.demo.pretrain_dit import Cycle, DitRecipe
from musubi_tuner.tools.demo.shelf import DigitBatches, Shelf, all_captions

GLYPHS, COLORS, CLIPS = 10, len(world.COLORS), 6


@pytest.fixture(scope="module")
def source() -> DigitBatches:
    draw = torch.Generator().manual_seed(1)
    captions = tuple(world.caption(i, "red", "left") for i in range(CLIPS))
    shelf = Shelf(
        torch.randn(GLYPHS, COLORS, 16, 1, 4, 4, generator=draw),
        torch.arange(GLYPHS),
        torch.randn(CLIPS, 16, 2, 4, 4, generator=draw),
        captions,
    )
    texts = {caption: {"text": torch.full((2, 8), float(i))} for i, caption in enumerate(all_captions())}
    return DigitBatches(
        registry.get("wan"), shelf, texts, seed=3, image_batch=4, clip_batch=3, mix=((3, 0.5), (6, 1.0))
    )


def _model() -> WanModel:
    with torch.device("meta"):
        dit = WanModel(WanConfig(dim=12, ffn_dim=16, num_heads=2, num_layers=1, text_dim=8, text_len=4, freq_dim=8))
    pretrain_dit.initialize(dit, seed=5)
    return dit


def _train(source: DigitBatches, recipe: DitRecipe, file: Path) -> dict[str, Tensor]:
    family, dit = registry.get("wan"), _model()
    return pretrain_dit.pretrain(dit, lambda x_t, t, cond: family.predict(dit, x_t, t, cond), source, recipe, file)


def test_batches_hold_what_their_captions_say(source: DigitBatches) -> None:
    order = {caption: float(i) for i, caption in enumerate(all_captions())}
    for batch in source.epoch(1):
        assert batch.latents.shape == (4, 16, 1, 4, 4)
        for latents, text, item in zip(batch.latents, batch.cond["text"], batch.items, strict=True):
            glyph, color = divmod(item, COLORS)
            assert torch.equal(latents, source.shelf.images[glyph, color])
            told = text[0, 0].item()
            assert told in (order[world.caption(glyph, list(world.COLORS)[color])], order[""])


def test_clips_come_in_when_the_mix_says(source: DigitBatches) -> None:
    assert [source.clip_share(epoch) for epoch in (1, 2, 3, 5, 6, 90)] == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert all(batch.latents.shape[2] == 1 for epoch in (1, 2) for batch in source.epoch(epoch))
    assert all(batch.latents.shape[2] == 2 for batch in source.epoch(6))
    kinds = {batch.latents.shape[2] for epoch in range(3, 6) for batch in source.epoch(epoch)}
    assert kinds == {1, 2}


def test_an_epoch_can_be_entered_anywhere(source: DigitBatches) -> None:
    whole, rest = list(source.epoch(4)), list(source.epoch(4, start=1))
    assert [batch.items for batch in whole[1:]] == [batch.items for batch in rest]
    assert [batch.items for batch in source.epoch(1)] != [batch.items for batch in source.epoch(2)]


def test_some_captions_are_left_empty(source: DigitBatches) -> None:
    often = replace(source, empty_share=1.0)
    assert all(batch.cond["text"].eq(0).all() for batch in often.epoch(1))  # the empty caption is the first of all
    assert all(not batch.cond["text"].eq(0).all() for batch in replace(source, empty_share=0.0).epoch(1))


@pytest.mark.parametrize("stop", [3, 4])  # within an epoch, and at its end: an epoch has two batches
def test_a_stopped_run_goes_on_to_the_same_weights(source: DigitBatches, tmp_path: Path, stop: int) -> None:
    recipe = DitRecipe(cycles=(Cycle(6, 1e-2, 0.5),), warmup=2, save_every=1)
    straight = _train(source, recipe, tmp_path / "straight.pt")

    class Stop(Exception):
        pass

    class StopAt(pretrain_dit.Quiet):
        def step_end(self, record: pretrain_dit.StepRecord) -> None:
            if record.step == stop:
                raise Stop

    family, dit = registry.get("wan"), _model()
    with pytest.raises(Stop):
        pretrain_dit.pretrain(
            dit,
            lambda x_t, t, cond: family.predict(dit, x_t, t, cond),
            source,
            recipe,
            tmp_path / "stopped.pt",
            observers=(StopAt(),),
        )
    resumed = _train(source, recipe, tmp_path / "stopped.pt")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    start = dict(_model().named_parameters())
    assert any(not torch.equal(straight[name], start[name]) for name in straight)


def test_the_average_follows_the_weights(source: DigitBatches, tmp_path: Path) -> None:
    recipe = DitRecipe(cycles=(Cycle(4, 1e-2, 0.0),), warmup=1, average=0.0)
    average = _train(source, recipe, tmp_path / "a.pt")
    last = torch.load(tmp_path / "a.pt", weights_only=True)["dit"]
    assert all(torch.equal(average[name], last[name]) for name in average)


def test_rate_rises_and_falls_in_every_cycle() -> None:
    recipe = DitRecipe(cycles=(Cycle(100, 1e-3, 0.0), Cycle(50, 5e-4, 0.5)), warmup=10)
    rates = [recipe.rate_at(step) for step in range(recipe.steps)]
    assert max(rates[:100]) == pytest.approx(1e-3)
    assert rates.index(max(rates[:100])) in (9, 10)
    assert max(rates[100:]) == pytest.approx(5e-4)
    assert rates[99] < 4e-5
    assert rates[149] < 5e-5
    assert rates[100] == pytest.approx(5e-5)


def test_initial_weights_are_a_function_of_the_seed_and_the_head_is_silent() -> None:
    one, two = _model(), _model()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert isinstance(one.head.head, nn.Linear)
    assert one.head.head.weight.eq(0).all()
    x = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    assert one(x, torch.tensor([500.0], dtype=torch.float64), torch.ones(1, 2, 8)).eq(0).all()
