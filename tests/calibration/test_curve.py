"""Sites replaced together: interactions, the held-out half, the same plan after a kill, loaders that cannot be read twice."""

import json

import pytest
import torch

import vmeanba_fx
from tests import zoo
from tests.calibration.runs import Killed, as_json, shuffled
from tests.redundant import loader, redundant
from vmeanba_fx import CalibrationError, Plan, PlanError, calibrate

LOADER = zoo.labelled(4, 4)


@pytest.fixture(scope="module")
def pair():
    """The redundant model, captured, and data labelled by it."""
    model = redundant()
    return vmeanba_fx.capture(model, zoo.images(4)), loader(model)


def kl_with(gm, plan, data, names):
    """KL to the original with these sites replaced, of all images at once."""
    x = torch.cat([x for x, _ in data])
    with torch.no_grad():
        base, new = (torch.log_softmax(m(x).double(), 1) for m in (gm, plan.apply(sites=names)))
    return float((base.exp() * (base - new)).sum(1).mean())


def test_impacts_alone_do_not_see_that_two_sites_are_redundant(pair):
    gm, data = pair
    plan = calibrate(gm, data, metric="kl", held_out=False)
    first, second, third = plan.impacts()
    both = kl_with(gm, plan, data, ["first", "second"])
    assert max(first, second) < third < 0.2 * both and plan.choose(2) == ["first", "second"]


def test_greedy_sees_it(pair):
    gm, data = pair
    plan = calibrate(gm, data, metric="kl", greedy=True, held_out=False)
    assert plan.choose(1) == ["first"] and plan.choose(2) == ["first", "third"]
    expected = [kl_with(gm, plan, data, names) for names in (["first"], ["first", "third"], ["first", "second", "third"])]
    assert plan.curve.ranked == pytest.approx(expected, abs=1e-6) and plan.curve.base is None
    assert "replaced together in greedy order, on the images that the order was chosen on" in str(plan)


def test_greedy_by_gradients_measures_its_steps(pair):
    gm, data = pair
    plan = calibrate(gm, data, metric="kl", greedy=True, score="gradient", held_out=False)
    names = [plan.sites[i].name for (i,) in plan.curve.order]
    assert sorted(names) == ["first", "second", "third"] and plan.curve.greedy
    assert plan.curve.ranked == pytest.approx([kl_with(gm, plan, data, names[:j]) for j in (1, 2, 3)], abs=1e-6)


@pytest.mark.parametrize("batch", [4, 16])
def test_max_drop_sees_it_on_the_held_out_half(pair, batch):
    """Every second batch is held out, of one batch alone every second image; the sum of impacts is far below the truth."""
    gm, data = pair
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    plan = calibrate(gm, list(zip(x.split(batch), y.split(batch), strict=True)), metric="kl")
    kept = torch.arange(16) % 2 == 1 if batch == 16 else torch.arange(16) // 4 % 2 == 1
    curve = plan.curve
    assert curve.order[:2] in (((0,), (1,)), ((1,), (0,))) and not curve.greedy and curve.samples == 8
    names = [plan.sites[i].name for (i,) in curve.order]
    expected = [kl_with(gm, plan, [(x[kept], y[kept])], names[:step]) for step in (1, 2, 3)]
    assert curve.values == pytest.approx(expected, abs=1e-6)
    limit = 0.5 * curve.values[1]
    assert plan.impact(0) + plan.impact(1) < limit and len(plan.choose(max_drop=limit)) == 1
    assert "on 8 held-out samples: worse by" in str(vmeanba_fx.report(plan.apply(max_drop=limit)))


def test_the_ranking_does_not_look_at_the_held_out_half(pair):
    """Other held-out batches leave the order, and other ranking batches the size of the half, as they were."""
    gm, data = pair
    other = [data[0], (zoo.images(4, seed=77), data[1][1]), data[2], (zoo.images(4, seed=78), data[3][1])]
    plans = [calibrate(gm, d, metric="kl", greedy=True) for d in (data, other)]
    assert plans[0].curve.order == plans[1].curve.order and plans[0].curve.ranked == plans[1].curve.ranked
    assert plans[0].curve.values != plans[1].curve.values and plans[0].scores != plans[1].scores


def test_a_loaded_plan_chooses_without_scoring(pair, tmp_path, monkeypatch):
    gm, data = pair
    plan = calibrate(gm, data, metric="kl", greedy=True)
    plan.save(tmp_path / "plan.json")
    monkeypatch.setattr("vmeanba_fx.calibration.execute.Executor.run", lambda *a, **k: 1 / 0)
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan and str(loaded) == str(plan)
    for choice in ({"k": 2}, {"max_drop": 0.01}, {"max_drop": 100}):
        assert loaded.choose(**choice) == plan.choose(**choice)


