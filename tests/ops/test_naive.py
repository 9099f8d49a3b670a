"""The reference itself, against sums written out without any recurrence."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops import problems
from vmeanba_fx.ops import naive


def explicit_scan(dt, u, A, B, C):
    """y_t = sum over s <= t of <C_t, exp(A (dt_{s+1} + ... + dt_t)) B_s> dt_s u_s for one channel; B, C (N, L)."""
    length = u.shape[0]
    y = []
    for t in range(length):
        terms = [
            (C[:, t] * torch.exp(A * dt[s + 1 : t + 1].sum()) * B[:, s]).sum() * dt[s] * u[s] for s in range(t + 1)
        ]
        y.append(sum(terms))
    return torch.stack(y)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_selective_scan(length):
    x = problems.selective_scan(2, 2, 3, 2, length)
    y = naive.selective_scan(**x)
    for item in range(2):
        for channel in range(6):
            dt = F.softplus(x["delta"][item, channel] + x["delta_bias"][channel])
            u, z, k = x["u"][item, channel], x["z"][item, channel], channel // 3
            scan = explicit_scan(dt, u, x["A"][channel], x["B"][item, k], x["C"][item, k])
            expected = (scan + x["D"][channel] * u) * z * torch.sigmoid(z)
            torch.testing.assert_close(y[item, channel], expected)


def test_shared_scan_is_a_scan_with_one_step_and_decay_for_all_channels():
    x = problems.shared_scan(2, 2, 3, 2, 9)
    u, delta, A, B, C, bias, softplus = x.values()
    wide = naive.selective_scan(
        u.flatten(1, 2),
        delta.repeat_interleave(3, 1),
        A.repeat_interleave(3, 0),
        B,
        C,
        delta_bias=bias.repeat_interleave(3),
        delta_softplus=softplus,
    )
    torch.testing.assert_close(naive.shared_scan(**x).flatten(1, 2), wide)


def test_linear_scan_is_the_discretised_shared_scan():
    x = problems.shared_scan(2, 2, 3, 2, 9)
    dt = F.softplus(x["delta"] + x["delta_bias"][:, None])
    a = torch.exp(dt[:, :, None] * x["A"][..., None])
    b = dt[:, :, None, None] * x["B"][:, :, None] * x["u"][:, :, :, None]
    torch.testing.assert_close(naive.linear_scan(a, b, x["C"]), naive.shared_scan(**x))


def test_maps_in_row_order_are_sequences():
    x = problems.shared_scan2d(2, [0], 3, 2, 3, 4)
    del x["directions"], x["order"], x["merge"]
    sequences = {name: v.flatten(-2) if name in ("u", "delta", "B", "C") else v for name, v in x.items()}
    expected = naive.shared_scan(**sequences)[:, 0].unflatten(-1, (3, 4))
    torch.testing.assert_close(naive.shared_scan2d(**x, directions=[0], order=None, merge=True), expected)


def test_ss2d_is_projection_scan_and_skip():
    x = problems.ss2d(2, [0], 3, 2, 2, 3, 4)
    rows = x["feats"][:, 0].flatten(-2)
    expected = naive.selective_scan(
        x["x"].flatten(-2),
        x["dt_weight"][0] @ rows[:, :2],
        x["A"],
        rows[:, None, 2:4],
        rows[:, None, 4:],
        x["D"],
        None,
        x["delta_bias"],
        True,
    )
    torch.testing.assert_close(naive.ss2d(**x), expected.unflatten(-1, (3, 4)))
