"""Scans that are no sites: refused with a sentence that names the module, and the rest of the model works."""

import pytest
import torch
from torch import nn

from tests import zoo
from tests.helpers import agrees
from vmeanba_fx.capturing.capture import capture
from vmeanba_fx.errors import NoSitesError
from vmeanba_fx.sites import find_sites


def with_state(u, delta, A, B, C, D, bias):
    y, state = zoo.selective_scan_fn(u, delta, A, B, C, D, None, bias, True, return_last_state=True)
    return y + 0.1 * state.sum(-1, keepdim=True)


def two_dimensional(u, delta, A, B, C, D, delta_bias, HH, WW):
    return zoo.loop_scan(u, delta, A, B, C, D, None, delta_bias, True)[0]


def only_states(u, delta, A, B, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    return delta * u


def complex_scan(u, delta, A, B, C, D, bias):
    return zoo_complex(u, delta, torch.complex(A, A), B, C, D).real


def zoo_complex(u, delta, A, B, C, D=None, z=None, delta_bias=None):
    return (u + A.real.sum() + 0j) * 2


def constant(u, delta, A, B, C, D, bias):
    B, C = (t[0, 0, :, 0].expand(u.shape[1], -1) for t in (B, C))
    return zoo_constant(u, delta, A, B, C, D, bias)


def zoo_constant(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True):
    """B and C are (D, N), the same at every step."""
    B, C = (t[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2]) for t in (B, C))
    return zoo.loop_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)[0]


REFUSED = {
    "last state": (with_state, "its last state is used"),
    "2-D": (lambda u, d, A, B, C, D, bias: two_dimensional(u, d, A, B, C, D, bias, 3, 5), "2-D recurrence"),
    "states only": (lambda u, d, A, B, C, D, bias: only_states(u, d, A, B, D, None, bias), "no C and returns the states"),
    "complex A": (complex_scan, "A is complex"),
    "constant B and C": (constant, "one channel per group"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_scans_that_are_no_sites(name):
    """Refused with a sentence that names the module; a model with nothing else is an error, and still captured right."""
    call, sentence = REFUSED[name]
    model = zoo.tiny(1, directions=1, call=call)
    x = zoo.images(2)[:, :, :8, :8]
    gm = capture(model, x)
    assert agrees(gm, model, x)
    with pytest.raises(NoSitesError, match=rf"no selective scan to rewrite \(blocks.0.op: .*{sentence}"):
        find_sites(gm)


def test_refused_scans_stand_beside_sites():
    model = zoo.tiny()
    model.blocks[1].op.call = with_state
    sites = find_sites(capture(model, zoo.images(3)))
    assert [s.name for s in sites] == ["blocks.0.op"]
    assert sites.refused == [("blocks.1.op", "its last state is used, which a one-channel scan does not have")]
    assert "blocks.1.op: not a site, its last state is used" in str(sites)


def test_unread_last_state_is_no_reason():
    def call(u, delta, A, B, C, D, bias):
        return zoo.selective_scan_fn(u, delta, A, B, C, D, None, bias, True, return_last_state=True)[0]

    assert [s.name for s in find_sites(capture(zoo.tiny(1, call=call), zoo.images(3)))] == ["blocks.0.op"]


def test_model_without_scans():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    with pytest.raises(NoSitesError, match=r"^the model has no selective scan to rewrite\. Teach"):
        find_sites(capture(model, zoo.images(2)))
