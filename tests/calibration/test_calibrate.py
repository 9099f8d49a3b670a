"""Impact scores: what they mean, that they come out the same every time, and what a bad loader or metric is told."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vmeanba_fx
from tests import zoo
from tests.calibration.runs import LOADER, Killed, as_json, brute_force, interrupted, shuffled, together
from tests.capturing.models import AutocastBlock, InPlaceBlock
from vmeanba_fx import Batch, CalibrationError, PlanError, calibrate
from vmeanba_fx.calibration.metrics import unpack


@pytest.mark.parametrize("mean", ["direction", "all", "input"])
@pytest.mark.parametrize("metric", ["accuracy", "loss", "kl"])
def test_impact_is_that_of_replacing_one_site(captured, metric, mean):
    plan = calibrate(captured, LOADER, metric=metric, mean=mean)
    base, *scores = brute_force(plan, metric)
    assert plan.samples == 12 and plan.metric == metric and plan.mean == mean
    assert plan.base == pytest.approx(base, abs=1e-6)
    assert plan.scores == pytest.approx(scores, abs=1e-6)
    sign = 1 if metric == "accuracy" else -1
    assert [plan.impact(i) for i in range(3)] == pytest.approx([sign * (base - s) for s in scores], abs=1e-6)
    if metric != "accuracy":
        assert len(set(plan.scores)) == 3 and min(abs(s - base) for s in scores) > 1e-5


def with_blocks(kind):
    model = zoo.live(2)
    model.blocks = nn.ModuleList(kind(6, block.op) for block in model.blocks)
    return model.eval()


@pytest.mark.parametrize("kind, bound", [(InPlaceBlock, 1e-6), (AutocastBlock, 1e-4)])
def test_impact_in_graphs_that_are_no_plain_data_flow(kind, bound):
    """In-place operators, and scans inside the sub-graph of an autocast region."""
    plan = calibrate(with_blocks(kind), LOADER, metric="loss")
    base, *scores = brute_force(plan, "loss")
    assert plan.base == pytest.approx(base, abs=bound) and plan.scores == pytest.approx(scores, abs=bound)
    assert min(abs(s - base) for s in scores) > 10 * bound


def test_a_write_that_stays_in_the_graph_makes_every_run_a_full_one(captured, monkeypatch):
    """Where export cannot remove an in-place operator, scores are still those of replacing one site."""
    monkeypatch.setattr("vmeanba_fx.calibration.execute.mutates", lambda node: node.target is torch.ops.aten.conv2d.default)
    assert calibrate(captured, LOADER, metric="loss").scores == pytest.approx(
        brute_force(calibrate(captured, LOADER, metric="loss"), "loss")[1:], abs=1e-6
    )


def test_a_callable_metric_gets_outputs_and_the_loaders_batch(captured):
    seen = []

    def margin(outputs, batch):
        seen.append(batch)
        return outputs.gather(1, batch[1][:, None])[:, 0]

    plan = calibrate(captured, LOADER, metric=margin, held_out=False)
    x, labels = together()
    with torch.no_grad():
        expected = [float(plan.apply(sites=s.name)(x).gather(1, labels[:, None]).double().mean()) for s in plan.sites]
    assert plan.metric == "margin" and plan.higher_is_better
    assert plan.scores == pytest.approx(expected, abs=1e-6)
    assert len(seen) == 3 * 4 and torch.equal(seen[0][0], LOADER[0][0]) and torch.equal(seen[-1][1], LOADER[2][1])
    margin.higher_is_better = False
    lower = calibrate(captured, LOADER, metric=margin)
    assert [lower.impact(i) for i in range(3)] == pytest.approx([-plan.impact(i) for i in range(3)])


def test_a_metric_of_one_value_counts_by_batch_size(captured):
    loader = [*zoo.labelled(1, 6, seed=4), *zoo.labelled(1, 2, seed=5)]
    whole = calibrate(captured, loader, metric=lambda out, batch: out.double().square().mean())
    single = calibrate(captured, loader, metric=lambda out, batch: out.double().square().mean(1))
    assert whole.samples == single.samples == 8 and whole.scores == pytest.approx(single.scores)


def test_default_metric(captured):
    assert calibrate(captured, LOADER).metric == "accuracy"
    assert calibrate(captured, [x for x, _ in LOADER]).metric == "kl"


# -- loaders ----------------------------------------------------------------------------------------------------------


def test_loaders_of_every_kind_give_the_same_scores(captured):
    expected = calibrate(captured, LOADER, metric="kl")
    plain = [x for x, _ in LOADER]
    loaders = {
        "tensors": plain,
        "one-tuples": [(x,) for x in plain],
        "lists": [[x, y] for x, y in LOADER],
        "generator": (batch for batch in LOADER),
        "DataLoader": DataLoader(TensorDataset(*together()), batch_size=4),
        "Batch": [Batch((x,), labels=y) for x, y in LOADER],
        "longer": [*LOADER, *zoo.labelled(2, 4, seed=8)],
    }
    for name, loader in loaders.items():
        plan = calibrate(captured, loader, metric="kl", max_batches=3 if name == "longer" else None)
        assert plan.scores == expected.scores, name
    odd = [{"id": i, "pair": batch} for i, batch in enumerate(LOADER)]
    plan = calibrate(captured, odd, metric="kl", transform_fn=lambda batch: batch["pair"])
    assert plan.scores == expected.scores


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = zoo.live(1)

    def forward(self, pixel_values, scale=None, mode="plus"):
        logits = self.net(pixel_values)
        logits = logits if scale is None else logits * scale[:, None]
        return {"logits": logits if mode == "plus" else -logits, "loss": logits.mean()}


def test_loaders_of_dictionaries(tmp_path):
    """Keyword inputs with labels among them, and outputs in a dictionary; the plan applies to a fresh model too."""
    model = ByName().eval()
    loader = [
        {"pixel_values": x, "labels": y, "scale": torch.linspace(1, 2, 4), "mode": "minus"} for x, y in LOADER
    ]
    plan = calibrate(model, loader, metric="loss")
    assert [s.name for s in plan.sites] == ["net.blocks.0.op"]
    x, labels = together()
    scale = torch.linspace(1, 2, 4).repeat(3)
    with torch.no_grad():
        out = plan.apply(1)(pixel_values=x, scale=scale, mode="minus")["logits"]
    assert plan.scores == pytest.approx([float(F.cross_entropy(out.double(), labels))], abs=1e-6)
    pairs = [({k: v for k, v in batch.items() if k != "labels"}, batch["labels"]) for batch in loader]
    assert calibrate(model, pairs, metric="loss").scores == plan.scores
    plan.save(tmp_path / "plan.json")
    fresh = vmeanba_fx.Plan.load(tmp_path / "plan.json").apply(1, model=model)
    with torch.no_grad():
        torch.testing.assert_close(fresh(pixel_values=x, scale=scale, mode="minus")["logits"], out)


def test_unpack_refuses_what_it_cannot_tell():
    for odd in ((1, 2, 3), "text", [], (None, None), 3):
        with pytest.raises(CalibrationError, match=r"cannot tell inputs from labels.*transform_fn"):
            unpack(odd)


# -- the same every time ----------------------------------------------------------------------------------------------


def test_same_seed_same_plan(captured, monkeypatch):
    """Byte for byte, with a shuffling loader, and the caller's random numbers go on as if nothing had happened."""
    torch.manual_seed(11)
    rng = torch.get_rng_state()
    first = as_json(calibrate(captured, shuffled(), metric="loss", max_batches=2, seed=5))
    assert torch.equal(torch.get_rng_state(), rng)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: 1 / 0)  # CUDA's are as much the caller's
    torch.rand(3)
    assert as_json(calibrate(captured, shuffled(), metric="loss", max_batches=2, seed=5)) == first
    other = json.loads(as_json(calibrate(captured, shuffled(), metric="loss", max_batches=2, seed=6)))
    assert other["fingerprint"]["data"] != json.loads(first)["fingerprint"]["data"]


