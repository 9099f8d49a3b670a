"""Gradients of the scans in vectorised PyTorch, on any device.

With dt = softplus?(delta + bias), a = exp(dt A), b = dt B u, h_t = a_t h_{t-1} + b_t and y = <C, h>, the gradient of h
is the same recurrence backwards in time,

    g_t = C_t dy_t + a_{t+1} g_{t+1}

and everything else is products summed over the dims an input lacks. States are recomputed, not stored.
"""

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from .cpu import compute_dtype, discretise, part, step_size
from .library import LIBRARY
from .recurrence import scan_rows
from .tiles import tiles

# Elements of one work-space tensor (B, K, D, N, L); about eight are in use.
_BUDGET = 1 << 18


def selective_scan_backward(grad, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """Gradients for u, delta, A, B, C, D, z, delta_bias: of the input's shape and dtype, (0,) where it was None."""
    K = B.shape[1]

    def grouped(tensor: Tensor | None, dim: int) -> Tensor | None:
        return None if tensor is None else tensor.unflatten(dim, (K, -1))

    scan = grouped(u, 1), grouped(delta, 1), grouped(A, 0), B, C
    options = grouped(D, 0), grouped(z, 1), grouped(delta_bias, 0), delta_softplus
    du, ddelta, dA, dB, dC, dD, dz, dbias = _scan_backward(grouped(grad, 1), *scan, *options)
    dz = dz if z is None else dz.flatten(1, 2)
    return du.flatten(1, 2), ddelta.flatten(1, 2), dA.flatten(0, 1), dB, dC, dD.flatten(), dz, dbias.flatten()


def shared_scan_backward(grad, u, delta, A, B, C, delta_bias, delta_softplus):
    """Gradients for u, delta, A, B, C and delta_bias."""
    bias = None if delta_bias is None else delta_bias[:, None]
    inputs = u, delta[:, :, None], A[:, None], B, C, None, None, bias, delta_softplus
    du, ddelta, dA, dB, dC, _, _, dbias = _scan_backward(grad, *inputs)
    return du, ddelta[:, :, 0], dA[:, 0], dB, dC, dbias.flatten()


def linear_scan_backward(grad, a, b, C):
    """Gradients for a, b and C."""
    dtype = compute_dtype(a)
    da, db, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (a, b, C))
    batch, K, R, N, length = b.shape
    for item, group, cut in _by_group(batch, K, R, N * length):
        decay, read = a[item, group, None].to(dtype), C[item, group].to(dtype)
        da_now, dC_now = torch.zeros_like(decay[:, :, 0]), torch.zeros_like(read)
        for channel in cut:
            dy = grad[item, group, channel].to(dtype)
            h = scan_rows(decay, b[item, group, channel].to(dtype))
            g = _state_gradient(decay, read, dy)
            db[item, group, channel] = g
            dC_now += (h * dy[:, :, :, None]).sum(2)
            da_now += _decay_gradient(g, h, own_decay=False)[:, :, 0]
        da[item, group], dC[item, group] = da_now, dC_now
    return da, db, dC


