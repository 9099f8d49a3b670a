"""The 2-D ops as compositions on any device: read the maps in scan order, scan, put the result back in place.

All work through the batch in blocks, `ss2d` and its backward through the channels as well, so that the K copies of the map
that the scan order needs stay small.
"""

import torch
from torch import Tensor

from . import checks, cpu_jit
from .cpu import compute_dtype
from .directions import ScanOrder
from .library import LIBRARY, empty_map
from .tiles import blocks

_ops = torch.ops.vmeanba_fx

# Elements of one tensor in scan order, (batch block, K, channels, L).
_BUDGET = 1 << 20
_BACKWARD_BUDGET = 1 << 17  # about a dozen such tensors are in use; larger ones are no faster


def shared_scan2d(u, delta, A, B, C, delta_bias, directions, order, delta_softplus, merge, out_dtype=None):
    """u (B, 1 or K, R, H, W); delta (B, K, H, W); B, C (B, K, N, H, W). Returns (B, R, H, W) or (B, K, R, H, W)."""
    checks.check_shared_scan2d(u, delta, A, B, C, delta_bias, directions, order, out_dtype)
    if cpu_jit.usable(u, delta, A, B, C, delta_bias):
        arguments = delta_bias, directions, order, delta_softplus, merge, out_dtype or u.dtype
        return cpu_jit.shared_scan2d(u, delta, A, B, C, *arguments)
    batch, _, R, height, width = u.shape
    K, dtype = delta.shape[1], compute_dtype(u)
    scan_order = ScanOrder(directions, order, height, width)
    shape = (batch, R, height, width) if merge else (batch, K, R, height, width)
    out = torch.empty(shape, dtype=out_dtype or u.dtype, device=u.device)
    for now in _batch_blocks(batch, K * (R + 2 * A.shape[1]) * height * width, _BUDGET):
        inputs = (_read(scan_order, maps[now], dtype) for maps in (u, delta[:, :, None], B, C))
        u_rows, delta_rows, B_rows, C_rows = inputs
        y = _ops.shared_scan.default(u_rows, delta_rows[:, :, 0], A, B_rows, C_rows, delta_bias, delta_softplus, dtype)
        if merge:
            out[now] = _merged(scan_order, y)
        else:
            _put_back(scan_order, y, out[now])
    return out


