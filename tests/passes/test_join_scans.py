"""Scans that a model calls one by one, one per direction of the same map, become one op; near misses stay as they were."""

import pytest
import torch

import vmeanba_fx
from tests import zoo
from tests.helpers import relative_error
from tests.passes.cases import EXACT, OURS, targets


def one_by_one(u, delta, A, B, C, D, bias, after=lambda y: y):
    """A call per direction instead of one for all."""
    K = B.shape[1]
    by_direction = zip(u.chunk(K, 1), delta.chunk(K, 1), A.chunk(K), B.chunk(K, 1), C.chunk(K, 1), D.chunk(K), bias.chunk(K),
                       strict=True)  # fmt: skip
    return torch.cat([after(zoo.call_s1(*arguments)) for arguments in by_direction], dim=1)


def gated(*args):
    return one_by_one(*args, after=torch.tanh)


def chained(u, delta, A, B, C, D, bias):
    """The second direction's step depends on what the first one put out."""
    first, second = u.chunk(2, 1), delta.chunk(2, 1)
    y = zoo.call_s1(first[0], second[0], A.chunk(2)[0], B[:, :1], C[:, :1], D.chunk(2)[0], bias.chunk(2)[0])
    step = second[1] + 0.1 * y
    z = zoo.call_s1(first[1], step, A.chunk(2)[1], B[:, 1:], C[:, 1:], D.chunk(2)[1], bias.chunk(2)[1])
    return torch.cat([y, z], dim=1)


def unlike(u, delta, A, B, C, D, bias):
    """The second direction's step goes through no softplus."""
    parts = [t.chunk(2, axis) for t, axis in zip((u, delta, A, B, C, D, bias), (1, 1, 0, 1, 1, 0, 0), strict=True)]
    return torch.cat([zoo.vmamba_scan_fn(*(t[i] for t in parts), i == 0) for i in range(2)], dim=1)


def transformed(call, directions, **choice):
    model = zoo.tiny(1, directions=directions, call=call).double()
    x = zoo.images(3, dtype=torch.float64)
    return model, vmeanba_fx.transform(model, [x], **choice), x


@pytest.mark.parametrize("directions", [2, 4])
def test_joined_and_exact(directions):
    model, gm, x = transformed(one_by_one, directions, k=0)
    assert targets(gm).count(OURS.ss2d.default) == 1
    assert OURS.selective_scan.default not in targets(gm)
    assert not vmeanba_fx.report(gm).unfused
    with torch.no_grad():
        assert relative_error(zoo.without_scan(model, x), model(x)) > 0.02
        for batch in (x, x[:1]):
            assert relative_error(gm(batch), model(batch)) < 1e-12


def test_beside_a_replaced_direction_the_others_stay_calls():
    plan = vmeanba_fx.calibrate(zoo.tiny(1, call=one_by_one).double(), [zoo.images(dtype=torch.float64)], score_sites=False)
    name = plan.sites[1].name
    gm, literal = plan.apply(sites=[name]), plan.apply(sites=[name], skip_passes=EXACT)
    x = zoo.images(3, dtype=torch.float64)
    assert targets(gm).count(OURS.selective_scan.default) == 3
    with torch.no_grad():
        assert relative_error(gm(x), literal(x)) < 1e-12


@pytest.mark.parametrize("call", [gated, chained, unlike])
def test_near_misses_stay(call):
    model, gm, x = transformed(call, 2, k=0)
    found = targets(gm)
    assert found.count(OURS.selective_scan.default) == 2
    assert OURS.ss2d.default not in found
    assert len(vmeanba_fx.report(gm).unfused) == 2
    with torch.no_grad():
        assert relative_error(gm(x), model(x)) < 1e-12
