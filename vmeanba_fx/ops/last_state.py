"""The state after the last step of a selective scan, as an op of its own.

mamba-ssm's calls can return it (``return_last_state=True``). As a separate node it disappears from the graph where
nobody reads it, and where somebody does, the site is refused: a one-channel scan has no per-channel states.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import LIBRARY

LIBRARY.define(
    "last_state(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor? delta_bias=None, bool delta_softplus=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def last_state(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor | None = None, delta_softplus: bool = False
) -> Tensor:
    """h after step L: (B, K*D, N) in float32 (float64 for float64 ``u``); shapes as in :func:`selective_scan`."""
    return torch.ops.vmeanba_fx.last_state.default(u, delta, A, B, delta_bias, delta_softplus)


def compute_last_state(u, delta, A, B, delta_bias=None, delta_softplus=False):
    """:func:`last_state` in ATen operators, on any device."""
    # h_L = sum_t exp(A * (S_L - S_t)) dt_t B_t u_t with S the running sum of dt: no exponent is positive for A <= 0.
    compute = torch.promote_types(u.dtype, torch.float32)
    dt = delta.to(compute)
    if delta_bias is not None:
        dt = dt + delta_bias.to(compute).unsqueeze(-1)
    if delta_softplus:
        dt = F.softplus(dt)
    remaining = dt.flip(-1).cumsum(-1).flip(-1) - dt  # added up from the end, where the sums are small and count
    weighted = dt * u.to(compute)
    groups = B.shape[1]
    states = [
        (torch.exp(remaining * A[:, n, None].to(compute)) * weighted)
        .unflatten(1, (groups, -1))
        .mul(B[:, :, None, n].to(compute))
        .sum(-1)
        .flatten(1)
        for n in range(A.shape[1])
    ]
    return torch.stack(states, dim=-1)


LIBRARY.impl("last_state", compute_last_state, "CompositeExplicitAutograd")


@torch.library.register_fake("vmeanba_fx::last_state", lib=LIBRARY)
def _(u, delta, A, B, delta_bias=None, delta_softplus=False):
    return u.new_empty(*u.shape[:2], A.shape[1], dtype=torch.promote_types(u.dtype, torch.float32))
