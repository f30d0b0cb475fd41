"""MagCache against measured decisions, outputs and calibrations, and within the pipeline."""

import json

import pytest
import torch

from golden_data import REFERENCE
from musubi_tuner.config.errors import UserError
from musubi_tuner.families.base import MagRatios
from musubi_tuner.sampling import models, pipeline
from musubi_tuner.sampling.request import Request
from musubi_tuner.sampling.step_cache import (
    Calibration,
    Decisions,
    MagCache,
    StepCacheOptions,
    compared,
    interpolated,
    step_cache,
)

DATA = json.loads((REFERENCE / "behaviour" / "magcache.json").read_text(encoding="utf-8"))
NAMED = DATA["named_ratios"]


def decided(settings, steps):
    state = Decisions(settings, interpolated(settings.ratios, steps))
    return "".join("01"[state.skip()] for _ in range(steps))


def test_decisions_are_the_measured_ones_but_where_error_and_threshold_are_equal():
    """The house skips while the error is below the threshold, the measured tool also where it equals it."""
    assert len(DATA["traces"]) == 462
    other = []
    for trace in DATA["traces"]:
        names = {"threshold": "threshold", "most": "K", "retention": "retention_ratio"}
        settings = MagCache(tuple(NAMED[trace["ratios"]]), **{ours: trace[theirs] for ours, theirs in names.items()})
        if decided(settings, trace["steps"]) != trace["skip"]:
            other.append((trace, settings))
    assert len(other) <= 13
    for trace, settings in other:
        a_hair_more = MagCache(
            settings.ratios, settings.retention, settings.threshold * (1 + 1e-9) + 1e-12, settings.most
        )
        assert decided(a_hair_more, trace["steps"]) == trace["skip"]


def test_other_numbers_of_steps_take_the_nearest_ratios():
    for case in DATA["interpolation"]:
        assert interpolated(NAMED[case["source"]], case["target_steps"]) == case["values"]


def test_a_skipped_step_adds_the_last_computed_change():
    case = DATA["cached_output"]
    settings = MagCache(tuple(case["ratios"]), case["retention_ratio"], case["threshold"], case["K"])
    changes = [torch.tensor(c) for c in case["block_residual_if_computed"]]
    calls = []

    def blocks_of(step):
        def run(blocks, h, ctx):
            calls.append(step)
            return h + changes[step]

        return run

    current = [0]
    run = settings.run(case["steps"], lambda blocks, h, ctx: blocks_of(current[0])(blocks, h, ctx))
    last = None
    for step, (skip, given) in enumerate(zip(case["skip"], case["inputs_tokens_by_channels"], strict=True)):
        current[0] = step
        h = torch.tensor(given)
        out = run([], h, None)
        last = last if skip else changes[step]
        torch.testing.assert_close(out, h + last)
    assert calls == [i for i, skip in enumerate(case["skip"]) if not skip]


@pytest.mark.parametrize("case", [c for c in DATA["calibration"] if c["dtype"] == "float32"])
@pytest.mark.shows("magcache_calibration")
def test_calibration_prints_the_measured_line(case, caplog):
    measuring = Calibration()
    residuals = [torch.tensor(r) for r in case["residuals"]]
    steps = iter(residuals)
    run = measuring.run(len(residuals), lambda blocks, h, ctx: h + next(steps))
    for _ in residuals:
        run([], torch.zeros_like(residuals[0]), None)
    rows = measuring.found[0]
    assert [row[0] for row in rows] == pytest.approx(case["norm_ratio_float64"], rel=1e-5)
    assert [row[1] for row in rows] == pytest.approx(case["norm_std"], abs=2e-5)
    assert [row[2] for row in rows] == pytest.approx(case["cos_dis"], abs=2e-5)
    with caplog.at_level("INFO"):
        measuring.tell()
    assert "Copy and paste following values to --magcache_mag_ratios argument to use them:" in caplog.text
    assert case["printed_line"] in caplog.text


def test_streams_of_a_tuple_are_cached_each():
    run = MagCache((1.0, 1.0, 1.0), 0.0, 1.0, 5).run(3, lambda blocks, h, ctx: (h[0] + 1, h[1] * 2))
    h = (torch.ones(2), torch.full((2,), 3.0))
    run([], h, None)
    skipped = run([], (torch.zeros(2), torch.zeros(2)), None)
    assert [s.tolist() for s in skipped] == [[1.0, 1.0], [3.0, 3.0]]