def shared_scan2d_backward(grad, u, delta, A, B, C, delta_bias, directions, order, delta_softplus, merge):
    """Gradients of `shared_scan2d` for u, delta, A, B, C and delta_bias."""
    batch, u_groups, R, height, width = u.shape
    K, dtype, cost = delta.shape[1], compute_dtype(u), (R + 2 * A.shape[1]) * height * width
    du, ddelta, dB, dC = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, delta, B, C))
    dA, bias = torch.zeros(A.shape, dtype=dtype, device=A.device), None if delta_bias is None else delta_bias.to(dtype)
    dbias = torch.zeros(0 if bias is None else K, dtype=dtype, device=A.device)
    for now in _batch_blocks(batch, K * cost, _BUDGET):
        du_sum = None if u_groups == K else torch.zeros(u[now, 0].shape, dtype=dtype, device=u.device)
        for some in blocks(K, max(1, _BUDGET // cost)):
            scan_order = ScanOrder(directions[some], None if order is None else order[some], height, width)
            own = some if u_groups == K else slice(0, 1)
            inputs = u[now, own], delta[now, some, None], B[now, some], C[now, some]
            u_rows, delta_rows, B_rows, C_rows = (_read(scan_order, maps, dtype) for maps in inputs)
            dy = _read(scan_order, grad[now, None] if merge else grad[now, some], dtype)
            shift = None if bias is None else bias[some]
            arguments = dy, u_rows, delta_rows[:, :, 0], A[some].to(dtype), B_rows, C_rows, shift, delta_softplus
            du_rows, ddelta_rows, dA_now, dB_rows, dC_rows, dbias_now = _ops.shared_scan_backward.default(*arguments)
            dA[some] += dA_now
            if bias is not None:
                dbias[some] += dbias_now
            for rows, maps in ((ddelta_rows, ddelta), (dB_rows, dB), (dC_rows, dC)):
                _put_back(scan_order, rows, maps[now, some])
            if du_sum is None:
                _put_back(scan_order, du_rows, du[now, some])
            else:
                du_sum += _merged(scan_order, du_rows)
        if du_sum is not None:
            du[now, 0] = du_sum
    return du, ddelta, dA.to(A.dtype), dB, dC, dbias.to((A if delta_bias is None else delta_bias).dtype)


def ss2d(x, feats, dt_weight, A, D, delta_bias, directions, order, delta_softplus, out_dtype=None):
    """x (B, D, H, W); feats (B, K, R + 2N, H, W); dt_weight (K, D, R); A (K*D, N). Returns (B, D, H, W)."""
    checks.check_ss2d(x, feats, dt_weight, A, D, delta_bias, directions, order, out_dtype)
    out = empty_map(x, out_dtype or x.dtype)
    if cpu_jit.usable(x, feats, dt_weight, A, D, delta_bias):
        cpu_jit.ss2d(x, feats, dt_weight, A, D, delta_bias, directions, order, delta_softplus, out)
        return out
    batch, channels, height, width = x.shape
    K, dtype = feats.shape[1], compute_dtype(x)
    scan_order = ScanOrder(directions, order, height, width)
    A, bias = A.unflatten(0, (K, channels)), None if delta_bias is None else delta_bias.unflatten(0, (K, channels))
    for now in _batch_blocks(batch, K * channels * height * width, _BUDGET):
        features = _read(scan_order, feats[now], dtype)
        for some in _channel_blocks(x, K, _BUDGET):
            inputs = _ss2d_inputs(x[now, some], features, dt_weight[:, some], A[:, some], scan_order)
            shift = None if bias is None else bias[:, some].flatten()
            y = _ops.selective_scan.default(*inputs, None, None, shift, delta_softplus, dtype)
            total = _merged(scan_order, y.unflatten(1, (K, -1)))
            out[now, some] = total if D is None else total.addcmul_(x[now, some].to(dtype), D[some, None, None].to(dtype))
    return out


def ss2d_backward(grad, x, feats, dt_weight, A, D, delta_bias, directions, order, delta_softplus):
    """Gradients of `ss2d` for x, feats, dt_weight, A, D and delta_bias."""
    batch, channels, height, width = x.shape
    K, R, N, dtype = feats.shape[1], dt_weight.shape[2], A.shape[1], compute_dtype(x)
    scan_order = ScanOrder(directions, order, height, width)
    dx, dfeats = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, feats))
    decay, weight = A.to(dtype).unflatten(0, (K, channels)), dt_weight.to(dtype)
    bias = None if delta_bias is None else delta_bias.to(dtype).unflatten(0, (K, channels))
    dweight, dA = torch.zeros_like(weight), torch.zeros_like(decay)
    dD = torch.zeros(0 if D is None else channels, dtype=dtype, device=x.device)
    dbias = torch.zeros((0, 0) if delta_bias is None else (K, channels), dtype=dtype, device=x.device)
    for now in _batch_blocks(batch, K * channels * height * width, _BACKWARD_BUDGET):
        features = _read(scan_order, feats[now], dtype)
        dfeatures = torch.zeros_like(features)
        for some in _channel_blocks(x, K, _BACKWARD_BUDGET):
            inputs = _ss2d_inputs(x[now, some], features, weight[:, some], decay[:, some], scan_order)
            g = grad[now, some].to(dtype)
            dy = _read(scan_order, g[:, None], dtype).flatten(1, 2)
            shift = None if bias is None else bias[:, some].flatten()
            grads = _ops.selective_scan_backward.default(dy, *inputs, None, None, shift, delta_softplus)
            du, ddelta, dA_now, dB, dC, _, _, dbias_now = grads
            du, ddelta = du.unflatten(1, (K, -1)), ddelta.unflatten(1, (K, -1))
            dA[:, some] += dA_now.unflatten(0, (K, -1))
            if bias is not None:
                dbias[:, some] += dbias_now.unflatten(0, (K, -1))
            dweight[:, some] += torch.matmul(ddelta, features[:, :, :R].transpose(2, 3)).sum(0)
            dfeatures[:, :, :R] += torch.matmul(weight[:, some].transpose(1, 2), ddelta)
            dfeatures[:, :, R : R + N] += dB
            dfeatures[:, :, R + N :] += dC
            dx_now = _merged(scan_order, du)
            if D is not None:
                dD[some] += (g * x[now, some].to(dtype)).sum((0, 2, 3))
                dx_now = dx_now.addcmul(g, D[some, None, None].to(dtype))
            dx[now, some] = dx_now
        _put_back(scan_order, dfeatures, dfeats[now])
    return (
        dx,
        dfeats,
        dweight.to(dt_weight.dtype),
        dA.flatten(0, 1).to(A.dtype),
        dD.to((x if D is None else D).dtype),
        dbias.flatten().to((x if delta_bias is None else delta_bias).dtype),
    )


def _ss2d_inputs(x, features, dt_weight, A, scan_order: ScanOrder) -> tuple[Tensor, ...]:
    """(u, delta, A, B, C) of the scan, of some channels: features (B, K, R + 2N, L) in scan order, A (K, D, N)."""
    R, N = dt_weight.shape[2], A.shape[2]
    u = _read(scan_order, x[:, None], features.dtype).flatten(1, 2)
    delta = torch.matmul(dt_weight.to(features.dtype), features[:, :, :R]).flatten(1, 2)
    return u, delta, A.flatten(0, 1), features[:, :, R : R + N], features[:, :, R + N :]


def _read(scan_order: ScanOrder, maps: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1 or K, C, H, W) -> (B, K, C, L) in `dtype`."""
    length = scan_order.height * scan_order.width
    rows = torch.empty(len(maps), scan_order.count, maps.shape[2], length, dtype=dtype, device=maps.device)
    for k, row in enumerate(scan_order.rows_of(maps)):
        rows[:, k] = row
    return rows


def _put_back(scan_order: ScanOrder, rows: Tensor, maps: Tensor) -> None:
    """(B, K, C, L) in scan order -> `maps`, (B, K, C, H, W), in spatial order."""
    for k in range(rows.shape[1]):
        maps[:, k] = scan_order.put_back(rows[:, k], k)


def _merged(scan_order: ScanOrder, rows: Tensor) -> Tensor:
    """(B, K, C, L) in scan order -> the sum over directions (B, C, H, W) in spatial order."""
    total = scan_order.put_back(rows[:, 0], 0).contiguous()
    for k in range(1, rows.shape[1]):
        total += scan_order.put_back(rows[:, k], k)
    return total


def _batch_blocks(batch: int, cost: int, budget: int):
    return blocks(batch, max(1, budget // max(1, cost)))


def _channel_blocks(x: Tensor, K: int, budget: int):
    return blocks(x.shape[1], max(1, budget // (K * x.shape[2] * x.shape[3])))


for _op in (shared_scan2d, shared_scan2d_backward, ss2d, ss2d_backward):
    LIBRARY.impl(_op.__name__, _op, "CompositeExplicitAutograd")
