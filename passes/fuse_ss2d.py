"""Exact: a kept site's projections, cross scan, scan and cross merge become one op that reads and writes un-scanned maps.

Before (VMamba, K = 4)::

    xs     = cross_scan(x)                              # (B, 4*D, L): four copies of the map
    dbl    = conv1d(xs, x_proj, groups=4)               # (B, 4*(R + 2N), L)
    r, B, C = split(dbl)
    delta  = conv1d(r, dt_projs, groups=4)              # (B, 4*D, L)
    y      = selective_scan(xs, delta, A, B, C, delta_bias) + D*xs
    merged = cross_merge(y)                             # (B, D, L)

After (pointwise projections commute with a permutation of positions)::

    feats  = linear(x as (B, H, W, D), x_proj of all directions)   # one GEMM on the un-scanned map
    merged = ss2d(x, feats, dt_projs, A, sum_k D_k, delta_bias, directions=[0, 1, 2, 3])

What the nodes do is found and proved by evaluating them (:mod:`vmeanba_fx.analysis.cross_scan`); a site that is not provably
this pattern stays as it was, and ``node.meta["vmeanba_fx.not_fused"]`` of its scan says why.
"""

from __future__ import annotations

import torch
from torch import fx

from vmeanba_fx.analysis.cross_scan import CrossScan, Merge, Projections, find_cross_scan, find_merge, find_projections
from vmeanba_fx.analysis.evaluate import Unprovable, evaluate, is_parameter_only
from vmeanba_fx.graph import SITE, Emitter, aten, group_shape, scan_arguments, scan_nodes, value

from .fused_site import channel_first, follow_weights, fuse_each, make_buffer, restore_shape

NAME = "fuse_ss2d"
# The CUDA kernel loads the features of a position as 16-byte words: per direction they are padded to 8 halves.
_ALIGN = 8


def fuse_ss2d(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite ``gm`` in place and return it."""
    return fuse_each(gm, scan_nodes(gm), fuse_site)


def fuse_site(gm: fx.GraphModule, scan: fx.Node) -> None:
    """Fuse one site, or raise :class:`Unprovable` and leave the graph's values as they were."""
    a = scan_arguments(scan)
    groups, _ = group_shape(value(a["u"]), value(a["B"]))
    if not is_parameter_only(a["A"]):
        raise Unprovable("A depends on the input")
    if a["delta_bias"] is not None and not is_parameter_only(a["delta_bias"]):
        raise Unprovable("delta_bias depends on the input")
    cross = find_cross_scan(a["u"], groups)
    weights = find_projections(cross, a["delta"], a["B"], a["C"], a["u"])
    merge = find_merge(cross, scan, scan)
    emit = Emitter(gm.graph, merge.node, NAME, like=scan)
    x, feats = _features(gm, emit, cross, weights, scan.meta[SITE])
    out = _core(gm, emit, cross, weights, merge, a, x, feats, scan.meta[SITE])
    merge.node.replace_all_uses_with(restore_shape(emit, out, merge))


def _features(
    gm: fx.GraphModule, emit: Emitter, cross: CrossScan, weights: Projections, site: str
) -> tuple[fx.Node, fx.Node]:
    """The map as (B, D, H, W) and its features (B, K, R + 2N, H, W)."""
    K, C, D = weights.x_weight.shape
    padded = -(-C // _ALIGN) * _ALIGN
    weight = weights.x_weight.new_zeros(K, padded, D)
    weight[:, :C] = weights.x_weight
    matrix = make_buffer(gm, emit, site, "x_proj", weight.reshape(K * padded, D), cross)
    x = channel_first(emit, cross)
    feats = emit(aten.linear.default, emit(aten.permute.default, x, [0, 2, 3, 1]), matrix)  # (B, H, W, K * padded)
    feats = emit(aten.unflatten.int, emit(aten.permute.default, feats, [0, 3, 1, 2]), 1, [K, padded])
    if padded != C:
        feats = emit(aten.slice.Tensor, feats, 2, 0, C)
    return x, feats


def _core(
    gm: fx.GraphModule, emit: Emitter, cross: CrossScan, weights: Projections, merge: Merge, a: dict, x: fx.Node,
    feats: fx.Node, site: str,
) -> fx.Node:  # fmt: skip
    dt_weight = make_buffer(gm, emit, site, "dt_proj", weights.dt_weight, cross)
    # -exp(A_log) and the like are worked out here, once.
    [decays] = evaluate([a["A"]], {}, 1)
    shift = weights.dt_offset
    if a["delta_bias"] is not None:
        [given] = evaluate([a["delta_bias"]], {}, 1)
        shift = given if shift is None else given + shift
    A = make_buffer(gm, emit, site, "A", decays, cross, torch.float32)
    bias = None if shift is None else make_buffer(gm, emit, site, "dt_bias", shift, cross, torch.float32)
    skip = None if merge.skip is None else make_buffer(gm, emit, site, "D", merge.skip, cross, torch.float32)
    order = None
    if not cross.directions:
        order = make_buffer(gm, emit, site, "order", cross.order, cross, torch.int32)
    out = emit(
        torch.ops.vmeanba_fx.ss2d.default, x, feats, dt_weight, A, skip, bias, list(cross.directions), order,
        a["delta_softplus"], value(merge.node).dtype,
    )  # fmt: skip
    return follow_weights(emit, out, A)
