"""Calibration on the device: scores, gradients, fits, refits and measured times, against the same model on the CPU."""

import pytest
import torch
import torch.nn.functional as F

import vmeanba_fx
from vmeanba_fx.models import vmamba_digits

OPTIONS = {"metric": "loss", "progress": False}


def loader(device):
    """Two batches of 32 smooth random images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 32, 1, 4, 4, generator=generator)
    labels = torch.randint(0, 10, (2, 32), generator=generator)
    return [
        (F.interpolate(x, size=(32, 32), mode="bilinear").to(device), y.to(device)) for x, y in zip(images, labels, strict=True)
    ]


@pytest.fixture(scope="module")
def plans():
    """Both scores of rank-2 sites, on the CPU and on the device; the loader's batches stay on the CPU."""
    model = vmamba_digits(pretrained=True)
    options = OPTIONS | {"reduce": "rank", "rank": 2, "score": "both"}
    cpu = vmeanba_fx.calibrate(model, loader("cpu"), **options)
    return cpu, vmeanba_fx.calibrate(vmamba_digits(pretrained=True).cuda(), loader("cpu"), **options)


def test_scores_and_gradients_agree_with_the_cpu(plans):
    cpu, cuda = plans
    assert cuda.scores == pytest.approx(cpu.scores, rel=1e-3, abs=1e-4)
    assert cuda.estimates == pytest.approx(cpu.estimates, rel=1e-2, abs=1e-3)
    assert cuda.correlation() == pytest.approx(cpu.correlation(), abs=0.1)
    assert [f.energy for f in cuda.fits.values()] == pytest.approx([f.energy for f in cpu.fits.values()], abs=1e-3)


@pytest.mark.parametrize("refit", [False, True, "all"])
def test_fitted_models_agree_with_the_cpu(plans, refit):
    x = torch.cat([x for x, _ in loader("cpu")])
    expected, found = (
        plan.apply(4, refit=refit)(x.to(device)).cpu() for plan, device in zip(plans, ("cpu", "cuda"), strict=True)
    )
    assert (found - expected).norm() < 2e-2 * expected.norm()


def test_fits_to_the_outputs_agree_with_the_cpu():
    options = OPTIONS | {"reduce": "rank", "rank": 2, "fit": "outputs", "held_out": False}
    models = vmamba_digits(pretrained=True), vmamba_digits(pretrained=True).cuda()
    cpu, cuda = (vmeanba_fx.calibrate(model, loader("cpu"), **options).fits for model in models)
    assert [f.energy for f in cuda.values()] == pytest.approx([f.energy for f in cpu.values()], abs=1e-3)


def test_batches_may_lie_on_the_device():
    model = vmamba_digits(pretrained=True).cuda()
    here, there = (vmeanba_fx.calibrate(model, loader(device), **OPTIONS, score="gradient") for device in ("cpu", "cuda"))
    assert here.estimates == there.estimates


def test_greedy_by_gradients():
    plan = vmeanba_fx.calibrate(vmamba_digits(pretrained=True).cuda(), loader("cpu"), **OPTIONS, score="gradient", greedy=True)
    assert len(plan.curve.order) == len(plan.sites)


def test_speedup_measures_on_the_device():
    model = vmamba_digits(pretrained=True).cuda()
    plan = vmeanba_fx.calibrate(model, loader("cpu"), **OPTIONS)
    times = plan.measure_times()
    assert times.device == torch.cuda.get_device_name() and times.base > 0
    most = times.speedup([i for i, saved in enumerate(times.saved) if saved > 0])
    gm = plan.apply(speedup=1 + (most - 1) / 2)
    assert next(gm.parameters()).is_cuda
    assert vmeanba_fx.report(gm).speed.device == times.device
