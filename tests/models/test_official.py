"""Our VMamba against the official file: same keys, same outputs."""

import pytest
import torch

from tests.helpers import make_scan_matter, relative_error, without_scans
from tests.official import load_official
from vmeanba_fx import models

SMALL = dict(depths=[1, 2], dims=16, num_classes=7, ssm_d_state=2)
SMALL_OUTPUT = {"onsoftmax": 100.0, "onsigmoid": 10.0}  # these shrink the scan: let out_proj make up for it
V0 = dict(forward_type="v0", norm_layer="ln", downsample_version="v1", mlp_ratio=0.0)
V2 = dict(norm_layer="ln2d", downsample_version="v3", patchembed_version="v2")
CONFIGS = {
    "v0": V0,
    "v0 N=16, mlp": dict(V0, ssm_d_state=16, mlp_ratio=2.0),
    "v0seq": dict(V0, forward_type="v0seq", downsample_version="v2"),
    "v05_noz N=1": dict(V2, forward_type="v05_noz", ssm_d_state=1, ssm_ratio=1.0, ssm_conv_bias=False),
    "v05 N=16": dict(V2, forward_type="v05", ssm_d_state=16),
    "channel-last": dict(V2, forward_type="v05", norm_layer="ln"),
    "no conv, patch merging": dict(V2, forward_type="v05", ssm_conv=-1, downsample_version="v1"),
    "no norm, other acts": dict(
        V2, forward_type="v05", patch_norm=False, ssm_act_layer="relu", mlp_act_layer="silu", ssm_init="v1"
    ),
    "position embedding": dict(
        V2, forward_type="v05_noz", posembed=True, imgsize=32, patchembed_version="v1", downsample_version="v2"
    ),
    **{f"{tag} last": dict(V2, forward_type=tag, norm_layer="ln") for tag in ("v05_onsoftmax_noz", "v05_oncnorm")},
    **{
        tag: dict(V2, forward_type=tag)
        for tag in (
            "v01", "v02_no32", "v03", "v04", "v3", "v051d_noz", "v052d", "v05_nozact", "v05_noz_oact", "v05_onnone",
            "v05_ondwconv3_noz", "v05_oncnorm_noz", "v05_onsoftmax", "v05_onsigmoid_noz",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_keys_equal(name):
    official = load_official()
    config = {**SMALL, **CONFIGS[name]}
    gain = next((g for tag, g in SMALL_OUTPUT.items() if tag in config["forward_type"]), 3.0)
    theirs = make_scan_matter(official.VSSM(**config), out_gain=gain).eval()
    ours = models.VSSM(**config).eval()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual, skipped = theirs(x), ours(x), without_scans(ours)(x)
    assert relative_error(skipped, expected) > 0.1, "the scan does not matter here: the comparison would be vacuous"
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-6 * expected.abs().max().item())


@pytest.mark.parametrize("norm_layer", ["ln", "ln2d"])
@pytest.mark.parametrize("size", [(64, 64), (50, 70)])
def test_backbone_equals(norm_layer, size):
    official = load_official()
    config = {**SMALL, **V2, "forward_type": "v05", "norm_layer": norm_layer, "out_indices": (0, 1)}
    theirs = make_scan_matter(official.Backbone_VSSM(**config)).eval()
    ours = models.Backbone(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for actual, expected in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=3e-6 * expected.abs().max().item())


FACTORIES = [n for n in models.__all__ if n.startswith("vanilla_") or "_s1l" in n or "_s2l" in n]


@pytest.mark.parametrize("name", FACTORIES)
def test_every_official_factory_has_the_same_keys(name, monkeypatch):
    official = load_official()
    monkeypatch.setattr(official, "trunc_normal_", lambda tensor, std: tensor)  # values do not matter here
    theirs = getattr(official, name)()
    with torch.device("meta"):
        ours = getattr(models, name)()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
