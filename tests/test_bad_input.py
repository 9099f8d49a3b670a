"""What a user may give by mistake: the error says what, where and what to do, and no wrong number comes out."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import vmeanba_fx
from tests import zoo
from tests.capturing.models import StaticBatch
from vmeanba_fx import CalibrationError, CaptureError, NoSitesError, PassError, SiteError, calibrate
from vmeanba_fx.calibration.metrics import IGNORED, Batch, resolve_metric

LOADER = zoo.labelled(3, 4)


@pytest.fixture(scope="module")
def captured():
    """A captured model with three live sites; ``calibrate`` takes it as it is and does not trace again."""
    return vmeanba_fx.capture(zoo.live(3), zoo.images(4))


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, "vmamba_tiny_s1l8", zoo.TinyNet, print])
def test_what_is_no_model(model):
    with pytest.raises(CaptureError, match=r"is no nn\.Module, traced GraphModule or ExportedProgram"):
        vmeanba_fx.transform(model, LOADER, k=1)


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_model():
    with pytest.raises(CaptureError, match=r"a TorchScript module cannot be captured: give the nn\.Module"):
        vmeanba_fx.capture(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), torch.ones(2, 2))


def test_an_exported_program_of_another_batch(captured):
    program = torch.export.export(captured, (zoo.images(4),))
    with pytest.raises(CaptureError, match=r"does not take these inputs \(\(3, 3, 12, 20\)\): x\.size\(\)\[0\] == 4"):
        calibrate(program, [zoo.images(3)])


def test_a_model_that_was_not_captured():
    for function in (vmeanba_fx.find_sites, vmeanba_fx.bake_autocast):
        with pytest.raises(CaptureError, match=r"this TinyNet was not made by vmeanba_fx.capture\(\)"):
            function(zoo.live(1))
    with pytest.raises(vmeanba_fx.VMeanbaError, match="this TinyNet carries no report"):
        vmeanba_fx.report(zoo.live(1))


def test_a_model_that_was_rewritten_already(captured):
    with pytest.raises(NoSitesError, match="was rewritten already: transform the original one"):
        vmeanba_fx.transform(vmeanba_fx.transform(captured, LOADER, k=3), LOADER, k=1)


def test_a_model_that_cannot_be_exported_is_told_in_one_sentence(capfd):
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.mean() > 0 else -x

    with pytest.raises(CaptureError, match="Branching cannot be exported"):
        vmeanba_fx.capture(Branching(), zoo.images(2))
    assert capfd.readouterr() == ("", "")  # torch prints the whole graph


@pytest.mark.parametrize("args", [3, {"x": zoo.images(2)}])
def test_example_inputs_that_are_none(args):
    with pytest.raises(CaptureError, match=f"args is a {type(args).__name__}: give a tensor or a tuple of inputs"):
        vmeanba_fx.capture(zoo.live(1), args)


# -- loaders ----------------------------------------------------------------------------------------------------------


def test_what_is_no_batch(captured):
    x, y = zoo.labelled(1, 4)[0]
    with pytest.raises(CalibrationError, match=r"a data set of single items: give DataLoader"):
        calibrate(captured, TensorDataset(x, y))
    with pytest.raises(CalibrationError, match="batch 1 of the calibration loader is empty"):
        calibrate(captured, [(x, y), (x[:0], y[:0])])


def test_empty_loader(captured):
    for empty in ([], iter(())):
        with pytest.raises(CalibrationError, match="the calibration loader is empty"):
            calibrate(captured, empty)
    with pytest.raises(CalibrationError, match="max_batches=0"):
        calibrate(captured, LOADER, max_batches=0)
    with pytest.raises(CalibrationError, match=r"wrap it in a list, \[images\]"):
        calibrate(captured, zoo.images(4))
    for nothing in (None, 3):
        with pytest.raises(CalibrationError, match="give something that yields batches"):
            calibrate(captured, nothing)


@pytest.mark.parametrize("batch, told", [
    (np.zeros((4, 3, 12, 20)), "a batch that is a ndarray: give tensors"),
    ((np.zeros((4, 3, 12, 20)), np.zeros(4)), "a tuple of ndarray, ndarray: give tensors"),
    ((zoo.images(4), torch.zeros(4), 1), "a tuple of Tensor, Tensor, int"),
    ("image.png", "a str"),
])  # fmt: skip
def test_batches_that_are_none(captured, batch, told):
    with pytest.raises(CalibrationError, match=f"{told}.*transform_fn"):
        calibrate(captured, [batch])


def test_a_batch_in_place_of_the_loader(captured):
    with pytest.raises(CalibrationError, match=r"wrap it in a list, \[\(inputs, labels\)\]"):
        calibrate(captured, LOADER[0])


def test_transform_fn_that_is_none(captured):
    with pytest.raises(CalibrationError, match="transform_fn must be a callable that maps a batch, not str"):
        calibrate(captured, LOADER, transform_fn="x")


def test_first_batch_that_does_not_fit_the_model():
    with pytest.raises(vmeanba_fx.CaptureError, match=r"does not run on the example input \(\(4, 5, 12, 20\)\)"):
        calibrate(zoo.live(1), [torch.randn(4, 5, 12, 20)])


def test_later_batch_that_does_not_fit(captured):
    with pytest.raises(CalibrationError, match=r"batch 1 \(\(4, 3, 16, 20\)\) does not fit the captured graph"):
        calibrate(captured, [zoo.images(4), torch.randn(4, 3, 16, 20)])
    with pytest.raises(CalibrationError, match=r"batch 1 .* does not fit the captured graph"):
        calibrate(captured, [zoo.images(4), {"other": zoo.images(4)}])


def test_static_batch_says_so():
    model = zoo.live(1)
    model.__class__ = StaticBatch
    loader = [zoo.images(4), zoo.images(4, seed=7), zoo.images(3)]
    with pytest.raises(CalibrationError, match=r"batch 2 \(\(3, 3, 12, 20\)\).*the graph runs for batch 4 only"):
        calibrate(model, loader)
    assert calibrate(model, loader, max_batches=2).samples == 8


def broken(where, value):
    """A model whose block ``where`` has a weight that is not finite."""
    model = zoo.live(3)
    with torch.no_grad():
        model.blocks[where].op.in_proj.bias[0] = value
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_name_the_site(value, tmp_path):
    path = tmp_path / "state.json"
    with pytest.raises(CalibrationError, match=r"outputs on calibration batch 0 are not finite.*scan at blocks.1.op"):
        calibrate(broken(1, value), LOADER, resume=path)
    assert not path.exists()


def test_a_replacement_that_is_not_finite_names_the_site(captured, monkeypatch):
    module = sys.modules["vmeanba_fx.calibration.replacing"]
    original, calls = module.mean_scan_tensors, []

    def second_is_nan(*args, **kwargs):
        calls.append(1)
        y = original(*args, **kwargs)
        return y * math.nan if len(calls) == 2 else y

    monkeypatch.setattr(module, "mean_scan_tensors", second_is_nan)
    with pytest.raises(CalibrationError, match=r"blocks.1.op: with this site replaced, the outputs .* not finite"):
        calibrate(captured, LOADER)


def test_scores_that_are_not_finite_name_the_site(captured):
    def bad_base(outputs, batch):
        return torch.full((len(outputs),), math.nan)

    with pytest.raises(CalibrationError, match="'bad_base' of the unchanged model on batch 0 is not finite"):
        calibrate(captured, LOADER, metric=bad_base)

    def bad_later(outputs, batch, calls=[]):  # noqa: B006
        calls.append(1)
        return torch.full((len(outputs),), math.inf if len(calls) == 3 else 0.0)

    with pytest.raises(CalibrationError, match=r"blocks.1.op: the metric 'bad_later' on batch 0 is not finite"):
        calibrate(captured, LOADER, metric=bad_later)

    def other_later(outputs, batch, calls=[]):  # noqa: B006
        calls.append(1)
        return torch.zeros(() if len(calls) == 3 else len(outputs))

    with pytest.raises(CalibrationError, match="'other_later' gave 1 values where it gave 4 before"):
        calibrate(captured, LOADER, metric=other_later)


@pytest.mark.parametrize("metric, match", [
    ("f1", "unknown metric 'f1': use accuracy, loss, kl"),
    (3, "must be a name or a callable, not int"),
    (lambda outputs, batch: 0.5, "must return a float tensor.*got float"),
    (lambda outputs, batch: outputs.argmax(1), "must return a float tensor.*int64"),
    (lambda outputs, batch: outputs, r"must return a float tensor.*\(4, 7\)"),
    (lambda outputs, batch: outputs[:3, 0], r"one per sample; got a tensor of shape \(3,\).*for 4 samples"),
])  # fmt: skip
def test_bad_metrics(captured, metric, match):
    with pytest.raises(CalibrationError, match=match):
        calibrate(captured, LOADER, metric=metric)


def test_labels_that_do_not_fit(captured):
    with pytest.raises(CalibrationError, match=r"metric 'loss' needs labels.*metric='kl' needs none"):
        calibrate(captured, [x for x, _ in LOADER], metric="loss")
    for metric in ("accuracy", "loss"):
        for labels in (torch.zeros(4, 1, dtype=torch.long), torch.zeros(4, 7), [1, 2, 3, 4]):
            with pytest.raises(CalibrationError, match=r"labels must be class numbers, a tensor .* of shape \(4,\)"):
                calibrate(captured, [(zoo.images(4), labels)], metric=metric)
        for label in (-1, 7, 255):
            with pytest.raises(CalibrationError, match=rf"labels lie between .*{label}.* the classes 0 to 6"):
                calibrate(captured, [(zoo.images(4), torch.tensor([1, 2, 3, label]))], metric=metric)


def test_labels_to_be_ignored_count_for_nothing():
    scores = torch.randn(2, 5, 3, 4)
    labels = torch.randint(5, (2, 3, 4))
    labels[0, :2], labels[1] = IGNORED, IGNORED
    batch = Batch((scores,), labels=labels)
    seen = {name: resolve_metric(name, True).compute(scores, batch, None) for name in ("accuracy", "loss")}
    left = scores[0, :, 2], labels[0, 2]
    expected = (left[0].argmax(0) == left[1]).double().mean(), F.cross_entropy(left[0].T.double(), left[1])
    torch.testing.assert_close(seen["accuracy"], torch.stack([expected[0], torch.zeros_like(expected[0])]))
    torch.testing.assert_close(seen["loss"], torch.stack([expected[1], torch.zeros_like(expected[1])]))


def test_labels_of_any_whole_type_are_class_numbers(captured):
    expected = calibrate(captured, LOADER, metric="loss").scores
    for dtype in (torch.int32, torch.uint8):
        assert calibrate(captured, [(x, y.to(dtype)) for x, y in LOADER], metric="loss").scores == expected
    flags, numbers = ([(x, (y > 1).to(dtype)) for x, y in LOADER] for dtype in (torch.bool, torch.int64))
    assert calibrate(captured, flags, metric="loss").scores == calibrate(captured, numbers, metric="loss").scores


@pytest.mark.parametrize("head", [
    lambda y: y[:, :1],  # one number per image: its softmax is 1, whatever the model says
    lambda y: y[:, 0],
    lambda y: y.argmax(1),
], ids=["one class", "no classes", "class numbers"])  # fmt: skip
@pytest.mark.parametrize("metric", ["accuracy", "loss", "kl"])
def test_outputs_that_are_no_class_scores(head, metric):
    class Head(zoo.TinyNet):
        def forward(self, x):
            return head(super().forward(x))

    model = zoo.live(1)
    model.__class__ = Head
    with pytest.raises(CalibrationError, match=r"not class scores .* pass metric=callable"):
        calibrate(model, LOADER, metric=metric)


def test_regression_with_a_metric_of_its_own(captured):
    loader = [(x, torch.rand(4)) for x, _ in LOADER]
    assert calibrate(captured, loader, metric=lambda y, batch: -(y[:, 0] - batch[1]).square()).scored
    with pytest.raises(CalibrationError, match=r"class numbers.*got torch.float32 of shape \(4,\)"):
        calibrate(captured, loader)


# -- options ----------------------------------------------------------------------------------------------------------


def test_bad_options(captured, tmp_path):
    with pytest.raises(PassError, match="mean='median'"):
        calibrate(captured, LOADER, mean="median")
    for path, why in ((tmp_path, "is a folder"), (tmp_path / "none" / "state.json", "there is no folder")):
        with pytest.raises(vmeanba_fx.PlanError, match=f"cannot write .*{why}"):
            calibrate(captured, LOADER, resume=path)
    for seed in (-1, 1.5, True):
        with pytest.raises(CalibrationError, match="seed="):
            calibrate(captured, LOADER, seed=seed)


def test_choices(captured):
    plan = calibrate(captured, LOADER)
    assert plan.choose(k=np.int64(2)) == plan.choose(k=2)
    with pytest.raises(SiteError, match="has 0 sites to replace besides the excluded ones, so k can be 0 to 0"):
        plan.apply(1, exclude="*")
    for patterns in (3, ["blocks.*", 3]):
        with pytest.raises(SiteError, match="exclude: 3 is neither the name of a site nor a glob"):
            plan.apply(1, exclude=patterns)


def test_skipped_passes(captured):
    plan = calibrate(captured, LOADER, score_sites=False)
    names = [record.name for record in vmeanba_fx.report(plan.apply(0, skip_passes="fuse_ss2d")).passes]
    assert "fuse_ss2d" not in names and "channels_last" in names
    with pytest.raises(PassError, match="no pass named 3, fuse_everything to skip"):
        plan.apply(0, skip_passes=["fuse_everything", 3])
