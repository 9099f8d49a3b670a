"""Exact: a live replaced site with ``mean="direction"`` or ``"all"`` discretises on the un-scanned map.

The mean after discretisation needs every channel's step, so D x K steps stay; but they, and the mean over channels, are
pointwise: only what the one-channel scan reads has to be put in scan order.

Before::

    xs     = cross_scan(x)                                   # (B, K*D, L): K copies of the map
    dt     = softplus(dt_proj(x_proj(xs)) + bias)            # (B, K, D, L)
    Abar   = mean_D(exp(dt * A));  Bu = mean_D(dt * xs) * B  # (B, K, N, L)
    merged = cross_merge(expand(linear_scan(Abar, Bu, C)) + D*xs)

After::

    f      = matmul(x_proj, x)                               # (B, K, R + 2N, L): one product on the map
    dt     = softplus(matmul(dt_proj, f.steps) + bias)       # (B, K, D, L)
    Abar   = mean_D(exp(dt * A));  Bu = mean_D(dt * x) * f.B
    y      = linear_scan(*(gather(t, order) for t in (Abar, Bu, C)))     # K*N small maps in scan order
    merged = broadcast_add(sum_k gather(y_k, inverse of order_k), x, sum_k D_k)

``"all"`` averages over the K directions as well, in scan order, as the block does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from vmeanba_fx.analysis.cross_scan import CrossScan, Projections, find_cross_scan, find_merge, find_projections
from vmeanba_fx.analysis.evaluate import Unprovable, evaluate
from vmeanba_fx.graph import SITE, Emitter, args_of, aten, calls_of, value
from vmeanba_fx.ops.directions import inverse_table

from .fused_site import add_skip, channel_first, feature_maps, fuse_each, make_buffer, read_out, restore_shape
from .mean_scan import BLOCK

NAME = "fuse_means"
_LINEAR = torch.ops.vmeanba_fx.linear_scan.default
_LARGEST = 1 << 27  # elements of (B, K, D, N, L) that a proof may hold in float64


def fuse_means(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite ``gm`` in place and return it."""
    return fuse_each(gm, calls_of(gm, _LINEAR), _fuse)


def _fuse(gm: fx.GraphModule, scan: fx.Node) -> None:
    nodes = {n.name: n for n in gm.graph.nodes}
    block = scan.meta.get(BLOCK)
    if block is None or any(isinstance(v, str) and v not in nodes for v in block.values()):
        raise Unprovable("it is no block of mean_scan, or its inputs are gone")
    a = {k: nodes[v] if isinstance(v, str) else v for k, v in block.items()}
    K = int(value(a["B"]).shape[1])
    cross = find_cross_scan(a["u"], K)
    weights = find_projections(cross, a["delta"], a["B"], a["C"], a["u"])
    [A] = evaluate([a["A"]], {}, 1)
    bias = torch.zeros(K * cross.channels, dtype=torch.float64) if a["bias"] is None else evaluate([a["bias"]], {}, 1)[0]
    _prove_discretisation(scan, a, cross, A, bias)
    y = read_out(scan, (K, cross.channels, cross.length))
    _prove_broadcast(scan, y)
    merge = find_merge(cross, y, y)
    bias = bias if weights.dt_offset is None else bias + weights.dt_offset

    emit = Emitter(gm.graph, merge.node, NAME, like=scan)
    x = channel_first(emit, cross)
    site = scan.meta.get(SITE, scan.name)
    out = _one_channel(gm, emit, cross, weights, A, bias, x, site, softplus=a["softplus"], over_directions=a["all"])
    out = add_skip(gm, emit, cross, merge, x, out, None, site)
    merge.node.replace_all_uses_with(restore_shape(emit, out, merge))


