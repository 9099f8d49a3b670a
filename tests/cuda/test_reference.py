"""The float64 reference of these tests against the plain loops."""

import reference
import torch

from vmeanba_fx.ops import naive
from vmeanba_fx.ops.directions import direction_table


def test_against_the_loops():
    u, delta, A, B, C, D, z, bias = (t.double() for t in reference.scan_inputs(2, 2, 3, 3, 37, torch.float64))
    expected = naive.selective_scan(u, delta, A, B, C, D, z, bias, True)
    reference.assert_near(reference.selective_scan(u, delta, A, B, C, D, z, bias, True), expected, 1e-12)
    x, step, read = (reference.normal(2, 4, n, 5, 7, dtype=torch.float64) for n in (2, 1, 3))
    A = -torch.rand(4, 3, device="cuda", dtype=torch.float64)
    arguments = (x[:, :1], step.squeeze(2), A, read, read.flip(1), A[:, 0])
    expected = naive.shared_scan2d(*arguments, [0, 1, 6, 7], None, True, True)
    table = direction_table([0, 1, 6, 7], 5, 7)
    reference.assert_near(reference.shared_scan2d(*arguments, table, True, True), expected, 1e-12)
    a, b = torch.rand(2, 3, 2, 20, device="cuda").double(), reference.normal(2, 3, 4, 2, 20, dtype=torch.float64)
    reference.assert_near(reference.linear_scan(a, b, a), naive.linear_scan(a, b, a), 1e-12)
