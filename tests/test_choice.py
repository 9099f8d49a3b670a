"""Choosing: knapsacks against brute force, sites in groups, greedy orders, speedups from measured times."""

import itertools
import random

import pytest
import torch

import vmeanba_fx
from tests import zoo
from vmeanba_fx import Plan, PlanError, SiteError, calibrate
from vmeanba_fx.calibration.curve import Curve
from vmeanba_fx.choice import by_impact, knapsack, units_of
from vmeanba_fx.timing import Times


def brute_force(costs, gains, needed):
    """Least total cost (negative ones count 0) of a set that gains enough; None where none does."""
    found = None
    for size in range(len(costs) + 1):
        for items in itertools.combinations(range(len(costs)), size):
            if sum(gains[i] for i in items) >= needed * (1 - 1e-12):
                cost = sum(max(costs[i], 0.0) for i in items)
                found = cost if found is None else min(found, cost)
    return found


@pytest.mark.parametrize("seed", range(60))
def test_knapsack_is_that_of_brute_force(seed):
    r = random.Random(seed)
    n = r.randint(1, 9)
    kinds = [r.uniform(-0.2, 1) for _ in range(r.randint(1, 4))]  # sites of one shape save the same
    gains = [r.choice(kinds) if seed % 2 else r.uniform(-0.2, 1) for _ in range(n)]
    costs = [r.choice([0.0, r.gauss(0.3, 0.5)]) for _ in range(n)]
    reachable = sum(g for g in gains if g > 0)
    for needed in (0.0, 0.3 * reachable, 0.8 * reachable, reachable, 1.01 * reachable + 1e-6):
        found, expected = knapsack(costs, gains, needed), brute_force(costs, gains, needed)
        assert (found is None) == (expected is None)
        if found is not None:
            assert sum(max(costs[i], 0.0) for i in found) == pytest.approx(expected, abs=1e-12)
            assert sum(gains[i] for i in found) >= needed * (1 - 1e-9) and all(gains[i] > 0 for i in found)


def test_knapsack_of_many_sites_of_few_kinds_is_quick():
    costs = [((37 * i) % 101) / 100 for i in range(120)]
    found = knapsack(costs, [1.0 + i % 4 for i in range(120)], 150.0)
    assert sum(1.0 + i % 4 for i in found) >= 150


class Twice(torch.nn.Module):
    """Two scans per block, as two-way models have them: sites ``blocks.i.op#0`` and ``#1``."""

    def __init__(self, depth=3):
        super().__init__()
        self.net = zoo.live(depth, directions=2, state=1, call=self.both)

    @staticmethod
    def both(u, delta, A, B, C, D, bias):
        first = zoo.selective_scan_fn(u, delta, A, B, C, D, None, bias, True)
        return first + zoo.selective_scan_fn(u.flip(-1), delta, A, B, C, None, None, bias, True)

    def forward(self, x):
        return self.net(x)


LOADER = zoo.labelled(2, 4)


@pytest.fixture(scope="module")
def plan():
    """Impacts by hand: of the blocks 0.5, 0.3 and 0.2; the least single site is in the worst block."""
    made = calibrate(Twice().eval(), LOADER, metric="loss", held_out=False)
    assert [s.name.split(".op")[1] for s in made.sites] == ["#0", "#1"] * 3
    return Plan(**vars(made) | {"base": 1.0, "scores": [1.5, 1.0, 1.1, 1.2, 1.1, 1.1], "tiebreaks": []})


def sites(plan, *indices):
    return [plan.sites[i].name for i in indices]


def test_modules_are_replaced_whole(plan):
    assert units_of(plan.sites, "module") == [(0, 1), (2, 3), (4, 5)]
    assert units_of(plan.sites, None) == [(i,) for i in range(6)]
    assert plan.choose(1) == sites(plan, 1)
    assert plan.choose(1, group_by="module") == sites(plan, 4, 5)
    assert plan.choose(2, group_by="module") == sites(plan, 2, 3, 4, 5)
    assert plan.choose(1, group_by="module", exclude="*2.op#1") == sites(plan, 2, 3)  # one stays: both stay
    with pytest.raises(SiteError, match="k=4: this model has 3 modules to replace, so k can be 0 to 3"):
        plan.choose(4, group_by="module")
    grouped = Plan(**vars(plan) | {"group_by": "module"})
    assert grouped.choose(1) == sites(plan, 4, 5)
    assert len(vmeanba_fx.report(grouped.apply(2)).chosen) == 4


def test_a_greedy_order_is_followed(plan):
    greedy = Plan(**vars(plan) | {"curve": Curve(((3,), (0,), (5,), (1,)), True, ranked=(1.0,) * 4)})
    assert greedy.choose(1) == sites(plan, 3) and greedy.choose(3) == sites(plan, 0, 3, 5)
    assert greedy.choose(2, exclude=plan.sites[0].name) == sites(plan, 3, 5)
    with pytest.raises(PlanError, match=r"k=5: the greedy order .* has 4 of these 6.*calibrate without exclude="):
        greedy.choose(5)
    with pytest.raises(PlanError, match="measured with group_by=None: calibrate with group_by='module'"):
        greedy.choose(1, group_by="module")
    judged = Curve(greedy.curve.order, False, base=1.0, values=(1.0,) * 4, margins=(0.0,) * 4, samples=4)
    with pytest.raises(PlanError, match="measured with group_by=None: calibrate with group_by='module'"):
        Plan(**vars(plan) | {"curve": judged}).choose(max_drop=1.0, group_by="module")


def test_ranking_ties():
    assert by_impact([(0,), (1,), (2,)], [0.1, 0.1, 0.0], [2.0, 1.0, 5.0]) == [(2,), (1,), (0,)]
    assert by_impact([(0,), (1,)], [0.1, 0.1], []) == [(0,), (1,)]


def timed(plan, *saved):
    return Plan(**vars(plan) | {"times": Times("cpu, 1 threads", 1.0, saved, plan.graph)})


def test_speedup_takes_the_least_impact_that_is_fast_enough(plan, monkeypatch):
    monkeypatch.setattr("vmeanba_fx.plan.device_name", lambda gm: "cpu, 1 threads")
    fast = timed(plan, 0.2, 0.01, 0.1, 0.1, 0.1, -0.05)  # impacts 0.5, 0.0, 0.1, 0.2, 0.1, 0.1
    assert fast.choose(speedup=1) == []
    assert fast.choose(speedup=1.1) == sites(plan, 2)
    assert fast.choose(speedup=1.25) == sites(plan, 2, 4)
    assert fast.choose(speedup=1 / (1 - 0.205)) == sites(plan, 1, 2, 4)
    assert fast.choose(speedup=1.25, exclude=plan.sites[2].name) == sites(plan, 3, 4)
    with pytest.raises(SiteError, match=r"speedup=3: the most that replacing sites reaches is 2.041, .*1e\+03 ms"):
        fast.choose(speedup=3)
    assert fast.choose(speedup=1.1, group_by="module") == sites(plan, 2, 3)