def test_excluded_sites_have_no_part(pair):
    gm, data = pair
    plan = calibrate(gm, data, metric="kl", greedy=True, exclude="second")
    assert plan.curve.order == ((0,), (2,)) and plan.choose(max_drop=100, exclude="second") == ["first", "third"]
    assert plan.choose(max_drop=100) == ["first", "third"] and len(plan.scores) == 3
    gm = vmeanba_fx.transform(redundant(), data, metric="kl", max_drop=100, exclude="second")
    assert vmeanba_fx.report(gm).chosen == ("first", "third")


MODES = [{"greedy": True}, {"score": "both"}, {"score": "gradient", "greedy": True}]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_killed_calibration_resumes_to_the_same_plan(captured, tmp_path, monkeypatch, mode):
    """Killed after every single write of the state, whatever the pass; a finished state scores nothing again."""
    options = {"metric": "loss", "seed": 5, "max_batches": 2} | mode
    expected = as_json(calibrate(captured, shuffled(), **options))
    path, kills = tmp_path / "state.json", 0
    from vmeanba_fx.calibration import resume

    write = resume.write_atomically

    def write_and_die(*args):
        write(*args)
        raise Killed

    while True:
        with monkeypatch.context() as patch:
            patch.setattr(resume, "write_atomically", write_and_die)
            try:
                plan = calibrate(captured, shuffled(), resume=path, **options)
            except Killed:
                kills += 1
                assert kills < 60
                continue
        break
    assert as_json(plan) == expected and kills > 3
    assert as_json(calibrate(captured, shuffled(), resume=path, **options)) == expected


def test_state_of_other_options_is_not_used(captured, tmp_path):
    path = tmp_path / "state.json"
    calibrate(captured, LOADER, metric="loss", greedy=True, resume=path)
    for options in ({"greedy": True, "exclude": "blocks.0.op"}, {"greedy": True, "held_out": False}, {}):
        found = calibrate(captured, LOADER, metric="loss", resume=path, **options)
        assert as_json(found) == as_json(calibrate(captured, LOADER, metric="loss", **options))


def test_one_value_for_the_only_batch_leaves_nothing_to_hold_out(captured):
    def mean(outputs, batch):
        return outputs.square().mean()

    plan = calibrate(captured, LOADER[:1], metric=mean, greedy=True)
    assert plan.curve.base is None and plan.intervals == []
    with pytest.raises(PlanError, match="at least two batches"):
        plan.choose(max_drop=1)
    assert calibrate(captured, LOADER[:2], metric=mean).curve.samples == 4


def test_loaders_too_large_to_be_kept(captured, monkeypatch):
    expected = as_json(calibrate(captured, shuffled(), metric="loss"))
    monkeypatch.setattr("vmeanba_fx.calibration.batches._KEPT_BYTES", 100)
    assert as_json(calibrate(captured, shuffled(), metric="loss")) == expected  # read again, shuffled as before
    with pytest.raises(CalibrationError, match=r"read only once and is too large .*max_batches="):
        calibrate(captured, (batch for batch in LOADER), metric="loss")

    class Changing:
        seed = 0

        def __iter__(self):
            self.seed += 1
            return iter(zoo.labelled(3, 4, seed=self.seed))

    with pytest.raises(CalibrationError, match="batch 1 of the calibration loader is another one the second time"):
        calibrate(captured, Changing(), metric="loss")


def test_64_images_give_a_usable_plan(captured):
    plan = calibrate(captured, zoo.labelled(4, 16), metric="loss")
    assert plan.samples == 64 and plan.curve.samples == 32 and len(plan.curve.margins) == 3
    for i, (low, high) in enumerate(plan.intervals):
        assert low < plan.impact(i) < high and f"{(high - low) / 2:.5f}" in str(plan)
    names = [plan.sites[i].name for i in plan.order()]
    unsure = [f"{a} ~ {b}" for a, b, apart in zip(names[:-1], names[1:], plan.apart, strict=True) if not apart]
    assert all(pair in str(plan) for pair in unsure) and ("told apart" in str(plan)) == bool(unsure)
    content = json.loads(as_json(plan))
    assert "times" not in content and set(content["curve"]) == {
        "order", "greedy", "ranked", "base", "values", "margins", "samples",
    }  # fmt: skip


def test_costs_are_printed_before_scoring(captured, capsys):
    calibrate(captured, LOADER, metric="loss", greedy=True, progress=True)
    err = capsys.readouterr().err
    rows = {line.split()[0]: line.split() for line in err.splitlines() if line.startswith(("measured", "gradient", "greedy"))}
    assert rows["measured"][1] == "16" and rows["greedy"][1:2] == ["18"] and rows["greedy"][-1] == "yes"
    assert "held out" in err and "3 sites, 4 batches; one forward pass took" in err
    assert rows["gradient"][-1] != "yes" and err.index("forward pass took") < err.index("scoring 3 sites")