def test_a_fresh_capture_gives_the_same_plan():
    plans = [as_json(calibrate(zoo.live(2), LOADER, metric="loss")) for _ in range(2)]
    assert plans[0] == plans[1]


def test_a_killed_calibration_resumes(captured, tmp_path):
    expected = as_json(calibrate(captured, shuffled(), metric="loss", seed=5))
    path = tmp_path / "state.json"
    for after in (1, 2):
        with pytest.raises(Killed):
            calibrate(captured, interrupted(shuffled(), after), metric="loss", seed=5, resume=path)
        assert json.loads(path.read_text())["sections"]["singles"]["tally"]["batches"] == after
    assert as_json(calibrate(captured, shuffled(), metric="loss", seed=5, resume=path)) == expected
    # A finished state is a plan already: nothing is scored again.
    runs = []

    def counting(outputs, batch):
        runs.append(1)
        return outputs.mean(1)

    assert as_json(calibrate(captured, shuffled(), metric="loss", seed=5, resume=path)) == expected
    calibrate(captured, LOADER, metric=counting, resume=tmp_path / "other.json")
    done = len(runs)
    calibrate(captured, LOADER, metric=counting, resume=tmp_path / "other.json")
    assert len(runs) == done


def test_killed_in_the_middle_of_a_batch(captured, tmp_path):
    def loss(outputs, batch, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 7:  # the second batch, after some of its sites
            raise Killed
        return F.cross_entropy(outputs, batch[1], reduction="none")

    path = tmp_path / "state.json"
    with pytest.raises(Killed):
        calibrate(captured, LOADER, metric=loss, resume=path)
    plan = calibrate(captured, LOADER, metric=loss, resume=path)
    assert as_json(plan) == as_json(calibrate(captured, LOADER, metric=loss))


def test_state_of_another_run_is_refused(captured, tmp_path):
    path = tmp_path / "state.json"
    calibrate(captured, LOADER, metric="loss", resume=path, max_batches=2)

    def refused(match, model=captured, loader=LOADER, **options):
        before = path.read_bytes()
        with pytest.raises(PlanError, match=match):
            calibrate(model, loader, **{"metric": "loss", "resume": path} | options)
        assert path.read_bytes() == before

    refused("belongs to another run.*other options", metric="kl")
    refused("belongs to another run.*other options", mean="input")
    refused("belongs to another run.*seed 0 against 3", seed=3)
    refused("belongs to another run.*other weights", model=zoo.live(3, seed=9))
    refused("belongs to another run.*another model graph", model=zoo.tiny(3))
    refused("other calibration data", loader=zoo.labelled(3, 4, seed=77))
    refused("more batches than the loader gives now", loader=LOADER[:1])
    state = path.read_text()
    nothing = json.loads(state)
    nothing["sections"]["singles"]["tally"]["batches"] = 0
    nothing = json.dumps(nothing)
    for broken in ("{", "[]", "{}", state.replace('"sums"', '"summe"'), state[:-20], nothing):
        path.write_text(broken)
        refused("damaged|not an object|not a calibration state")


def test_state_may_grow(captured, tmp_path):
    """More batches than last time: the first ones are not scored again."""
    path = tmp_path / "state.json"
    calibrate(captured, LOADER, metric="loss", resume=path, max_batches=1)
    grown = calibrate(captured, LOADER, metric="loss", resume=path)
    assert as_json(grown) == as_json(calibrate(captured, LOADER, metric="loss"))


# -- ties -------------------------------------------------------------------------------------------------------------


def test_ties_go_to_the_smaller_shift_of_the_outputs(captured):
    """Accuracy on few samples does not tell sites apart; their KL does."""
    plan = calibrate(captured, LOADER, metric=lambda outputs, batch: torch.ones(len(outputs)))
    assert {plan.impact(i) for i in range(3)} == {0.0}
    assert plan.order() == sorted(range(3), key=brute_force(plan, "kl")[1:].__getitem__)
    by_position = vmeanba_fx.Plan(**vars(plan) | {"tiebreaks": []})
    assert by_position.order() == [0, 1, 2]


def test_outputs_without_scores_are_ranked_by_position():
    class Two(zoo.TinyNet):
        def forward(self, x):
            y = super().forward(x)
            return y, y * 2

    model = zoo.live(2)
    model.__class__ = Two
    plan = calibrate(model, LOADER, metric=lambda outputs, batch: torch.zeros(len(outputs[0])))
    assert plan.tiebreaks == [] and plan.order() == [0, 1]
    with pytest.raises(CalibrationError, match=r"returns 2 tensors and none is called logits.*callable"):
        calibrate(model, LOADER, metric="accuracy")
