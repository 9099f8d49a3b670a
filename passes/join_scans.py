"""Exact: a model that scans a map once per direction, each in a call of its own, gets one fused op for all of them.

Before (VMamba's ``v0seq``, K calls)::

    xs     = cross_scan(x)                                      # (B, K, D, L)
    y_k    = selective_scan(xs[:, k], delta[:, k], A[k], B[:, k], C[:, k], delta_bias[k])      # for every k
    merged = cross_merge(stack(y_k + D_k * xs[:, k]))

After (scans of different groups know nothing of each other)::

    merged = ss2d(x, feats, ...)                                # as fuse_ss2d makes it of a single call

Taken are the scans that :mod:`fuse_ss2d` left because one direction alone is no merged map; where all of them together are
none either, they stay the calls they were.
"""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from vmeanba_fx.analysis.cross_scan import map_behind
from vmeanba_fx.analysis.evaluate import Unprovable, depends_on
from vmeanba_fx.dead_code import remove_dead_code
from vmeanba_fx.graph import (
    NOT_FUSED,
    Emitter,
    aten,
    callee,
    downstream,
    group_shape,
    scan_arguments,
    scan_nodes,
    value,
)

from .fuse_ss2d import fuse_site

NAME = "join_scans"
_JOINED = {"u": 1, "delta": 1, "A": 0, "B": 1, "C": 1, "delta_bias": 0}
"""Axis of each scan argument along which the channels, or the groups, of several scans follow each other."""


def join_scans(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite ``gm`` in place and return it."""
    for scans in _scans_of_one_map(gm):
        joined, parts = _join(scans)
        try:
            fuse_site(gm, joined)
        except Unprovable:
            for scan, part in zip(scans, parts, strict=True):
                part.replace_all_uses_with(scan)
    remove_dead_code(gm)
    return gm


def _scans_of_one_map(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """Scans of equal shape and options that read copies of the same map and not each other, two or more at a time."""
    found: dict[tuple, list[fx.Node]] = defaultdict(list)
    for owner, scan in scan_nodes(gm):
        if owner is gm and NOT_FUSED in scan.meta:
            a = scan_arguments(scan)
            try:
                source = map_behind(a["u"])
            except Unprovable:
                continue
            options = a["delta_softplus"], a["out_dtype"], a["delta_bias"] is None
            found[source, options, group_shape(value(a["u"]), value(a["B"])), value(a["A"]).shape].append(scan)
    return [s for s in found.values() if len(s) > 1 and not any(depends_on(b, a) for a in s for b in s if a is not b)]


def _join(scans: list[fx.Node]) -> tuple[fx.Node, list[fx.Node]]:
    """One scan in the place of the last of ``scans``, and the part of its output that each of them was."""
    last = scans[-1]
    emit = Emitter(last.graph, last.next, NAME, like=scans[0])
    given = [scan_arguments(s) for s in scans]
    tensors = {
        name: None if given[0][name] is None else emit(aten.cat.default, [a[name] for a in given], axis)
        for name, axis in _JOINED.items()
    }
    u, delta, A, B, C, bias = tensors.values()
    options = given[0]["delta_softplus"], given[0]["out_dtype"]
    joined = emit(callee(last), u, delta, A, B, C, None, None, bias, *options)
    rows = value(scans[0]).shape[1]
    parts = [emit(aten.slice.Tensor, joined, 1, i * rows, (i + 1) * rows) for i in range(len(scans))]
    for scan, part in zip(scans, parts, strict=True):
        scan.replace_all_uses_with(part)
    _move_behind(parts)
    return joined, parts


def _move_behind(parts: list[fx.Node]) -> None:
    """What reads the output of a scan that has moved down moves down behind it, in the same order."""
    graph, anchor = parts[0].graph, parts[-1]
    readers = downstream(graph, set(parts)) - set(parts)
    for node in list(graph.nodes):
        if node is parts[0]:
            return
        if node in readers:
            anchor.append(node)
            anchor = node
