"""Whatever stands around a scan, exact passes change nothing: random shapes and orders, with the pattern and near misses."""

import functools

import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import vmeanba_fx
from tests.helpers import relative_error
from tests.passes.cases import EXACT, OURS, Walks, targets
from vmeanba_fx.ops.directions import direction_table

TAILS = {
    "nothing": lambda y: y,
    "LayerNorm over the channels": lambda y: F.layer_norm(y.transpose(1, 2), (y.shape[1],)),
    "LayerNorm over the positions": lambda y: F.layer_norm(y, (y.shape[2],)),
    "LayerNorm over both": lambda y: F.layer_norm(y, tuple(y.shape[1:])),
    "RMSNorm": lambda y: F.rms_norm(y.transpose(1, 2), (y.shape[1],)),
    "gate before the norm": lambda y: F.layer_norm((y * torch.sigmoid(y)).transpose(1, 2), (y.shape[1],)),
    "a second reader": lambda y: F.layer_norm(y.transpose(1, 2), (y.shape[1],)) + y.transpose(1, 2).tanh(),
}


class Tailed(Walks):
    def __init__(self, tail, *args):
        super().__init__(*args)
        self.tail = tail

    def merge(self, y):
        return TAILS[self.tail](super().merge(y))


@settings(max_examples=14, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    height=st.integers(2, 4), width=st.integers(2, 5), channels=st.integers(3, 6), state=st.integers(1, 2),
    codes=st.lists(st.integers(0, 7), min_size=1, max_size=4), tail=st.sampled_from(sorted(TAILS)),
    mean=st.sampled_from(["direction", "all", "input"]), last=st.booleans(),
)  # fmt: skip
def test_exact_around_every_tail(height, width, channels, state, codes, tail, mean, last):
    model = Tailed(tail, direction_table(codes, height, width), channels, state, last).double()
    shape = (2, height, width, channels) if last else (2, channels, height, width)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(tail)))
    plan = vmeanba_fx.calibrate(model, [x], score_sites=False, mean=mean)
    kept, replaced = plan.apply(0), plan.apply(1)
    with torch.no_grad():
        assert relative_error(kept(x), model(x)) < 1e-12
        literal = plan.apply(1, skip_passes=EXACT)(x)
        assert relative_error(replaced(x), literal) < 1e-11
    annihilated = tail in ("LayerNorm over the channels",) and channels > 1
    scans = (OURS.linear_scan.default, OURS.shared_scan2d.default, OURS.shared_scan.default)
    assert any(t in scans for t in targets(replaced)) is not annihilated


def test_an_observer_hook_keeps_its_scan():
    """A hook that reads the scan's output is a second reader: nothing may be dropped or fused away from it."""
    model = Tailed("LayerNorm over the channels", direction_table([0, 2], 3, 4), 5, 2).double()
    seen = []
    merge = model.merge
    model.merge = functools.wraps(merge)(lambda y: (seen.append(1), merge(y) + 0.0 * y.square().mean())[1])
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = vmeanba_fx.calibrate(model, [x], score_sites=False)
    gm = plan.apply(0)
    assert seen and vmeanba_fx.report(gm).unfused
    assert OURS.linear_scan.default in targets(plan.apply(1)), "its reader still gets the block's own numbers"
    with torch.no_grad():
        assert relative_error(gm(x), model(x)) < 1e-12
