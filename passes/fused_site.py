"""What the passes that fuse sites share: a site that is not provably the pattern stays, and the nodes around one that is.

No pass by itself; :mod:`fuse_ss2d`, :mod:`fuse_shared`, :mod:`fuse_means` and :mod:`merge_skips` are made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx

from vmeanba_fx.analysis.cross_scan import CrossScan, Merge
from vmeanba_fx.analysis.evaluate import Unprovable, is_parameter_only
from vmeanba_fx.dead_code import remove_dead_code
from vmeanba_fx.graph import NOT_FUSED, Emitter, aten, value


def fuse_each(
    gm: fx.GraphModule,
    scans: Iterable[tuple[fx.GraphModule, fx.Node]],
    fuse: Callable[[fx.GraphModule, fx.Node], None],
) -> fx.GraphModule:
    """``fuse(gm, scan)`` for each (owner, scan), and what is dead then goes. Returns ``gm``.

    What ``fuse`` cannot prove it leaves alone by raising :class:`Unprovable`; the scan's ``meta`` then says why.
    """
    for owner, scan in scans:
        try:
            if owner is not gm:
                raise Unprovable("it lies inside an autocast or checkpoint region")
            fuse(gm, scan)
        except Unprovable as reason:
            scan.meta[NOT_FUSED] = str(reason)
    remove_dead_code(gm)
    return gm


def channel_first(emit: Emitter, cross: CrossScan) -> fx.Node:
    """The source of a cross scan as a (B, D, H, W) node."""
    x = cross.source
    dims = value(x).dim()
    if cross.last:
        x = emit(aten.permute.default, x, [0, dims - 1, *range(1, dims - 1)])
    if dims == 3:
        return emit(aten.unflatten.int, x, 2, [cross.height, cross.width])
    sizes = [cross.channels, cross.height, cross.width]
    return x if list(value(x).shape[1:]) == sizes else emit(aten.reshape.default, x, [-1, *sizes])


def restore_shape(emit: Emitter, merged: fx.Node, merge: Merge) -> fx.Node:
    """A (B, D, H, W) node in the shape of the merged node it replaces."""
    if merge.last:
        merged = emit(aten.permute.default, merged, [0, 2, 3, 1])
    if value(merged).shape[1:] == value(merge.node).shape[1:]:
        return merged
    return emit(aten.reshape.default, merged, [-1, *(int(s) for s in value(merge.node).shape[1:])])


def follow_weights(emit: Emitter, out: fx.Node, weight: fx.Node) -> fx.Node:
    """``out``, whose dtype is fixed, in the dtype that ``weight`` will have: after ``gm.half()`` its readers want half."""
    return emit(aten.type_as.default, out, weight) if value(out).dtype == value(weight).dtype else out


def make_buffer(
    gm: fx.GraphModule, emit: Emitter, site: str, name: str, tensor: Tensor, cross: CrossScan,
    dtype: torch.dtype | None = None,
) -> fx.Node:  # fmt: skip
    """``tensor`` on the device of ``cross``; in its dtype, or in ``dtype`` where that is wider or no float. Floats are
    weights, made of those of the model, and can be trained as those could."""
    held = value(cross.source)
    if dtype is None or dtype.is_floating_point:
        dtype = held.dtype if dtype is None else torch.promote_types(held.dtype, dtype)
    return emit.get_attr(gm, f"{site}.{name}", tensor.to(held.device, dtype).contiguous(), dtype.is_floating_point)


def feature_maps(
    gm: fx.GraphModule, emit: Emitter, cross: CrossScan, weight: Tensor, x: fx.Node, site: str
) -> fx.Node:
    """(B, K, F, L), each feature a map of its own, as the scan kernels read them best."""
    K, F, D = weight.shape
    matrix = make_buffer(gm, emit, site, "x_proj", weight.reshape(1, K * F, D), cross)
    f = emit(aten.matmul.default, matrix, emit(aten.flatten.using_ints, x, 2, 3))
    return emit(aten.unflatten.int, f, 1, [K, F])


def add_skip(
    gm: fx.GraphModule, emit: Emitter, cross: CrossScan, merge: Merge, x: fx.Node, y: fx.Node, bias: Tensor | None, site: str
) -> fx.Node:
    """y (B, D or 1, H, W) + skip * x + bias in the dtype of the merged map: for one channel in one pass over memory."""
    skip = torch.zeros(cross.channels, dtype=torch.float64) if merge.skip is None else merge.skip
    wanted = value(merge.node).dtype
    shift = None if bias is None or not bool(bias.abs().max() > 0) else bias
    if value(y).shape[1] == 1 and shift is None:
        y, x = (emit(aten.flatten.using_ints, t, 2, 3) for t in (y, x))
        D = make_buffer(gm, emit, site, "D", skip, cross, torch.float32)
        out = emit(torch.ops.vmeanba_fx.broadcast_add.default, emit(aten.unsqueeze.default, y, 2), x, D, wanted)
        return emit(aten.unflatten.int, follow_weights(emit, out, D), 2, [cross.height, cross.width])
    D = make_buffer(gm, emit, site, "D", skip.reshape(-1, 1, 1), cross, torch.float32)
    out = emit(aten.add.Tensor, emit(aten.mul.Tensor, x, D), y)
    if shift is not None:
        out = emit(aten.add.Tensor, out, make_buffer(gm, emit, site, "bias", shift.reshape(-1, 1, 1), cross, torch.float32))
    return out if value(out).dtype == wanted else emit(aten.to.dtype, out, wanted)


def read_out(scan: fx.Node, sizes: tuple[int, int, int]) -> fx.Node:
    """The node behind ``scan`` that holds its output for all channels, (B, K*D, L), before anything else is added."""
    K, D, L = sizes
    found, node = None, scan
    while len(node.users) == 1:
        [user] = node.users
        if any(a is not node and not is_parameter_only(a) for a in user.all_input_nodes):
            break
        node, held = user, value(user)
        if isinstance(held, Tensor) and tuple(held.shape[1:]) == (K * D, L):
            found = node
    if found is None:
        raise Unprovable("its output is not brought back to all channels by itself")
    return found
