"""Exact: a replaced site that stays live works on the un-scanned map: skinny product, shared scan in scan order, read-out.

Before (``mean="input"`` and rank r; r = 1, W = 1/D and V = 1 for the mean)::

    xs     = cross_scan(x)                                  # (B, K*D, L): K copies of the map
    ur     = W @ xs                                         # (B, K, r, L)
    delta1 = mean_D(dt_proj(x_proj(xs)) + bias)             # (B, K, L)
    yr     = shared_scan(ur, delta1, A1, B, C)              # (B, K, r, L)
    merged = cross_merge(V @ yr + D*xs)                     # (B, D, L)

After (pointwise maps commute with permutations of positions; dt_proj folds to the mean of its rows)::

    f      = matmul([W | mean dt_proj @ x_proj | B | C], x)  # (B, K*(r + 1 + 2N), L): one skinny product
    yr     = shared_scan2d(f.u, f.delta, A1, f.B, f.C, bias, directions=[0, 1, 2, 3])    # (B, K, r, H, W)
    merged = linear(yr, V of all directions) + (sum_k D_k) * x

Where V is one for every direction (the mean), the K one-channel maps are summed by the scan, and `broadcast_add` copies the
sum to the channels and adds D * x. As in
:mod:`fuse_ss2d` the region is recognised and proved by evaluating it; ``node.meta["vmeanba_fx.not_fused"]`` says why not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from vmeanba_fx.analysis.cross_scan import CrossScan, find_cross_scan, find_merge, find_pointwise, find_read_out
from vmeanba_fx.analysis.evaluate import Unprovable, evaluate, is_parameter_only
from vmeanba_fx.graph import SITE, Emitter, arguments, aten, calls_of, value

from .fused_site import (
    add_skip,
    channel_first,
    feature_maps,
    follow_weights,
    fuse_each,
    make_buffer,
    read_out,
    restore_shape,
)

NAME = "fuse_shared"
_SHARED = torch.ops.vmeanba_fx.shared_scan.default
_FAR = 12  # nodes between a map in scan order and the scan that reads it


def fuse_shared(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite ``gm`` in place and return it."""
    return fuse_each(gm, calls_of(gm, _SHARED), _fuse)


def _fuse(gm: fx.GraphModule, scan: fx.Node) -> None:
    a = arguments(scan)
    if not is_parameter_only(a["A"]) or (a["delta_bias"] is not None and not is_parameter_only(a["delta_bias"])):
        raise Unprovable("A or delta_bias depends on the input")
    K, r = (int(s) for s in value(a["u"]).shape[1:3])
    cross, u = _cross_scan_behind(a["u"], K)
    weight, shift = find_pointwise(cross, [a["u"], a["delta"], a["B"], a["C"]], u)
    step = shift[:, r].clone()
    shift[:, r] = 0.0
    if bool(shift.abs().max() > 0):
        raise Unprovable("what the scan reads is no linear function of the same position of the map")
    y = read_out(scan, (K, cross.channels, cross.length))
    V, bias = find_read_out(cross, scan, y)
    merge = find_merge(cross, y, y)

    emit = Emitter(gm.graph, merge.node, NAME, like=scan)
    site = scan.meta.get(SITE, scan.name)
    x = channel_first(emit, cross)
    f = emit(aten.unflatten.int, feature_maps(gm, emit, cross, weight, x, site), 3, [cross.height, cross.width])
    N = value(a["C"]).shape[2]
    parts = [emit(aten.slice.Tensor, f, 2, i, j) for i, j in ((0, r), (r + 1, r + 1 + N), (r + 1 + N, r + 1 + 2 * N))]
    delta = emit(aten.select.int, f, 2, r)
    [decays] = evaluate([a["A"]], {}, 1)
    if a["delta_bias"] is not None:
        step += evaluate([a["delta_bias"]], {}, 1)[0]
    one = r == 1 and bool((V - 1.0).abs().max() <= 1e-12)
    order = None if cross.directions else make_buffer(gm, emit, site, "order", cross.order, cross, torch.int32)
    A = make_buffer(gm, emit, site, "A", decays, cross, torch.float32)
    dt_bias = make_buffer(gm, emit, site, "dt_bias", step, cross, torch.float32)
    yr = emit(
        torch.ops.vmeanba_fx.shared_scan2d.default, parts[0], delta, A, *parts[1:], dt_bias, list(cross.directions), order,
        bool(a["delta_softplus"]), one, torch.promote_types(value(cross.source).dtype, torch.float32),
    )  # fmt: skip
    yr = follow_weights(emit, yr, A)
    if not one:
        matrix = make_buffer(gm, emit, site, "V", V.permute(1, 0, 2).flatten(1), cross, torch.float32)
        flat = emit(aten.permute.default, emit(aten.flatten.using_ints, yr, 1, 2), [0, 2, 3, 1])
        yr = emit(aten.permute.default, emit(aten.linear.default, flat, matrix), [0, 3, 1, 2])
    out = add_skip(gm, emit, cross, merge, x, yr, bias.sum(0), site)
    merge.node.replace_all_uses_with(restore_shape(emit, out, merge))


def _cross_scan_behind(ur: fx.Node, groups: int) -> tuple[CrossScan, fx.Node]:
    """The nearest node before ``ur`` that is a map in ``groups`` orders, (B, K*D, L)."""
    reason = "it reads no map in several orders"
    for node in _ancestors(ur):
        held = value(node)
        if isinstance(held, Tensor) and held.dim() == 3 and held.shape[1] % groups == 0 and held.shape[1] > groups:
            try:
                return find_cross_scan(node, groups), node
            except Unprovable as error:
                reason = str(error)
    raise Unprovable(reason)


def _ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """``node`` and what it is computed from, nearest first, as far as the input reaches."""
    queue, seen = [node], {node}
    while queue and len(seen) < _FAR:
        node = queue.pop(0)
        yield node
        fresh = [a for a in node.all_input_nodes if a not in seen and not is_parameter_only(a)]
        seen.update(fresh)
        queue += fresh
