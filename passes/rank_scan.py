"""Lossy: a scan of r channels per direction with learned projections in place of a full selective scan.

Before::

    y = vmeanba_fx.selective_scan(u, delta, A, B, C, None, None, delta_bias, True)     # (B, K*D, L)

After, with W (K, r, D), V (K, D, r) and weights w (K, D) that add up to 1, from :mod:`vmeanba_fx.fitting.rank_fits`::

    ur     = W @ u                                             # (B, K, r, L)
    delta1 = w . (delta + delta_bias)                          # (B, K, L)
    A1     = w . A                                             # (K, N)
    yr     = vmeanba_fx.shared_scan(ur, delta1, A1, B, C, None, True)                  # (B, K, r, L)
    y      = V @ yr + b                                        # (B, K*D, L)

The paper's block with the mean of the inputs is r = 1, W = w = 1/D, V = 1. The ``+ D*u`` behind the scan stays, with the fitted
``s`` added to D: no cost at run time. ``b`` is absent where the fit has none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from vmeanba_fx.dead_code import remove_dead_code
from vmeanba_fx.errors import SiteError
from vmeanba_fx.fitting.rank_block import RankFit, rank_block
from vmeanba_fx.graph import SITE, Emitter, args_of, aten, find_scan, group_shape, scan_arguments, value
from vmeanba_fx.sites import skip_product

NAME = "rank_scan"
RANK = "vmeanba_fx.rank"
"""``node.meta`` key of the node that holds a rank-r site's output (B, K*D, L); its value is the rank."""


def rank_scan(gm: fx.GraphModule, fits: Mapping[str, RankFit]) -> fx.GraphModule:
    """Replace the scans of the sites named in ``fits`` (in place) and return ``gm``.

    Raises:
        SiteError: ``gm`` has no scan of that name, or the scan lies inside an autocast or checkpoint region.
    """
    found = {name: find_scan(gm, name) for name in fits}
    for name, (owner, scan) in found.items():
        if owner is not gm:
            raise SiteError(f"{name}: it lies inside an autocast or checkpoint region, where a rank-r scan cannot be put")
        _replace(gm, scan, fits[name])
    remove_dead_code(gm)
    return gm


def _replace(gm: fx.GraphModule, scan: fx.Node, fit: RankFit) -> None:
    args = scan_arguments(scan)
    emit = Emitter(gm.graph, scan, NAME, like=scan)
    prefix = scan.meta[SITE]
    device = value(args["u"]).device

    def constant(name: str, tensor: Tensor, dtype: torch.dtype) -> fx.Node:
        return emit.get_attr(gm, f"{prefix}_{name}", tensor.to(device, dtype).contiguous(), trained=True)

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
    D = next(a for a in args_of(product) if a is not scan.args[0])
    emit = Emitter(gm.graph, product, NAME, like=scan)
    held = value(D)
    buffer = emit.get_attr(gm, f"{prefix}_D_change", change.reshape(held.shape[-2:]).to(held.device, held.dtype))
    product.replace_input_with(D, emit(aten.add.Tensor, D, buffer))
