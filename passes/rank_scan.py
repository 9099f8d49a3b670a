"""Lossy. A scan of r channels per direction with learned projections in place of a full selective scan.

Before::

    y = vmeanba_fx.selective_scan(u, delta, A, B, C, None, None, delta_bias, True)     # (B, K*D, L)

After, with W (K, r, D), V (K, D, r) and weights w (K, D) that add up to 1, from :mod:`vmeanba_fx.fitting_sites`::

    ur     = W @ u                                             # (B, K, r, L)
    delta1 = w . (delta + delta_bias)                          # (B, K, L)
    A1     = w . A                                             # (K, N)
    yr     = vmeanba_fx.shared_scan(ur, delta1, A1, B, C, None, True)                  # (B, K, r, L)
    y      = V @ yr + b                                        # (B, K*D, L)

The paper's block with the mean of the inputs is r = 1, W = w = 1/D, V = 1. The ``+ D*u`` behind the scan stays, with the fitted
``s`` added to D: no cost at run time. ``b`` is absent where the fit has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vmeanba_fx.errors import SiteError
from vmeanba_fx.graph import SITE, Emitter, aten, remove_dead_code, scan_nodes, value
from vmeanba_fx.sites import skip_product

from .mean_scan import group_shape, scan_arguments

NAME = "rank_scan"
RANK = "vmeanba_fx.rank"
"""``node.meta`` key of the node that holds a rank-r site's output (B, K*D, L); its value is the rank."""

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


def rank_scan(gm: fx.GraphModule, fits: Mapping[str, RankFit]) -> fx.GraphModule:
    """Replace the scans of the sites named in ``fits`` (in place) and return ``gm``.

    Raises:
        SiteError: ``gm`` has no scan of that name, or the scan lies inside an autocast or checkpoint region.
    """
    nodes = {node.meta[SITE]: (owner, node) for owner, node in scan_nodes(gm)}
    unknown = [name for name in fits if name not in nodes]
    if unknown:
        raise SiteError(f"no scan named {', '.join(unknown)}; the graph has: {', '.join(nodes) or 'none'}")
    for name, fit in fits.items():
        owner, scan = nodes[name]
        if owner is not gm:
            raise SiteError(f"{name}: it lies inside an autocast or checkpoint region, where a rank-r scan cannot be put")
        _replace(gm, scan, fit)
    remove_dead_code(gm)
    return gm


def _replace(gm: fx.GraphModule, scan: fx.Node, fit: RankFit) -> None:
    args = scan_arguments(scan)
    emit = Emitter(gm.graph, scan, NAME, like=scan)
    prefix = scan.meta[SITE].replace(".", "_").replace("#", "_")
    device = value(args["u"]).device

    def constant(name: str, tensor: Tensor, dtype: torch.dtype) -> fx.Node:
        return emit.get_attr(gm, f"{prefix}_{name}", tensor.to(device, dtype).contiguous())

    groups, channels = group_shape(value(args["u"]), value(args["B"]))
    out = rank_block(
        emit, **args, fit=fit, groups=groups, channels=channels, dtype_of=lambda n: value(n).dtype, constant=constant
    )
    out.meta[RANK] = fit.rank
    if fit.skip is not None:
        _add_to_skip(gm, scan, fit.skip, prefix)
    scan.replace_all_uses_with(out)
    gm.graph.erase_node(scan)


def _add_to_skip(gm: fx.GraphModule, scan: fx.Node, change: Tensor, prefix: str) -> None:
    """Add ``change`` (K*D,) to the D of ``scan``'s skip product."""
    product = skip_product(scan)
    if product is None:
        raise SiteError(f"{scan.meta[SITE]}: the fit changes the D of a skip that the site does not have")
    D = next(a for a in product.args if a is not scan.args[0])
    emit = Emitter(gm.graph, product, NAME, like=scan)
    held = value(D)
    buffer = emit.get_attr(gm, f"{prefix}_D_change", change.reshape(held.shape[-2:]).to(held.device, held.dtype))
    product.replace_input_with(D, emit(aten.add.Tensor, D, buffer))


def rank_block(
    op: Callable[..., Any], u: Any, delta: Any, A: Any, B: Any, C: Any, delta_bias: Any, delta_softplus: bool,
    out_dtype: torch.dtype | None, *, fit: RankFit, groups: int, channels: int, dtype_of: Callable[[Any], torch.dtype],
    constant: Callable[[str, Tensor, torch.dtype], Any],
) -> Any:  # fmt: skip
    """The block, written once for tensors and for graph nodes, as :func:`vmeanba_fx.passes.mean_scan.mean_block` is."""
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
    groups, channels = group_shape(u, B)
    y = rank_block(
        call, u, delta, A, B, C, delta_bias, delta_softplus, out_dtype, fit=fit, groups=groups, channels=channels,
        dtype_of=lambda t: t.dtype, constant=lambda _, t, dtype: t.to(u.device, dtype),
    )  # fmt: skip
    return y if fit.skip is None else y + fit.skip.to(y)[:, None] * u.to(y)