def _one_channel(
    gm: fx.GraphModule, emit: Emitter, cross: CrossScan, weights: Projections, A: Tensor, bias: Tensor, x: fx.Node,
    site: str, *, softplus: bool, over_directions: bool,
) -> fx.Node:  # fmt: skip
    """The merged one-channel map (B, 1, H, W)."""
    K, D, R, N = cross.groups, cross.channels, weights.rank, A.shape[1]

    def buffer(name: str, t: Tensor, dtype: torch.dtype | None = torch.float32) -> fx.Node:
        return make_buffer(gm, emit, site, name, t, cross, dtype)

    f = feature_maps(gm, emit, cross, weights.x_weight, x, site)  # (B, K, R + 2N, L)
    compute = torch.promote_types(value(x).dtype, torch.float32)
    steps, B, C = (emit(aten.slice.Tensor, f, 2, i, j) for i, j in ((0, R), (R, R + N), (R + N, R + 2 * N)))
    dt = emit(aten.matmul.default, buffer("dt_proj", weights.dt_weight[None], None), steps)
    dt = emit(aten.add.Tensor, dt, buffer("dt_bias", bias.reshape(1, K, D, 1)))
    dt = emit(aten.softplus.default, dt) if softplus else dt  # (B, K, D, L)
    decay = emit(aten.mul.Tensor, emit(aten.unsqueeze.default, dt, 3), buffer("A", A.reshape(1, K, D, N, 1)))
    Abar = emit(aten.mean.dim, emit(aten.exp.default, decay), [2])
    flat = emit(aten.unsqueeze.default, emit(aten.flatten.using_ints, x, 2, 3), 1)
    m = emit(aten.mean.dim, emit(aten.mul.Tensor, dt, flat), [2], True)

    order, back = (buffer(n, t[None, :, None], torch.int64) for n, t in
                   (("order", cross.order), ("inverse", inverse_table(cross.order))))  # fmt: skip

    def in_scan_order(t: Any) -> Any:
        t = t if value(t).dtype == compute else emit(aten.to.dtype, t, compute)
        t = emit(aten.gather.default, t, 3, emit(aten.expand_as.default, order, t))
        return emit(aten.mean.dim, t, [1], True) if over_directions else t

    Abar, Bu, C = (in_scan_order(t) for t in (Abar, emit(aten.mul.Tensor, m, B), C))
    y = emit(_LINEAR, Abar, emit(aten.unsqueeze.default, Bu, 2), C)  # (B, K or 1, 1, L)
    y = emit(aten.expand.default, y, [-1, K, -1, -1])
    y = emit(aten.sum.dim_IntList, emit(aten.gather.default, y, 3, emit(aten.expand_as.default, back, y)), [1])
    return emit(aten.unflatten.int, y, 2, [cross.height, cross.width])


def _prove_discretisation(scan: fx.Node, a: dict[str, Any], cross: CrossScan, A: Tensor, bias: Tensor) -> None:
    K, D, N, L = cross.groups, cross.channels, A.shape[1], cross.length
    batch = 2
    if batch * K * D * N * L > _LARGEST:
        raise Unprovable("its discretisation is too large to be proved on numbers")
    g = torch.Generator().manual_seed(0)
    given = {a[n]: torch.randn(batch, *s, dtype=torch.float64, generator=g).to(A.device) for n, s in
             (("u", (K * D, L)), ("delta", (K * D, L)), ("B", (K, N, L)), ("C", (K, N, L)))}  # fmt: skip
    found = evaluate(list(args_of(scan)), given, batch)
    u, delta, B, C = given.values()
    dt = delta + bias[:, None].to(delta.device)
    dt = (torch.nn.functional.softplus(dt) if a["softplus"] else dt).reshape(batch, K, D, L)
    Abar = torch.exp(dt[:, :, :, None] * A.reshape(K, D, N, 1)).mean(2)
    Bu = (dt * u.reshape(dt.shape)).mean(2, keepdim=True) * B
    if a["all"]:
        Abar, Bu, C = (t.mean(1, keepdim=True) for t in (Abar, Bu, C))
    for expected, there in zip((Abar, Bu[:, :, None], C), found, strict=True):
        if expected.shape != there.shape or not bool((expected - there).abs().max() <= 1e-9):
            raise Unprovable("its discretisation is not that of mean_scan")


def _prove_broadcast(scan: fx.Node, y: fx.Node) -> None:
    shape = [2, *(int(s) for s in value(scan).shape[1:])]
    given = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    [found] = evaluate([y], {scan: given}, 2)
    rows = found.shape[1]
    expected = given.reshape(2, shape[1], shape[3]).repeat_interleave(rows // shape[1], 1)
    if not torch.equal(expected, found):
        raise Unprovable(f"{y.name} is no copy of the one scanned channel")
