"""Lossy: VMeanba's block in place of a selective scan (paper, Figure 2): one channel is scanned instead of D.

Before::

    y = vmeanba_fx.selective_scan(u, delta, A, B, C, None, None, delta_bias, True)     # (B, K*D, L)

After, ``mean="direction"`` (discretise, mean over the D channels of each direction, D=1 scan, broadcast)::

    dt   = softplus(delta + delta_bias)
    Abar = mean_D(exp(dt * A))                              # (B, K, N, L)
    Bu   = mean_D(dt * u) * B                               # B is shared by the channels of a direction
    y1   = vmeanba_fx.linear_scan(Abar, Bu, C)              # (B, K, 1, L)
    y    = expand(y1)                                       # (B, K*D, L)

``+ D*u`` stays per channel, outside, as it was. Variants: ``mean="all"`` averages over the K directions as well, C
included (what the authors' public code does); ``mean="input"`` averages ``u``, ``delta + delta_bias`` and ``A`` before
discretising, so the scan is ``vmeanba_fx.shared_scan``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import fx

from vmeanba_fx.dead_code import remove_dead_code
from vmeanba_fx.errors import PassError
from vmeanba_fx.graph import Emitter, aten, find_scan, group_shape, scan_arguments, value

Mean = Literal["direction", "all", "input"]
NAME = "mean_scan"
BROADCAST = "vmeanba_fx.broadcast"
"""``node.meta`` key of the node that holds a replaced scan's output; its value is the number of groups K."""
BLOCK = "vmeanba_fx.block"
"""``node.meta`` key of a replaced site's ``linear_scan``: names of the nodes and options that the block was made from."""

_ops = torch.ops.vmeanba_fx


def check_mean(mean: str) -> None:
    """Raise ``PassError`` unless ``mean`` names a variant."""
    if mean not in get_args(Mean):
        raise PassError(f"mean={mean!r}: choose one of {', '.join(map(repr, get_args(Mean)))}")


def mean_scan(gm: fx.GraphModule, sites: Iterable[str], *, mean: Mean = "direction") -> fx.GraphModule:
    """Replace the scan of every named site of ``gm`` (in place) and return ``gm``.

    Raises:
        SiteError: ``gm`` has no scan of that name.
    """
    check_mean(mean)
    for _, scan in [find_scan(gm, name) for name in sites]:
        args = scan_arguments(scan)
        emit = Emitter(scan.graph, scan, NAME, like=scan)
        groups, channels = group_shape(value(args["u"]), value(args["B"]))
        out = mean_block(emit, **args, mean=mean, groups=groups, channels=channels, dtype_of=lambda n: value(n).dtype)
        out.meta[BROADCAST] = groups
        _describe(out, args, mean)
        scan.replace_all_uses_with(out)
        scan.graph.erase_node(scan)
    remove_dead_code(gm)
    return gm


def _describe(out: fx.Node, args: dict[str, Any], mean: Mean) -> None:
    """Leave on the block's ``linear_scan`` what it was made from, for :mod:`fuse_means`."""
    node: Any = out
    while node.target is not _ops.linear_scan.default:
        if node.target is _ops.shared_scan.default:
            return
        node = node.args[0]
    names = {n: args[n].name for n in ("u", "delta", "A", "B", "C")}
    bias = None if args["delta_bias"] is None else args["delta_bias"].name
    node.meta[BLOCK] = {**names, "bias": bias, "softplus": args["delta_softplus"], "all": mean == "all"}


def mean_block(
    op: Callable[..., Any], u: Any, delta: Any, A: Any, B: Any, C: Any, delta_bias: Any, delta_softplus: bool,
    out_dtype: torch.dtype | None, *, mean: Mean, groups: int, channels: int, dtype_of: Callable[[Any], torch.dtype],
) -> Any:  # fmt: skip
    """The block, written once for tensors and for graph nodes: ``op(target, *args)`` computes or emits one operator.

    Shapes as in :func:`vmeanba_fx.ops.selective_scan`; returns y (B, K*D, L), channel-constant within a direction.
    """
    u_dtype = dtype_of(u)
    compute = torch.promote_types(u_dtype, torch.float32)

    def cast(t: Any) -> Any:
        return t if dtype_of(t) == compute else op(aten.to.dtype, t, compute)

    def per_direction(t: Any, dim: int = 1) -> Any:
        return op(aten.unflatten.int, t, dim, [groups, channels])

    def soft(t: Any) -> Any:
        return op(aten.softplus.default, t) if delta_softplus else t

    u, delta, A, B, C = cast(u), cast(delta), cast(A), cast(B), cast(C)
    if delta_bias is not None:
        delta = op(aten.add.Tensor, delta, op(aten.unsqueeze.default, cast(delta_bias), -1))
    if mean == "input":
        u1 = op(aten.mean.dim, per_direction(u), [2], True)  # (B, K, 1, L)
        delta1 = op(aten.mean.dim, per_direction(delta), [2])  # (B, K, L)
        A1 = op(aten.mean.dim, per_direction(A, 0), [1])  # (K, N)
        y = op(_ops.shared_scan.default, u1, delta1, A1, B, C, None, delta_softplus)
    else:
        dt = per_direction(soft(delta))  # (B, K, D, L)
        steps = op(
            aten.mul.Tensor, op(aten.unsqueeze.default, dt, 3), op(aten.unsqueeze.default, per_direction(A, 0), -1)
        )
        Abar = op(aten.exp.default, steps)  # (B, K, D, N, L)
        m = op(aten.mean.dim, op(aten.mul.Tensor, dt, per_direction(u)), [2], True)  # (B, K, 1, L)
        Bu = op(aten.mul.Tensor, m, B)  # (B, K, N, L)
        over = [2]
        if mean == "all":
            over = [1, 2]
            Bu, C = op(aten.mean.dim, Bu, [1], True), op(aten.mean.dim, C, [1], True)
        Abar = op(aten.mean.dim, Abar, over)
        if mean == "all":
            Abar = op(aten.unsqueeze.default, Abar, 1)
        y = op(_ops.linear_scan.default, Abar, op(aten.unsqueeze.default, Bu, 2), C)  # (B, K or 1, 1, L)
    y = op(aten.expand.default, y, [-1, groups, channels, -1])
    y = op(aten.flatten.using_ints, y, 1, 2)
    wanted = out_dtype or u_dtype
    return y if wanted == compute else op(aten.to.dtype, y, wanted)


def mean_scan_tensors(mean: Mean, u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
                      C: torch.Tensor, delta_bias: torch.Tensor | None, delta_softplus: bool,
                      out_dtype: torch.dtype | None) -> torch.Tensor:  # fmt: skip
    """:func:`mean_block` on tensors: what a replaced site would output. Used to score sites without rewriting a graph."""
    groups, channels = group_shape(u, B)
    return mean_block(
        lambda target, *args: target(*args), u, delta, A, B, C, delta_bias, delta_softplus, out_dtype,
        mean=mean, groups=groups, channels=channels, dtype_of=lambda t: t.dtype,
    )  # fmt: skip
