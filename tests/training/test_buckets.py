"""`--num_timestep_buckets`: every case of the reference data in its documented form; keyed over processes, resumes."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from musubi_tuner.data.batches import Batch
from musubi_tuner.flow.strata import strata, stratified
from musubi_tuner.flow.timesteps import TimestepShape, distribution, restrict
from musubi_tuner.training.draws import Buckets, KeyedDraws

CASES = json.loads((Path(__file__).parents[1] / "data/reference/behaviour/timestep_buckets.json").read_text())["cases"]


def batch(items: tuple[int, ...], epoch: int = 1) -> Batch:
    return Batch(torch.zeros(len(items), 1, 1, 2, 2), {}, items, epoch, 0)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['num_items']}-in-{c['num_timestep_buckets']}")
def test_buckets_are_used_as_documented(case):
    """Floor or ceil of N / B uses of each bucket in every epoch, in another order each time."""
    count, buckets = case["num_items"], case["num_timestep_buckets"]
    rule = case["documented"]
    draws = KeyedDraws(3, buckets=Buckets.of(buckets, [0] * count))
    orders = set()
    for epoch in range(1, 6):
        t = draws.t(batch(tuple(range(count)), epoch))
        used = torch.floor(t * buckets).long().tolist()
        counts = Counter(used)
        assert sum(counts.values()) == rule["pool_size"]
        values = [counts[bucket] for bucket in range(buckets)]
        assert set(values) <= {rule["count_per_bucket_floor"], rule["count_per_bucket_ceil"]}
        if rule["buckets_with_ceil"] and rule["count_per_bucket_ceil"] != rule["count_per_bucket_floor"]:
            assert values.count(rule["count_per_bucket_ceil"]) == rule["buckets_with_ceil"]
        orders.add(tuple(used))
    assert len(orders) > 1


def test_draws_inside_a_bucket_are_uniform():
    from scipy.stats import kstest

    u = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = stratified(u, torch.arange(4000), 4000, 5, 1, 1)
    assert kstest((t * 5) % 1, "uniform").pvalue > 1e-3
    assert kstest(t, "uniform").statistic < 2e-2


def test_every_dataset_has_a_pool_of_its_own():
    datasets = [0] * 6 + [1] * 4
    buckets = Buckets.of(2, datasets)
    t = KeyedDraws(3, buckets=buckets).t(batch(tuple(range(10))))
    assert int((t[:6] < 0.5).sum()) == 3
    assert int((t[6:] < 0.5).sum()) == 2


def test_batches_processes_and_resuming_do_not_change_a_draw():
    draws = KeyedDraws(3, buckets=Buckets.of(4, [0] * 9))
    whole = draws.t(batch(tuple(range(9))))
    strata.cache_clear()  # as in a process that has just been started
    again = KeyedDraws(3, buckets=Buckets.of(4, [0] * 9))
    parts = [again.t(batch(items)) for items in ((8, 2), (0, 1, 3), (7, 4, 6, 5))]
    joined = dict(zip((8, 2, 0, 1, 3, 7, 4, 6, 5), torch.cat(parts).tolist(), strict=True))
    assert [joined[i] for i in range(9)] == whole.tolist()
    assert draws.t(batch((0,), 2)) != whole[0]


def test_a_truncated_distribution_is_stratified_in_equal_shares():
    """With preserve_distribution_shape each bucket is one B-th of the mass in the range, and nothing falls outside."""
    of = distribution("logsnr", (1, 1, 2, 2), TimestepShape(logit_mean=1.0), low=0.2, high=0.8, truncate=True)
    t = KeyedDraws(3, lambda _shape: of, buckets=Buckets.of(4, [0] * 40)).t(batch(tuple(range(40))))
    assert float(t.min()) >= 0.2
    assert float(t.max()) <= 0.8
    edges = of.quantile(torch.tensor([0.25, 0.5, 0.75]))
    assert Counter(torch.bucketize(t, edges).tolist()) == {0: 10, 1: 10, 2: 10, 3: 10}


@pytest.mark.parametrize("given", [None, 0, 1])
def test_fewer_than_two_buckets_change_nothing(given):
    assert Buckets.of(given, [0] * 5) is None


def test_items_beyond_the_pool_are_the_caller_s_fault():
    with pytest.raises(ValueError, match="item 5 is not among the 5"):
        KeyedDraws(3, buckets=Buckets.of(2, [0] * 5)).t(batch((5,)))
    with pytest.raises(ValueError, match="at least 1"):
        strata(0, 2, "none")


@pytest.mark.parametrize("buckets", [None, 5])
def test_a_batch_of_two_experts_lies_on_one_side_and_each_side_keeps_its_distribution(buckets):
    """Batches of two: the first item decides as often as its mass says, and the second follows the truncation."""
    from scipy.stats import kstest

    of = distribution("shift", (1, 1, 2, 2), TimestepShape(shift=3.0))
    count, edge = 4000, 0.875
    strata_of = Buckets.of(buckets, [0] * count)
    draws = KeyedDraws(5, lambda _shape: of, buckets=strata_of, boundary=edge)
    pairs = torch.stack([draws.t(batch((i, i + 1))) for i in range(0, count, 2)])
    high = pairs >= edge
    assert torch.equal(high[:, 0], high[:, 1])
    mass = 1 - float(of.cdf(torch.tensor(edge)))
    assert float(high[:, 0].double().mean()) == pytest.approx(mass, abs=0.03)
    alone = KeyedDraws(5, lambda _shape: of, buckets=strata_of)
    torch.testing.assert_close(pairs[:, 0], alone.t(batch(tuple(range(0, count, 2)))), rtol=1e-14, atol=0)
    for side, low, top in ((high[:, 1], edge, 1.0), (~high[:, 1], 0.0, edge)):
        cut = restrict(of, low, top)
        found = kstest(pairs[side, 1].numpy(), lambda x, cut=cut: cut.cdf(torch.from_numpy(x)).numpy())
        assert found.pvalue > 1e-3, found


def test_the_side_of_a_grid_of_levels_ends_below_the_boundary():
    of = distribution("sigma", (1, 1, 2, 2), TimestepShape())
    draws = KeyedDraws(5, lambda _shape: of, boundary=0.9)
    for start in range(0, 400, 4):
        t = draws.t(batch(tuple(range(start, start + 4))))
        assert len(set((t >= 0.9).tolist())) == 1
        assert torch.equal(t, torch.round(t * 1000) / 1000)
