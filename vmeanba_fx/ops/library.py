"""The ops of namespace `vmeanba_fx`: their schemas and what they return (the fake implementations).

The schemas are the contract between graphs and kernels. Implementations register themselves from their own modules:
`cpu`, `compose` and `backward` (PyTorch, any device), `autograd`, and the CUDA modules. `Library.define/impl` is used
and not the `custom_op` decorator because it costs about half as much per call, and a model calls 15 to 60 scans.

B is the batch as a dim, K the groups (scan directions), D the channels per group, N the state, L the length, R the
number of channels that share one decay (or, in `ss2d`, the rank of the step projection).
"""

import torch
from torch.library import Library

from . import checks

NAMESPACE = "vmeanba_fx"
# FRAGMENT: the CUDA modules open the same namespace for their own implementations.
LIBRARY = Library(NAMESPACE, "FRAGMENT")

SCHEMAS = (
    # u, delta, z (B, K*D, L); A (K*D, N); B, C (B, K, N, L); D, delta_bias (K*D,) -> (B, K*D, L)
    "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, "
    "Tensor? delta_bias=None, bool delta_softplus=False, ScalarType? out_dtype=None) -> Tensor",
    # a, C (B, K, N, L); b (B, K, R, N, L) -> (B, K, R, L)
    "linear_scan(Tensor a, Tensor b, Tensor C) -> Tensor",
    # u (B, K, R, L); delta (B, K, L); A (K, N); B, C (B, K, N, L); delta_bias (K,) -> (B, K, R, L)
    "shared_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? delta_bias=None, "
    "bool delta_softplus=False, ScalarType? out_dtype=None) -> Tensor",
    # u (B, 1 or K, R, H, W); delta (B, K, H, W); B, C (B, K, N, H, W) -> (B, R, H, W) or (B, K, R, H, W)
    "shared_scan2d(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? delta_bias, int[] directions, "
    "Tensor? order, bool delta_softplus, bool merge, ScalarType? out_dtype=None) -> Tensor",
    # x (B, D, H, W); feats (B, K, R + 2N, H, W); dt_weight (K, D, R); A (K*D, N); D (D,); delta_bias (K*D,)
    "ss2d(Tensor x, Tensor feats, Tensor dt_weight, Tensor A, Tensor? D, Tensor? delta_bias, int[] directions, "
    "Tensor? order, bool delta_softplus, ScalarType? out_dtype=None) -> Tensor",
    # y (B, K, 1, L); u (B, K*D, L); D (K*D,) -> (B, K*D, L)
    "broadcast_add(Tensor y, Tensor u, Tensor? D, ScalarType? out_dtype=None) -> Tensor",
    # Gradients, one per tensor argument in the order of the forward op, each with that argument's shape and dtype;
    # for an optional argument that was None, an empty tensor of shape (0,).
    "selective_scan_backward(Tensor grad, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, bool delta_softplus) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "linear_scan_backward(Tensor grad, Tensor a, Tensor b, Tensor C) -> (Tensor, Tensor, Tensor)",
    "shared_scan_backward(Tensor grad, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? delta_bias, "
    "bool delta_softplus) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "shared_scan2d_backward(Tensor grad, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? delta_bias, "
    "int[] directions, Tensor? order, bool delta_softplus, bool merge) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "ss2d_backward(Tensor grad, Tensor x, Tensor feats, Tensor dt_weight, Tensor A, Tensor? D, Tensor? delta_bias, "
    "int[] directions, Tensor? order, bool delta_softplus) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)

for _schema in SCHEMAS:
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def is_channels_last(u):
    """Whether u (B, C, ...) lies in memory as (B, ..., C)."""
    return u.movedim(1, -1).is_contiguous() and not u.is_contiguous()


def empty_map(u, dtype):
    """The output of `ss2d` and `broadcast_add` for a map (B, C, ...): channels-last in memory if it is, else contiguous."""
    if is_channels_last(u):
        return u.new_empty(u.movedim(1, -1).shape, dtype=dtype).movedim(-1, 1)
    return u.new_empty(u.shape, dtype=dtype)


def _fake(name: str):
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=LIBRARY)


def _like(tensor, reference):
    """The gradient of an argument: its shape and dtype, contiguous; empty for an argument that was not given."""
    return reference.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)


@_fake("selective_scan")
def _(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, out_dtype=None):
    checks.check_selective_scan(u, delta, A, B, C, D, z, delta_bias, out_dtype)
    return u.new_empty(u.shape, dtype=out_dtype or u.dtype)


@_fake("linear_scan")
def _(a, b, C):
    checks.check_linear_scan(a, b, C)
    return a.new_empty(*b.shape[:3], a.shape[3])


@_fake("shared_scan")
def _(u, delta, A, B, C, delta_bias=None, delta_softplus=False, out_dtype=None):
    checks.check_shared_scan(u, delta, A, B, C, delta_bias, out_dtype)
    return u.new_empty(u.shape, dtype=out_dtype or u.dtype)


@_fake("shared_scan2d")
def _(u, delta, A, B, C, delta_bias, directions, order, delta_softplus, merge, out_dtype=None):
    checks.check_shared_scan2d(u, delta, A, B, C, delta_bias, directions, order, out_dtype)
    batch, _, R, height, width = u.shape
    shape = (batch, R, height, width) if merge else (batch, delta.shape[1], R, height, width)
    return u.new_empty(shape, dtype=out_dtype or u.dtype)


@_fake("ss2d")
def _(x, feats, dt_weight, A, D, delta_bias, directions, order, delta_softplus, out_dtype=None):
    checks.check_ss2d(x, feats, dt_weight, A, D, delta_bias, directions, order, out_dtype)
    return empty_map(x, out_dtype or x.dtype)


@_fake("broadcast_add")
def _(y, u, D, out_dtype=None):
    checks.check_broadcast_add(y, u, D, out_dtype)
    return empty_map(u, out_dtype or u.dtype)


@_fake("selective_scan_backward")
def _(grad, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    return tuple(_like(tensor, u) for tensor in (u, delta, A, B, C, D, z, delta_bias))


@_fake("linear_scan_backward")
def _(grad, a, b, C):
    return tuple(_like(tensor, a) for tensor in (a, b, C))


@_fake("shared_scan_backward")
def _(grad, u, delta, A, B, C, delta_bias, delta_softplus):
    return tuple(_like(tensor, u) for tensor in (u, delta, A, B, C, delta_bias))


@_fake("shared_scan2d_backward")
def _(grad, u, delta, A, B, C, delta_bias, directions, order, delta_softplus, merge):
    return tuple(_like(tensor, u) for tensor in (u, delta, A, B, C, delta_bias))


@_fake("ss2d_backward")
def _(grad, x, feats, dt_weight, A, D, delta_bias, directions, order, delta_softplus):
    return tuple(_like(tensor, x) for tensor in (x, feats, dt_weight, A, D, delta_bias))
