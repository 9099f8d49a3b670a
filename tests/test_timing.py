"""Measured times: of whole models in turns, shared by sites of one shape; the report says what came of it."""

import time

import pytest

import vmeanba_fx
from tests import zoo
from vmeanba_fx import calibrate, timing
from vmeanba_fx.timing import Times, measure_times, timed


def sleeper(seconds):
    return lambda: time.sleep(seconds)


def test_times_of_known_functions():
    slow, fast = timed([sleeper(0.02), sleeper(0.005)], (), {}, rounds=3)
    assert len(slow) == len(fast) == 3
    assert 0.02 <= min(slow) < 0.04 and 0.005 <= min(fast) < 0.015


@pytest.fixture(scope="module")
def plan():
    model = zoo.live(3, directions=2, state=1)
    return calibrate(model, zoo.labelled(2, 4), metric="loss", held_out=False)


def test_sites_of_one_shape_share_what_they_save(plan, monkeypatch):
    built = []
    monkeypatch.setattr(timing, "timed", lambda forms, args, kwargs: [[1.0, 1.2, 1.1], [0.7, 0.9, 0.8], [0.9, 1.1, 1.0]])

    def rewrite(names):
        built.append(names)
        return plan.graph

    names = [s.name for s in plan.sites]
    times = measure_times(plan.sites, rewrite, (), {}, {names[2]: 4})
    assert built == [[], names[:2], names[2:]]  # the third has another rank
    assert times.base == 1.1 and times.saved == pytest.approx((0.15, 0.15, 0.1)) and times.device.startswith("cpu")
    assert times.speedup([0, 2]) == pytest.approx(1.1 / 0.85)


def test_report_of_a_speedup(plan, monkeypatch):
    monkeypatch.setattr("vmeanba_fx.timing._ROUND_SECONDS", 0.001)
    times = plan.measure_times()
    assert plan.measure_times() is times and len(times.saved) == 3 and times.base > 0
    known = vmeanba_fx.Plan(**vars(plan) | {"times": Times(times.device, 1.0, (0.2, 0.1, -0.1), times.original, times.args)})
    found = vmeanba_fx.report(known.apply(speedup=1.4))
    assert found.chosen == ("blocks.0.op", "blocks.1.op")
    assert found.speed.asked == 1.4 and found.speed.predicted == pytest.approx(1 / 0.7) and found.speed.measured > 0
    assert "speedup 1.4 asked for, 1.429 predicted" in str(found)
    assert vmeanba_fx.Report.from_dict(found.to_dict() | {"table": found.table}).speed == found.speed
    assert "times" not in known.to_dict() and known == plan
