"""The paper's block once more, as plain loops over channels, states and time: what every replaced site must compute.

Written from the paper (discretise, mean over channels, one-channel scan, copy, ``+ D*u`` per channel), from nothing in
this package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def paper_block(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    mean: str = "direction",
) -> Tensor:
    """u, delta, z (B, K*D, L); A (K*D, N); B, C (B, K, N, L); D, delta_bias (K*D,). y (B, K*D, L) in the dtype of u."""
    given = u.dtype
    dtype = torch.float64 if given == torch.float64 else torch.float32
    u, delta, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    directions, states, length = B.shape[1:]
    channels = u.shape[1] // directions

    step = delta.clone()
    if delta_bias is not None:
        for c in range(step.shape[1]):
            step[:, c] += delta_bias[c].to(dtype)

    def members(k: int) -> range:
        return range(k * channels, (k + 1) * channels)

    def positive(t: Tensor) -> Tensor:
        return F.softplus(t) if delta_softplus else t

    def averages(over: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Mean over the channels ``over`` of exp(dt A) and of dt B u: for each state one (B, L)."""
        decays, drives = [], []
        for n in range(states):
            decay = drive = 0
            for c in over:
                dt = positive(step[:, c])
                decay = decay + torch.exp(dt * A[c, n])
                drive = drive + dt * B[:, c // channels, n] * u[:, c]
            decays.append(decay / len(over))
            drives.append(drive / len(over))
        return decays, drives

    def averages_of_inputs(k: int) -> tuple[list[Tensor], list[Tensor]]:
        """The same after averaging u, the step before its softplus, and A."""
        dt = positive(sum(step[:, c] for c in members(k)) / channels)
        one = sum(u[:, c] for c in members(k)) / channels
        decays = [torch.exp(dt * sum(A[c, n] for c in members(k)) / channels) for n in range(states)]
        return decays, [dt * B[:, k, n] * one for n in range(states)]

    def scan(decays: list[Tensor], drives: list[Tensor], read: Tensor) -> Tensor:
        """read (B, N, L): sum over states of read * h, as (B, L)."""
        y = torch.zeros_like(u[:, 0])
        for n in range(states):
            h = torch.zeros_like(u[:, 0, 0])
            for t in range(length):
                h = decays[n][:, t] * h + drives[n][:, t]
                y[:, t] += read[:, n, t] * h
        return y

    if mean == "all":
        shared = scan(*averages(list(range(u.shape[1]))), sum(C[:, k] for k in range(directions)) / directions)
        per_direction = [shared] * directions
    elif mean == "direction":
        per_direction = [scan(*averages(list(members(k))), C[:, k]) for k in range(directions)]
    else:
        per_direction = [scan(*averages_of_inputs(k), C[:, k]) for k in range(directions)]

    out = torch.empty_like(u)
    for c in range(u.shape[1]):
        out[:, c] = per_direction[c // channels]
        if D is not None:
            out[:, c] += D[c].to(dtype) * u[:, c]
        if z is not None:
            out[:, c] *= F.silu(z[:, c].to(dtype))
    return out.to(given)
