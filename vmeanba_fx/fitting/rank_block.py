"""A rank-r site: what was fitted for it, and the operators it consists of, for tensors and for graph nodes alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..graph import aten, value

_ops = torch.ops.vmeanba_fx


@dataclass(frozen=True)
class RankFit:
    """W (K, r, D), V (K, D, r), weights (K, D); skip (K*D,), added to the D of the site's skip, or None; bias (K*D,) or
    None.

    ``energy``: share of the scan's energy about its mean that the fit explains on the calibration data, less what a
    LayerNorm absorbs. ``rows``: positions fitted on.
    """

    W: Tensor
    V: Tensor
    weights: Tensor
    skip: Tensor | None
    bias: Tensor | None
    energy: float
    rows: int

    @property
    def rank(self) -> int:
        return int(self.W.shape[1])


def rank_block(
    op: Callable[..., Any], u: Any, delta: Any, A: Any, B: Any, C: Any, delta_bias: Any, delta_softplus: bool,
    out_dtype: torch.dtype | None, *, fit: RankFit, groups: int, channels: int, dtype_of: Callable[[Any], torch.dtype],
    constant: Callable[[str, Tensor, torch.dtype], Any],
) -> Any:  # fmt: skip
    """The block of :mod:`vmeanba_fx.passes.rank_scan`, written once for tensors and for graph nodes.

    ``op(target, *args)`` runs or emits an operator, ``constant(name, tensor, dtype)`` gives a tensor or the node of a buffer.
    """
    u_dtype = dtype_of(u)
    compute = torch.promote_types(u_dtype, torch.float32)

    def cast(t: Any) -> Any:
        return t if dtype_of(t) == compute else op(aten.to.dtype, t, compute)

    # The products with u run in its own dtype: the wide operand is read once, half as wide in half precision.
    W = constant("rank_W", fit.W, u_dtype)
    ur = cast(op(aten.matmul.default, W, op(aten.unflatten.int, u, 1, [groups, channels])))  # (B, K, r, L)
    weights = {dtype: constant("rank_weights", fit.weights[:, None], dtype) for dtype in {dtype_of(delta), compute}}
    delta1, A1 = shared_step(op, delta, delta_bias, A, weights, dtype_of, compute, cast)
    yr = op(_ops.shared_scan.default, ur, delta1, A1, cast(B), cast(C), None, delta_softplus)
    y = op(aten.matmul.default, constant("rank_V", fit.V, compute), yr)  # (B, K, D, L)
    y = op(aten.flatten.using_ints, y, 1, 2)
    if fit.bias is not None:
        y = op(aten.add.Tensor, y, constant("rank_bias", fit.bias[:, None], compute))
    wanted = out_dtype or u_dtype
    return y if wanted == compute else op(aten.to.dtype, y, wanted)


def shared_step(
    op: Callable[..., Any], delta: Any, delta_bias: Any, A: Any, weights: Mapping[torch.dtype, Any], dtype_of: Callable,
    compute: torch.dtype, cast: Callable[[Any], Any],
) -> tuple[Any, Any]:  # fmt: skip
    """The step before softplus (B, K, L) and decay (K, N) that all channels of a direction share: weighted means.

    ``weights``: (K, 1, D), in the dtype of ``delta`` and in the compute dtype.
    """
    own = weights[compute]
    groups, _, channels = (own if isinstance(own, Tensor) else value(own)).shape
    delta1 = op(aten.matmul.default, weights[dtype_of(delta)], op(aten.unflatten.int, delta, 1, [groups, channels]))
    delta1 = op(aten.squeeze.dim, cast(delta1), 2)
    if delta_bias is not None:
        bias = op(aten.unflatten.int, op(aten.unsqueeze.default, cast(delta_bias), -1), 0, [groups, channels])
        delta1 = op(aten.add.Tensor, delta1, op(aten.squeeze.dim, op(aten.matmul.default, own, bias), 2))
    A1 = op(aten.squeeze.dim, op(aten.matmul.default, own, op(aten.unflatten.int, cast(A), 0, [groups, channels])), 1)
    return delta1, A1


def call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``op`` for tensors: run the operator."""
    return target(*args, **kwargs)


def rank_scan_tensors(fit: RankFit, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
                      delta_bias: Tensor | None, delta_softplus: bool, out_dtype: torch.dtype | None) -> Tensor:  # fmt: skip
    """What a replaced site adds, the change of its skip included. Used to score sites without rewriting a graph."""
    groups = B.shape[1]
    y = rank_block(
        call, u, delta, A, B, C, delta_bias, delta_softplus, out_dtype, fit=fit, groups=groups,
        channels=u.shape[1] // groups, dtype_of=lambda t: t.dtype, constant=lambda _, t, dtype: t.to(u.device, dtype),
    )  # fmt: skip
    return y if fit.skip is None else y + fit.skip.to(y)[:, None] * u.to(y)
