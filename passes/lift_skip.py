"""Exact: what surrounds the recurrence leaves the scan op, so that a site is the smallest thing and algebra sees the rest.

Before::

    y = vmeanba_fx.selective_scan(u, delta, A, B, C, D, z, delta_bias, True, dtype)

After::

    y = vmeanba_fx.selective_scan(u, delta, A, B, C, None, None, delta_bias, True, float32)
    y = y + D.unsqueeze(-1) * u
    y = y * silu(z)
    y = to(y, dtype)

Captured calls of public code come out like this already; models that call our op with D or z are brought to it.
"""

from __future__ import annotations

import torch
from torch import fx

from vmeanba_fx.graph import Emitter, arguments, aten, callee, scan_nodes, value

NAME = "lift_skip"


def lift_skip(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite ``gm`` in place and return it."""
    for owner, scan in scan_nodes(gm):
        a = arguments(scan)
        if a["D"] is None and a["z"] is None:
            continue
        wanted = a["out_dtype"] or value(a["u"]).dtype
        compute = torch.promote_types(value(a["u"]).dtype, torch.float32)
        emit = Emitter(owner.graph, scan, NAME, like=scan)
        y = emit(
            callee(scan), a["u"], a["delta"], a["A"], a["B"], a["C"], None, None, a["delta_bias"],
            bool(a["delta_softplus"]), compute,
        )  # fmt: skip
        if a["D"] is not None:
            D = a["D"] if value(a["D"]).dtype == compute else emit(aten.to.dtype, a["D"], compute)
            D = emit(aten.unsqueeze.default, D, -1)
            y = emit(aten.add.Tensor, y, emit(aten.mul.Tensor, D, a["u"]))
        if a["z"] is not None:
            z = a["z"] if value(a["z"]).dtype == compute else emit(aten.to.dtype, a["z"], compute)
            y = emit(aten.mul.Tensor, y, emit(aten.silu.default, z))
        if wanted != compute:
            y = emit(aten.to.dtype, y, wanted)
        scan.replace_all_uses_with(y)
        owner.graph.erase_node(scan)
        owner.recompile()
    return gm
