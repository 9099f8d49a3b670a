"""Every walk over the map, gate and region that public models put around their scans: found, exact, replaced as written."""

import pytest
import torch
from torch import nn

import vmeanba_fx
from tests import zoo
from tests.families.models import STRUCTURES, build
from tests.helpers import relative_error
from tests.paper_block import paper_block


def paper(u, delta, A, B, C, D, bias):
    """The paper's block in the place of a scan call."""
    return paper_block(u, delta, A, B, C, D, None, bias, True)


def without_skip(u, delta, A, B, C, D, bias):
    return zoo.selective_scan_fn(u, delta, A, B, C, None, None, bias, True)


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure(name):
    model, x = build(name), zoo.images(3)
    with torch.no_grad():
        assert relative_error(zoo.without_scan(model, x), model(x)) > 0.05
    gm = vmeanba_fx.capture(model, x)
    sites = vmeanba_fx.find_sites(gm)
    per_block = 4 if name == "one call per direction" else 1
    assert len(sites) == 2 * per_block and not sites.refused
    assert {site.module for site in sites} == {"blocks.0.op", "blocks.1.op"}
    assert not any(site.annihilated for site in sites)
    replaced = build(name, call=paper)
    exact, lossy = (vmeanba_fx.transform(gm, [x], k=k) for k in (0, len(sites)))
    with torch.no_grad():
        for batch in (1, 2, 5):
            images = zoo.images(batch)
            assert relative_error(exact(images), model(images)) <= 1e-5
            assert relative_error(lossy(images), replaced(images)) <= 1e-5
        assert relative_error(lossy(x), model(x)) > 0.01  # it did something


@pytest.mark.parametrize("name", ["8 directions", "local windows", "strided", "one call per direction", "index tables"])
def test_layer_norm_behind_any_walk_annihilates(name):
    model, x = build(name, after=nn.LayerNorm(6), depth=1), zoo.images(3)
    gm = vmeanba_fx.capture(model, x)
    sites = vmeanba_fx.find_sites(gm)
    assert all(site.annihilated for site in sites)
    replaced = vmeanba_fx.transform(gm, [x], k=len(sites))
    with torch.no_grad():
        assert relative_error(replaced(x), build(name, after=nn.LayerNorm(6), depth=1, call=paper)(x)) <= 1e-5
    assert not any("scan" in str(node.target) for node in replaced.graph.nodes)


@pytest.mark.parametrize("name", ["video", "sequence"])
def test_maps_that_are_no_images_are_fused(name):
    model, x = build(name, depth=1), zoo.images(3)
    plan = vmeanba_fx.calibrate(model, [x], reduce="rank", rank=2, score_sites=False)
    fused, plain = plan.apply(sites="*"), plan.apply(sites="*", skip_passes="fuse_shared")
    operators = [{str(node.target) for node in gm.graph.nodes} for gm in (plan.apply(k=0), fused, plain)]
    assert ["vmeanba_fx.shared_scan2d.default" in found for found in operators] == [False, True, False]
    assert "vmeanba_fx.ss2d.default" in operators[0]
    with torch.no_grad():
        for batch in (1, 5):
            assert relative_error(fused(zoo.images(batch)), plain(zoo.images(batch))) <= 1e-5


def test_scans_without_a_sum_to_be_left_out_of_read_zeros():
    """No ``D*u``, and the merge writes into a buffer: what the LayerNorm absorbs is neither computed nor missed."""
    model, x = build("strided", after=nn.LayerNorm(6), depth=1, call=without_skip), zoo.images(3)
    gm = vmeanba_fx.capture(model, x)
    assert [site.annihilated for site in vmeanba_fx.find_sites(gm)] == [True]
    replaced = vmeanba_fx.transform(gm, [x], k=1)
    assert not any("scan" in str(node.target) for node in replaced.graph.nodes)
    expected = build("strided", after=nn.LayerNorm(6), depth=1, call=lambda u, *_: torch.zeros_like(u))
    with torch.no_grad():
        for batch in (1, 3):
            assert relative_error(replaced(zoo.images(batch)), expected(zoo.images(batch))) <= 1e-5


def test_the_callers_model_keeps_its_own_state():
    model = build("state kept", depth=1)
    vmeanba_fx.capture(model, zoo.images(3))
    assert model.blocks[0].op.kept is None and model.blocks[0].op.last is None
