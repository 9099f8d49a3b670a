"""The exact passes on the official, unmodified VMamba, at odd heights and widths, in all its scan and norm variants.

In float32: its scan returns float32 whatever comes in. tests/passes/test_exact_passes.py has the same variants in float64.
Skipped unless VMEANBA_OFFICIAL_VMAMBA says where vmamba.py of github.com/MzeroMiko/VMamba lies.
"""

import pytest
import torch

import vmeanba_fx
from tests.helpers import make_scan_matter, relative_error
from tests.official import load_official
from tests.passes.cases import EXACT, OURS, targets
from vmeanba_fx.errors import CaptureError

BASE = {"depths": [1, 1], "dims": 12, "patch_size": 4, "in_chans": 3, "num_classes": 5, "imgsize": 32}
V05 = BASE | {
    "norm_layer": "ln2d", "downsample_version": "v3", "patchembed_version": "v2", "ssm_conv_bias": False, "ssm_d_state": 1,
    "ssm_ratio": 1.0,
}  # fmt: skip
V0 = BASE | {
    "norm_layer": "ln", "downsample_version": "v1", "patchembed_version": "v1", "mlp_ratio": 0.0, "ssm_d_state": 4,
    "forward_type": "v0",
}  # fmt: skip
VARIANTS = {
    "s1l8": V05 | {"forward_type": "v05_noz"},
    "v0": V0,
    "v0seq": V0 | {"forward_type": "v0seq"},
    "z": V05 | {"forward_type": "v05", "ssm_d_state": 3},
    "channels last": V05 | {"forward_type": "v05_noz", "norm_layer": "ln"},
    "onnone": V05 | {"forward_type": "v05_onnone_noz"},
    "ondwconv3": V05 | {"forward_type": "v05_ondwconv3_noz"},
    "onsoftmax": V05 | {"forward_type": "v05_onsoftmax_noz"},
    "unidi": V05 | {"forward_type": "v051d_noz"},
    "bidi": V05 | {"forward_type": "v052d_noz"},
}
# The official v0 pads and merges by parity.
SIZES = {"v0": (32, 64), "v0seq": (32, 64)}


@pytest.mark.parametrize("name", VARIANTS)
def test_lossless_and_fully_replaced(name):
    official = load_official()
    model = make_scan_matter(official.VSSM(**VARIANTS[name])).eval()
    x = torch.randn(2, 3, *SIZES.get(name, (28, 44)), generator=torch.Generator().manual_seed(0))
    plan = vmeanba_fx.calibrate(model, [x], score_sites=False)
    n = len(plan.sites)
    lossless, replaced = plan.apply(0), plan.apply(n)
    with torch.no_grad():
        expected, literal = model(x), plan.apply(n, skip_passes=EXACT)(x)
        assert relative_error(lossless(x), expected) < 1e-5
        assert relative_error(replaced(x), literal) < 1e-5
        assert relative_error(literal, expected) > 0.02, "the scans do not matter here, so equality proves nothing"
    # v0seq: each direction is a call of its own, and the four of a block become one op.
    assert targets(lossless).count(OURS.ss2d.default) == (n // 4 if name == "v0seq" else n)
    if name not in ("onnone", "ondwconv3", "onsoftmax"):
        assert not [t for t in targets(replaced) if "aten" not in str(t) and "getitem" not in str(t)]


def test_cascade2d_does_not_run():
    """The official file fails by itself in this variant; the error names the model's own exception."""
    official = load_official()
    model = official.VSSM(**V05 | {"forward_type": "v052dc_noz"}).eval()
    with pytest.raises(UnboundLocalError):
        model(torch.randn(2, 3, 32, 32))
    with pytest.raises(CaptureError, match="UnboundLocalError"):
        vmeanba_fx.capture(model, torch.randn(2, 3, 32, 32))
