"""Exact: what is left of a site whose scan was dropped, D*u scattered in K orders and merged again, is one product.

Before::

    xs     = cross_scan(x)                 # (B, K*D, L)
    merged = cross_merge(D * xs)           # (B, D, L)

After (the merge puts every copy back where it came from)::

    merged = (sum_k D_k) * x

With it the last trace of the cross scan and merge goes at replaced sites that a LayerNorm follows.
"""

from __future__ import annotations

import torch
from torch import fx

from vmeanba_fx.analysis.cross_scan import find_cross_scan, find_merge
from vmeanba_fx.analysis.evaluate import Unprovable
from vmeanba_fx.dead_code import remove_dead_code
from vmeanba_fx.graph import NOT_FUSED, SITE, Emitter, aten, value

from .drop_annihilated import SKIP
from .fused_site import channel_first, restore_shape

NAME = "merge_skips"


def merge_skips(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite ``gm`` in place and return it."""
    for product in list(gm.graph.nodes):
        if SKIP in product.meta:
            try:
                _merge(gm, product)
            except Unprovable as reason:
                product.meta[NOT_FUSED] = str(reason)
    remove_dead_code(gm)
    return gm


def _merge(gm: fx.GraphModule, product: fx.Node) -> None:
    groups = product.meta[SKIP]
    u = next((a for a in product.all_input_nodes if value(a).dim() == 3), None)
    if u is None:
        raise Unprovable("the skip is no product with u")
    cross = find_cross_scan(u, groups)
    merge = find_merge(cross, product, None)
    emit = Emitter(gm.graph, merge.node, NAME, like=product)
    x = channel_first(emit, cross)
    dtype = value(merge.node).dtype
    if value(x).dtype != dtype:
        x = emit(aten.to.dtype, x, dtype)
    skip = torch.zeros(cross.channels) if merge.skip is None else merge.skip
    skip = skip.to(value(cross.source).device, dtype).reshape(-1, 1, 1)
    weight = emit.get_attr(gm, f"{product.meta[SITE]}.D", skip, trained=True)
    merge.node.replace_all_uses_with(restore_shape(emit, emit(aten.mul.Tensor, x, weight), merge))
