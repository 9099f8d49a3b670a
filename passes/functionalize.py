"""Exact: writes into slices of a fresh tensor become scatter nodes, so that plain data flow tells the whole story.

Before (VMamba's cross scan, ``y = x.new_empty(...); y[:, 0] = a; use(y)``)::

    base  = aten.new_empty(x, ...)
    view  = aten.select(base, 1, 0)
    _     = aten.copy_(view, a)
    out   = use(base)

After::

    base  = aten.new_empty(x, ...)
    base1 = aten.select_scatter(base, a, 1, 0)
    out   = use(base1)

Only writes whose target is a chain of ``slice``/``select`` views of a tensor made inside the graph are rewritten; any
other mutation is left alone and stays where it was.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from vmeanba_fx.graph import Emitter, args_of, aten, graph_modules, value

NAME = "functionalize"
_FRESH = {
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.empty.memory_format,
    aten.zeros.default,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.clone.default,
}
_SCATTER: dict[Any, Callable[..., Any]] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


def functionalize(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite ``gm`` in place and return it."""
    for owner in graph_modules(gm):
        for node in list(owner.graph.nodes):
            if node.target is aten.copy_.default:
                _rewrite_copy(owner.graph, node)
        owner.recompile()
    return gm


def _rewrite_copy(graph: fx.Graph, copy_: fx.Node) -> None:
    destination, source = args_of(copy_)[:2]
    chain: list[fx.Node] = []
    base = destination
    while isinstance(base, fx.Node) and base.target in _SCATTER:
        chain.append(base)
        base = base.args[0]
    written = _SCATTER.values()
    if not isinstance(base, fx.Node) or (base.target not in _FRESH and base.target not in written):
        return
    order = {n: i for i, n in enumerate(graph.nodes)}
    if _has_live_views(base, {*chain, copy_}, order[copy_], order):
        return
    emit = Emitter(graph, copy_, NAME)
    new = source
    shape, dtype = value(destination).shape, value(destination).dtype
    if value(source).dtype != dtype:
        new = emit(aten.to.dtype, new, dtype)
    if tuple(value(source).shape) != tuple(shape):
        new = emit(aten.expand_as.default, new, destination)
    for view in chain:
        x, *rest = args_of(view)
        new = emit(_SCATTER[view.target], x, new, *rest)
    new_base = new
    copy_.replace_all_uses_with(new_base)
    for user in list(base.users):
        if order.get(user, -1) > order[copy_]:
            user.replace_input_with(base, new_base)
    graph.erase_node(copy_)
    for view in chain:
        if not view.users:
            graph.erase_node(view)


def _has_live_views(base: fx.Node, chain: set[fx.Node], position: int, order: dict[fx.Node, int]) -> bool:
    """True where a view taken before the write is read after it: that reader would miss the write."""
    views = [base]
    while views:
        for user in views.pop().users:
            if user in chain or order.get(user, position) > position:
                continue
            if user.target is operator.getitem or _may_alias(user):
                if any(order.get(u, -1) > position for u in user.users):
                    return True
                views.append(user)
    return False


def _may_alias(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)
