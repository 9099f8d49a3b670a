"""Gates in a captured graph: each blends what a site gives with what its replacement would give.

A gate sits where the branch of its site joins the residual stream, not at the scan itself: a LayerNorm in between undoes
most of a blend of scans, and shows nothing of the replacement until the gate is almost at 1. Before and after::

    out = x + f(scan(u, ...))          out = x + b,   b = f(scan(u, ...)) + g * (f(replaced(u, ...)) - f(scan(u, ...)))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call

from ..graph import SITE, Emitter, aten, copy_graph, downstream, find_scan, graph_modules, mutates, value
from ..sites import Site, skip_product
from .metrics import Batch
from .replacing import Replacer

_GATE = "_gate_{}"


class Gated:
    """A captured graph with a gate at each of the sites ``left``; the sites ``taken`` are replaced in it.

    Calling it with ``gates`` (images, len(left)) gives the outputs. Right at 0 and in first order there, which is all
    that is asked: no gradient flows through the replacements, which would have to be kept in memory for it.
    """

    def __init__(self, gm: fx.GraphModule, left: Sequence[Site], taken: Sequence[Site], replacer: Replacer) -> None:
        self.gm = replacer.rewrite(copy_graph(gm), [s.name for s in taken])
        self.names: list[str] = []
        writes = any(mutates(node) for owner in graph_modules(self.gm) for node in owner.graph.nodes)
        for i, site in enumerate(left):
            owner, scan = find_scan(self.gm, site.name)
            path = next(name for name, module in self.gm.named_modules() if module is owner)
            _insert_gate(owner, scan, [scan] if writes else branch_of(scan), _GATE.format(i))
            replacer.rewrite(self.gm, [site.name])
            self.names.append(f"{path}.{_GATE.format(i)}".lstrip("."))
        self.gm.requires_grad_(False)

    def __call__(self, gates: Tensor, batch: Batch) -> Any:
        given = {name: gates[:, i] for i, name in enumerate(self.names)}
        return functional_call(self.gm, given, batch.args, dict(batch.kwargs))


def branch_of(scan: fx.Node) -> list[fx.Node]:
    """The nodes from ``scan`` to the last one before its branch joins a stream that it has not touched, in graph order.

    The last one is the only one that the rest of the graph reads. Just ``scan`` where there is no such place.
    """
    graph = scan.graph
    below = downstream(graph, {scan})
    for join in reversed(graph.nodes):
        if join not in below or join.target is not aten.add.Tensor:
            continue
        touched = [a for a in join.all_input_nodes if a in below]
        if len(join.all_input_nodes) == 2 and len(touched) == 1:
            branch = _nodes_before(scan, touched[0])
            if branch:
                return branch
    return [scan]


def _nodes_before(scan: fx.Node, end: fx.Node) -> list[fx.Node]:
    """What ``scan`` reaches without passing ``end``, with ``end``; empty where that is not all cut off by ``end``."""
    reached, stack = {scan, end}, [] if scan is end else [scan]
    while stack:
        for user in stack.pop().users:
            if user not in reached:
                reached.add(user)
                stack.append(user)
    if any(node.op == "output" for node in reached):
        return []
    return [node for node in scan.graph.nodes if node in reached]


def _insert_gate(owner: fx.GraphModule, scan: fx.Node, branch: list[fx.Node], name: str) -> None:
    """Blend the end of ``branch`` with that of a twin branch, whose scan then has the name of the site."""
    owner.register_buffer(name, torch.zeros(1))
    graph, site, end = scan.graph, scan.meta[SITE], branch[-1]
    following = end.next
    emit = Emitter(graph, following, "gate", like=end)
    twins: dict[fx.Node, fx.Node] = {}

    def twin_of(arg: fx.Node) -> fx.Node:
        if arg not in twins and isinstance(value(arg), Tensor) and arg.op != "get_attr":
            twins[arg] = emit(aten.detach.default, arg)
        return twins.get(arg, arg)

    skip = skip_product(scan)  # a rank-r fit changes its D
    for node in branch if skip is None or skip in branch else [skip, *branch]:
        args = fx.map_arg((node.args, node.kwargs), twin_of)  # emits, so it comes first
        with graph.inserting_before(following):
            twins[node] = graph.create_node(node.op, node.target, *args)
        twins[node].meta = {k: f"{v} (twin)" if k == SITE else v for k, v in node.meta.items()}
    with graph.inserting_before(following):
        gate = graph.get_attr(name)
        blend = graph.call_function(_blend, (end, twins[end], gate))
    blend.meta = {k: v for k, v in end.meta.items() if k != SITE}
    end.replace_all_uses_with(blend, delete_user_cb=lambda user: user is not blend)
    scan.meta[SITE], twins[scan].meta[SITE] = f"{site} (kept)", site


def _blend(original: Tensor, replaced: Tensor, gate: Tensor) -> Tensor:
    """``gate`` (images,); where images are cut into windows, each window gets the gate of its image."""
    gate = gate.to(original.dtype).repeat_interleave(original.shape[0] // gate.shape[0])
    return original + gate.reshape(-1, *[1] * (original.dim() - 1)) * (replaced - original).detach()
