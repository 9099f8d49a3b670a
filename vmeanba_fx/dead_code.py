"""What nothing reads any more leaves the graph: nodes, and the modules, parameters and buffers behind them."""

from __future__ import annotations

import itertools

from torch import fx

from .graph import CHECKS, aten, graph_modules


def _is_effect_free(node: fx.Node) -> bool:
    """True where a node may go once nothing reads it: pure operators, attribute reads, metadata assertions."""
    if node.op == "get_attr" or node.target in CHECKS:
        return True
    if node.target is aten.dropout.default and not node.args[2]:  # fx takes it for a random number
        return True
    return node.op == "call_function" and not node.is_impure()


def remove_dead_code(gm: fx.GraphModule) -> int:
    """Erase nodes nothing reads, metadata assertions on values nothing else reads, and unread buffers; count of nodes."""
    removed = 0
    for owner in graph_modules(gm):
        removed += _remove_dead_nodes(owner.graph)
        owner.recompile()
    _drop_unused(gm)
    return removed


def _remove_dead_nodes(graph: fx.Graph) -> int:
    removed = 0
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output") or not _is_effect_free(node):
            continue
        users = list(node.users)
        if any(user.target not in CHECKS for user in users):
            continue
        if node.target in CHECKS and not users:
            # An assertion goes with the value it watches, not before.
            continue
        for user in users:
            graph.erase_node(user)
            removed += 1
        graph.erase_node(node)
        removed += 1
    return removed


def _drop_unused(gm: fx.GraphModule) -> None:
    """Delete modules, parameters and buffers that no node refers to any more, so that the result is as small as it is.

    ``delete_all_unused_submodules`` of fx takes a region inside of a region for unused.
    """
    used: set[str] = set()
    for name, owner in gm.named_modules():
        if isinstance(owner, fx.GraphModule):
            prefix = f"{name}." if name else ""
            for node in owner.graph.nodes:
                if node.op in ("get_attr", "call_module"):
                    used.add(prefix + str(node.target))
                if node.op == "call_module":
                    inside = owner.get_submodule(str(node.target))
                    parts = (*inside.named_modules(), *inside.named_parameters(), *inside.named_buffers())
                    used |= {f"{prefix}{node.target}.{part}" for part, _ in parts}
    within = {part for path in used for part in itertools.accumulate(path.split("."), "{}.{}".format)}
    for path in [path for path, _ in gm.named_modules() if path and path not in within]:
        gm.delete_submodule(path)
    for path in [k for k, _ in (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False))]:
        if path not in used:
            module, _, leaf = path.rpartition(".")
            delattr(gm.get_submodule(module), leaf)
