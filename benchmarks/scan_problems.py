"""Inputs of the scan benchmarks on the GPU, and what comes out of them in float64."""

import torch
import torch.nn.functional as F

from vmeanba_fx.ops.directions import direction_table

DIRECTIONS = [0, 1, 2, 3]
K = len(DIRECTIONS)


def full_inputs(batch, D, length, states, dtype):
    def normal(*shape):
        return torch.randn(*shape, device="cuda", dtype=dtype)

    A = -torch.rand(K * D, states, device="cuda") - 0.1
    return (
        normal(batch, K * D, length),
        normal(batch, K * D, length),
        A,
        normal(batch, K, states, length),
        normal(batch, K, states, length),
        torch.randn(K * D, device="cuda") - 2,
    )


def one_inputs(batch, height, width, states, dtype, rank=1, own=False):
    """Views of one projection's output: u and, per direction, (delta, B, C); or with `own` (u, delta, B, C) per direction."""
    each, shared = 1 + 2 * states + own * rank, rank * (not own)
    features = torch.randn(batch, shared + K * each, height * width, device="cuda", dtype=dtype)
    features = features.unflatten(-1, (height, width))
    parts = features[:, shared:].unflatten(1, (K, each))
    u = parts[:, :, :rank] if own else features[:, None, :rank]
    delta, B, C = parts[:, :, own * rank :].split([1, states, states], 2)
    A, bias = -torch.rand(K, states, device="cuda") - 0.1, torch.randn(K, device="cuda") - 2
    return u, delta.squeeze(2), A, B, C, bias


def recurrence(a, b):
    """h_t = a_t h_{t-1} + b_t along the last dim by recursive doubling."""
    offset = 1
    while offset < b.shape[-1]:
        b = torch.cat([b[..., :offset], b[..., offset:] + a[..., offset:] * b[..., :-offset]], -1)
        a = torch.cat([a[..., :offset], a[..., offset:] * a[..., :-offset]], -1)
        offset *= 2
    return b


def full_reference(u, delta, A, B, C, bias):
    u, delta, A, B, C, bias = (t.double() for t in (u, delta, A, B, C, bias))
    dt, each = F.softplus(delta + bias[:, None]), u.shape[1] // B.shape[1]
    y = 0
    for n in range(A.shape[1]):
        write, read = (t[:, :, n].repeat_interleave(each, 1) for t in (B, C))
        y = y + read * recurrence(torch.exp(dt * A[:, n, None]), dt * write * u)
    return y


def one_reference(u, delta, A, B, C, bias):
    """The merged one-channel scan: each direction is the full scan of one channel per group, in its own order."""
    rank = u.shape[2]
    table = direction_table(DIRECTIONS, *u.shape[-2:]).to(u.device)
    out = torch.zeros(u[:, 0].shape, dtype=torch.float64, device=u.device).flatten(2)
    for k in range(K):
        delta_k, u_k, B_k, C_k = (t.flatten(-2)[..., table[k]] for t in (delta[:, k], u[:, k % u.shape[1]], B[:, k], C[:, k]))
        delta_k, A_k, bias_k = delta_k[:, None].expand_as(u_k), A[k].expand(rank, -1), bias[k].expand(rank)
        out.index_add_(2, table[k], full_reference(u_k, delta_k, A_k, B_k[:, None], C_k[:, None], bias_k))
    return out.view(u[:, 0].shape)
