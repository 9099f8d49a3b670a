"""The one-line form, and what holds for the package as a whole."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import vmeanba_fx
from tests import zoo
from tests.helpers import relative_error
from vmeanba_fx import SiteError, transform

LOADER = zoo.labelled(2, 4)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model():
    """An annihilated site, a live one, and a gated one."""
    model = zoo.tiny(3, directions=2)
    model.blocks[1].op.after = nn.Identity()
    model.blocks[2].op.call = gated
    return model


@pytest.fixture(scope="module")
def captured(model):
    """Its capture, for tests that need not trace again."""
    return vmeanba_fx.capture(model, zoo.images(3))


def gated(u, delta, A, B, C, D, bias):
    return zoo.selective_scan_fn(u, delta, A, B, C, D, u.flip(1), bias, True)


def outputs(model, batch=3):
    with torch.no_grad():
        return model(zoo.images(batch))


@pytest.mark.parametrize("options", [
    {"k": 2, "metric": "kl", "seed": 3}, {"max_drop": 0.05, "metric": "loss", "mean": "all"},
    {"sites": "blocks.[12]*", "mean": "input"}, {"k": 1, "exclude": ["blocks.0.op"], "max_batches": 1},
])  # fmt: skip
def test_transform_is_calibrate_and_apply(model, captured, options):
    gm = transform(captured, LOADER, **options)
    choice = {name: options.pop(name) for name in ("k", "max_drop", "sites", "exclude") if name in options}
    plan = vmeanba_fx.calibrate(captured, LOADER, **options)
    expected = plan.apply(**choice)
    assert gm.code == expected.code
    assert vmeanba_fx.report(gm).chosen == vmeanba_fx.report(expected).chosen
    assert torch.equal(outputs(gm), outputs(expected))
    assert not torch.equal(outputs(gm), outputs(model))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_no_site_replaced_is_the_model_itself(model, captured, batch):
    gm = transform(captured, LOADER, k=0)
    assert relative_error(outputs(gm, batch), outputs(model, batch)) <= 1e-5


def test_no_site_replaced_in_float64():
    model = zoo.tiny().double()
    x = zoo.images(3, dtype=torch.float64)
    assert relative_error(transform(model, [x], k=0)(x), model(x)) <= 1e-12


def test_the_original_and_the_random_numbers_are_untouched(model):
    model = copy.deepcopy(model).train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    keys = [set(vars(m)) for m in model.modules()]
    torch.manual_seed(5)
    rng, grad = torch.get_rng_state(), torch.is_grad_enabled()
    gm = transform(model, LOADER, k=2, metric="loss")
    assert torch.equal(torch.get_rng_state(), rng) and torch.is_grad_enabled() == grad
    assert [m.training for m in model.modules()] == modes and not gm.training
    assert [set(vars(m)) for m in model.modules()] == keys
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_generator_is_read_once(captured):
    taken = []

    def generator():
        for batch in LOADER:
            taken.append(1)
            yield batch

    gm = transform(captured, generator(), k=2, metric="loss")
    assert len(taken) == 2 and torch.equal(outputs(gm), outputs(transform(captured, LOADER, k=2, metric="loss")))


def test_symbolically_traced_model(model, captured):
    traced = vmeanba_fx.symbolic_trace(model, zoo.images(3))
    gm = transform(traced, LOADER, sites="blocks.0.op")
    assert relative_error(outputs(gm), outputs(transform(captured, LOADER, sites="blocks.0.op"))) <= 1e-5


def test_exported_program(captured):
    program = torch.export.export(captured, (zoo.images(3),), dynamic_shapes=({0: torch.export.Dim("b", max=64)},))
    gm = transform(program, LOADER, k=2, metric="loss")
    expected = transform(captured, LOADER, k=2, metric="loss")
    assert vmeanba_fx.report(gm).chosen == vmeanba_fx.report(expected).chosen
    assert relative_error(outputs(gm), outputs(expected)) <= 1e-5


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    ({"k": 4}, "this model has 3 sites to replace, so k can be 0 to 3"), ({"k": -1}, "k=-1"), ({"k": 2.0}, "k=2.0"),
    ({"k": None}, "give exactly one of"), ({"k": 1, "max_drop": 0.1}, "give exactly one of"),
    ({"k": 1, "exclude": "none"}, "exclude: 'none' matches no site"), ({"max_drop": -1}, "max_drop=-1"),
    ({"sites": "none"}, "sites: 'none' matches no site"),
])  # fmt: skip
def test_impossible_choices_are_refused_before_anything_is_scored(captured, options, message):
    def metric(outputs, batch):
        raise AssertionError("scored in vain")

    with pytest.raises(SiteError, match=message):
        transform(captured, LOADER, metric=metric, **options)


def test_nothing_is_scored_where_nothing_is_ranked(captured):
    def metric(outputs, batch):
        raise AssertionError("scored in vain")

    for options in ({"k": 0}, {"sites": "*"}):
        transform(captured, LOADER, metric=metric, **options)


def test_model_without_scans():
    with pytest.raises(vmeanba_fx.NoSitesError, match="no selective scan to rewrite"):
        transform(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), [zoo.images(2)], k=0)


def test_unknown_option(captured):
    with pytest.raises(TypeError, match="kk"):
        transform(captured, LOADER, kk=1)


# -- the package ------------------------------------------------------------------------------------------------------


def python(code):
    """Output of a fresh interpreter that runs ``code`` in this checkout."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT.anchor)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_takes_nothing_it_does_not_need():
    heavy = ("cupy", "matplotlib", "sklearn", "triton", "torchvision", "pandas", "timm", "mamba_ssm", "numba", "llvmlite")
    found = python(
        "import sys, torch, torch.utils.flop_counter; before = set(sys.modules); "  # some releases of it import Triton
        "import vmeanba_fx, vmeanba_fx.models; new = set(sys.modules) - before; "
        f"print(sorted(n for n in new if n.split('.')[0] in {heavy}), torch.cuda.is_initialized())"
    )
    assert found == "[] False"