def test_a_change_that_keeps_its_direction_has_no_distance():
    before = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    assert compared(before * 2, before) == pytest.approx((2.0, 0.0, 0.0), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "own", "words"),
    [
        ({"magcache_mag_ratios": "0"}, None, "no ratios of this model are known; measure them"),
        ({"magcache_mag_ratios": "1,x"}, None, "numbers with commas between them, or 0"),
        ({"magcache_mag_ratios": "0", "magcache_calibration": True}, (1.0,), "computes every step"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, own, words):
    with pytest.raises(UserError, match=words):
        step_cache(StepCacheOptions(**options), own)


@pytest.mark.shows("magcache_mag_ratios", "magcache_threshold", "magcache_k", "magcache_retention_ratio")
def test_settings_become_a_cache():
    assert step_cache(StepCacheOptions(), (1.0,)) is None
    assert step_cache(StepCacheOptions(magcache_mag_ratios="0"), (1.0, 0.9)) == MagCache((1.0, 0.9))
    chosen = StepCacheOptions("1,0.5", magcache_retention_ratio=0.3, magcache_threshold=0.1, magcache_k=2)
    assert step_cache(chosen, None) == MagCache((1.0, 0.5), 0.3, 0.1, 2)


def test_each_branch_of_a_run_has_a_cache_of_its_own(toy):
    """Steps 2 and 3 of 4 (the first and the last are computed) are skipped in both branches, anew in each request."""
    request = Request("a red seven", 3, width=32, height=48, steps=4, guidance=3.0, shift=2.0, solver="vanilla")
    family, dit, ran = toy.Family(), toy.Dit(), []
    dit.blocks[0].register_forward_hook(lambda *_: ran.append(len(dit.seen)))
    prompts = models.encode(family, family.encoders, [request], progress=False)
    for cache, calls in ((MagCache((1.0,) * 4, 0.0, 1.0, 5), [1, 2, 7, 8]), (Calibration(), list(range(1, 9)))):
        ran.clear()
        dit.seen.clear()
        sampler = pipeline.Sampler(family, dit, torch.device("cpu"), cache=cache)
        for _ in range(2):
            dit.seen.clear()
            list(sampler.latents([request], prompts, progress=False))
        assert ran == calls * 2
    assert [len(rows) for rows in cache.found] == [3] * 4


def test_a_second_transformer_begins_with_computed_steps_and_a_fresh_error():
    """Ten steps of ratios 1, five by each: a share of 0.4 of each part's steps is computed first, and the last one."""
    settings = MagCache((1.0,) * 10, retention=0.4, threshold=0.1, most=9)
    alone = [Decisions(settings, settings.ratios) for _ in range(1)]
    assert "".join("01"[alone[0].skip()] for _ in range(10)) == "0000111110"
    two = Decisions(settings, settings.ratios, 5)
    assert "".join("01"[two.skip()] for _ in range(10)) == "0011100110"
    drifting = MagCache((1.0, 1.04, 1.04, 1.04, 1.04, 1.04, 1.04, 1.04), retention=0.01, threshold=0.2, most=9)
    fresh = Decisions(drifting, drifting.ratios, 4)
    assert "".join("01"[fresh.skip()] for _ in range(8)) == "01100110", "the error of the first does not count"


def test_a_list_may_leave_the_whole_first_transformer_computed():
    settings = MagCache((1.0,) * 10, retention=0.4, threshold=0.1, most=9, high_computed=True)
    state = Decisions(settings, settings.ratios, 5)
    assert "".join("01"[state.skip()] for _ in range(10)) == "0000000110"


def test_branches_have_their_own_ratios_where_the_model_has_them():
    own = MagRatios((1.0, 1.0, 1.0, 1.0), without=(1.0, 2.0, 2.0, 2.0))
    cache = step_cache(StepCacheOptions(magcache_mag_ratios="0"), own)
    with_prompt, without = (cache.run(4, branch=branch).decisions for branch in (0, 1))
    assert "".join("01"[with_prompt.skip()] for _ in range(4)) == "0110"
    assert "".join("01"[without.skip()] for _ in range(4)) == "0000"
    given = step_cache(StepCacheOptions(magcache_mag_ratios="1,1,1,1"), own)
    assert "".join("01"[given.run(4, branch=1).decisions.skip()] for _ in range(1)) == "0"
    assert given.without is None
