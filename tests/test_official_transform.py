"""``transform`` on the official, unmodified VMamba against the paper's block patched into the eager model.

Skipped unless VMEANBA_OFFICIAL_VMAMBA says where vmamba.py of github.com/MzeroMiko/VMamba lies.
"""

import pytest
import torch

import vmeanba_fx
from tests.helpers import make_scan_matter, relative_error, without_scans
from tests.official import load_official
from tests.paper_block import paper_block

BASE = {"depths": [1, 2], "dims": 16, "patch_size": 4, "in_chans": 3, "num_classes": 10, "imgsize": 32}
V0 = BASE | {
    "ssm_d_state": 16, "forward_type": "v0", "norm_layer": "ln", "downsample_version": "v1", "patchembed_version": "v1",
    "mlp_ratio": 0.0,
}  # fmt: skip
V05 = BASE | {"norm_layer": "ln2d", "downsample_version": "v3", "patchembed_version": "v2", "ssm_conv_bias": False}
CONFIGS = {
    "v0": V0,
    "v05 with z": V05 | {"ssm_d_state": 4, "forward_type": "v05"},
    "v05 channels last": V05 | {"ssm_d_state": 1, "forward_type": "v05_noz", "norm_layer": "ln"},
    # Without the norm behind the scan the block's own numbers reach the output: all sites live.
    "v05 without norm": V05 | {"ssm_d_state": 4, "forward_type": "v05_onnone"},
}


def patched(official, model, chosen, x, mean="direction"):
    """Output of the eager model, its scan function replaced by the paper's block at the calls ``chosen``; and the calls."""
    original, calls = official.selective_scan_fn, []

    def scan(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, oflex=True, backend=None):
        calls.append(u.shape)
        if len(calls) - 1 not in chosen:
            return original(u, delta, A, B, C, D, delta_bias, delta_softplus, oflex, backend)
        return paper_block(u, delta, A, B, C, D, None, delta_bias, delta_softplus, mean=mean)

    official.selective_scan_fn = scan
    try:
        with torch.no_grad():
            return model(x), len(calls)
    finally:
        official.selective_scan_fn = original


def images(batch, size):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def check(official, model, k, size, tmp_path, mean="direction"):
    """``transform(k=k)`` against the patched model for batch 1, 2 and 5, exported and read back as well."""
    gm = vmeanba_fx.transform(model, [images(4, size)], k=k, metric="kl", mean=mean)
    sites = [s.name for s in vmeanba_fx.find_sites(vmeanba_fx.capture(model, images(2, size)))]
    chosen = {sites.index(name) for name in vmeanba_fx.report(gm).chosen}
    assert len(chosen) == k
    program = torch.export.export(gm, (images(3, size),), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        for batch in (1, 2, 5):
            x = images(batch, size)
            expected, calls = patched(official, model, chosen, x, mean)
            assert calls == len(sites)
            found = gm(x)
            assert relative_error(found, expected) <= 1e-4
            assert relative_error(loaded(x), found) <= 1e-6
            if k:
                assert relative_error(model(x), expected) > 0.02, "the rewrite changes nothing: a vacuous comparison"
    return sites


@pytest.mark.parametrize("name", CONFIGS)
def test_transform_equals_the_patched_model(name, tmp_path):
    official = load_official()
    model = make_scan_matter(official.VSSM(**CONFIGS[name])).eval()
    x = images(2, 32)
    with torch.no_grad():
        assert relative_error(without_scans(model)(x), model(x)) > 0.1
    sites = check(official, model, 3, 32, tmp_path)
    assert sites == ["layers.0.blocks.0.op", "layers.1.blocks.0.op", "layers.1.blocks.1.op"]
    check(official, model, 2, 32, tmp_path)


@pytest.mark.parametrize("mean", ["all", "input"])
def test_other_means(mean, tmp_path):
    official = load_official()
    model = make_scan_matter(official.VSSM(**CONFIGS["v05 without norm"])).eval()
    check(official, model, 3, 32, tmp_path, mean)


def test_verdicts():
    official = load_official()
    for name, config in CONFIGS.items():
        sites = vmeanba_fx.find_sites(vmeanba_fx.capture(official.VSSM(**config).eval(), images(2, 32)))
        assert len(sites) == 3 and all(s.skip and s.annihilated == (name != "v05 without norm") for s in sites)
        assert {s.groups for s in sites} == {4} and {s.length for s in sites} == {64, 16}


@pytest.mark.slow
def test_vmamba_tiny(tmp_path):
    official = load_official()
    model = make_scan_matter(official.vmamba_tiny_s1l8()).eval()
    sites = check(official, model, 14, 224, tmp_path)
    assert len(sites) == 14 and sites[0] == "layers.0.blocks.0.op" and sites[-1] == "layers.3.blocks.1.op"