def test_passes_have_one_name_only():
    """From a checkout they lie beside the package; under two names there would be two of each class."""
    found = python(
        "import sys, vmeanba_fx; from vmeanba_fx.passes import Pass, mean_scan; "
        "print(mean_scan.__module__, Pass.__module__, [n for n in sys.modules if n.split('.')[0] == 'passes'])"
    )
    assert found == "vmeanba_fx.passes.mean_scan vmeanba_fx.passes.manager []"


def test_public_names():
    assert len(vmeanba_fx.__all__) == len(set(vmeanba_fx.__all__)) and sorted(vmeanba_fx.__all__) == vmeanba_fx.__all__
    for name in vmeanba_fx.__all__:
        assert getattr(vmeanba_fx, name).__doc__, name
    assert issubclass(vmeanba_fx.PlanError, vmeanba_fx.VMeanbaError) and issubclass(vmeanba_fx.PlanError, ValueError)
    assert (ROOT / "vmeanba_fx" / "py.typed").is_file()


def test_running_a_capture_leaves_no_trace_in_the_process():
    found = python(
        "import torch, warnings, vmeanba_fx; from tests import zoo\n"
        "before = torch.cuda.device, warnings.filters[:], torch.get_rng_state(), zoo.selective_scan_fn.__code__\n"
        "vmeanba_fx.transform(zoo.tiny(1), zoo.labelled(1), k=1)\n"
        "after = torch.cuda.device, warnings.filters[:], torch.get_rng_state(), zoo.selective_scan_fn.__code__\n"
        "print(*(bool((a == b).all()) if isinstance(a, torch.Tensor) else a == b for a, b in zip(before, after)))"
    )
    assert found == "True True True True"
