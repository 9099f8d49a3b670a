"""Partial runs of a captured graph: what they keep, and that they equal whole ones."""

import torch

import vmeanba_fx
from tests.helpers import make_scan_matter
from vmeanba_fx import models
from vmeanba_fx.calibration.execute import Executor
from vmeanba_fx.graph import scan_nodes


def test_little_is_kept_and_partial_runs_equal_whole_ones():
    model = make_scan_matter(models.vmamba_digits()).eval()
    images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    gm = vmeanba_fx.capture(model, (images,))
    scans = [node for _, node in scan_nodes(gm)]
    everything = Executor(gm, scans, keep=scans)
    with torch.no_grad():
        _, whole = everything.run(images)
        executor = Executor(gm, scans)
        base, state = executor.run(images)
        torch.testing.assert_close(base, model(images))
        for scan in scans:
            torch.testing.assert_close(executor.rerun(state, {scan: whole.value(scan)}), base)
        zeros = {scan: torch.zeros_like(whole.value(scan)) for scan in scans}
        one_by_one = [executor.rerun(state, {scan: zeros[scan]}) for scan in scans]
        torch.testing.assert_close(executor.rerun(state, dict(list(zeros.items())[-1:])), one_by_one[-1])
        assert all(not torch.allclose(outputs, base, rtol=1e-3) for outputs in one_by_one)
    weights = {t.untyped_storage().data_ptr() for t in (*gm.parameters(), *gm.buffers())}
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.env.values() if torch.is_tensor(t)}
    kept = sum(size for place, size in held.items() if place not in weights | {images.untyped_storage().data_ptr()})
    # The residual stream in front of each block: 4 of 24 channels on 8x8, 4 of 40 on 4x4, and an odd patch embedding.
    assert kept <= 4 * 4 * (4 * 24 * 64 + 4 * 40 * 16) + 4 * 4 * 24 * 64