def _scan_backward(grad, u, delta, A, B, C, D, z, bias, softplus):
    """u, z, grad (B, K, D, L); delta (B, K, D|1, L); A (K, D|1, N); B, C (B, K, N, L); D (K, D); bias (K, D|1)."""
    batch, K, channels, length = u.shape
    dtype, own_decay = compute_dtype(u), delta.shape[2] == channels

    def like(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        shape = 0 if tensor is None else tensor.shape
        return torch.zeros(shape, dtype=dtype or (u if tensor is None else tensor).dtype, device=u.device)

    du, ddelta, dB, dC, dz = (like(t) for t in (u, delta, B, C, z))
    dA, dD, dbias = (like(t, dtype) for t in (A, D, bias))

    for item, group, cut in _by_group(batch, K, channels, A.shape[2] * length):
        drive, read = B[item, group].to(dtype), C[item, group].to(dtype)
        dB_now, dC_now = torch.zeros_like(drive), torch.zeros_like(read)
        ddt_now = None if own_decay else like(delta[item, group], dtype)
        for channel in cut:
            own = channel if own_decay else slice(None)
            x = u[item, group, channel].to(dtype)
            dt = step_size(delta[item, group, own], part(bias, group, own), softplus, u)
            dy = grad[item, group, channel].to(dtype)
            a, b = discretise(dt, x, A[group, own], drive)
            h = scan_rows(a, b)
            skip = None if D is None else D[group, channel, None].to(dtype)

            if z is not None:
                gate = z[item, group, channel].to(dtype)
                sigmoid = torch.sigmoid(gate)
                y = (h * read[:, :, None]).sum(3)
                if skip is not None:
                    y.addcmul_(x, skip)
                dz[item, group, channel] = dy * y * sigmoid * (1 + gate * (1 - sigmoid))
                dy = dy * gate * sigmoid

            g = _state_gradient(a, read, dy)
            d_product = (g * drive[:, :, None]).sum(3)  # for dt u, (B, K, D, L)
            d_exponent = _decay_gradient(g, h, own_decay).mul_(a)  # for dt A, (B, K, D|1, N, L)

            dC_now += (h * dy[:, :, :, None]).sum(2)
            dB_now += (g * (dt * x)[:, :, :, None]).sum(2)
            dA[group, own] += (d_exponent * dt[:, :, :, None]).sum((0, 4))
            dx = d_product * dt
            if skip is not None:
                dx.addcmul_(dy, skip)
                dD[group, channel] += (dy * x).sum((0, 3))
            du[item, group, channel] = dx

            ddt = d_product.mul_(x) if own_decay else (d_product * x).sum(2, keepdim=True)
            ddt += (d_exponent * A[group, own, :, None].to(dtype)).sum(3)
            if softplus:
                ddt *= -torch.expm1(-dt)  # softplus'(s) = sigmoid(s) = 1 - exp(-softplus(s))
            if bias is not None:
                dbias[group, own] += ddt.sum((0, 3))
            if ddt_now is None:
                ddelta[item, group, channel] = ddt
            else:
                ddt_now += ddt
        dB[item, group], dC[item, group] = dB_now, dC_now
        if ddt_now is not None:
            ddelta[item, group] = ddt_now

    dA, dD, dbias = (x.to((u if given is None else given).dtype) for x, given in ((dA, A), (dD, D), (dbias, bias)))
    return du, ddelta, dA, dB, dC, dD, dz, dbias


def _by_group(batch: int, groups: int, channels: int, cost: int) -> Iterator[tuple[slice, slice, Iterator[slice]]]:
    """`tiles`, with those together that share their batch items and groups: sums over channels are of such."""
    for (item, group), cut in groupby(tiles(batch, groups, channels, cost, _BUDGET), key=itemgetter(0, 1)):
        yield item, group, (channel for _, _, channel in cut)


def _state_gradient(a: Tensor, C: Tensor, dy: Tensor) -> Tensor:
    """g (B, K, D, N, L) from a (B, K, D|1, N, L), C (B, K, N, L) and dy (B, K, D, L)."""
    following = torch.zeros_like(a, memory_format=torch.contiguous_format)
    following[..., :-1] = a[..., 1:]
    return scan_rows(following, C[:, :, None] * dy[:, :, :, None], spoil=True, reverse=True)


def _decay_gradient(g: Tensor, h: Tensor, own_decay: bool) -> Tensor:
    """The gradient of a: g_t h_{t-1}, (B, K, D, N, L); summed over D, (B, K, 1, N, L), where the channels share a."""
    da = torch.zeros_like(g)
    torch.mul(g[..., 1:], h[..., :-1], out=da[..., 1:])
    return da if own_decay else da.sum(2, keepdim=True)


for _op in (selective_scan_backward, shared_scan_backward, linear_scan_backward):
    LIBRARY.impl(_op.__name__, _op, "CompositeExplicitAutograd")
