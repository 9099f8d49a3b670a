"""What is known of a result's form before any input is: its number of dimensions, its shape, its length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .proxy import ShadowProxy, proxies_in, shadows_of

# Questions about a tensor's form; asked of parameters and constants the answer is a constant.
FORM = frozenset("size dim ndim ndimension numel nelement stride storage_offset __len__ is_contiguous".split())
_SETS_RANK = frozenset({"view", "reshape", "expand", "repeat"})  # to the number of their arguments
_CHANGES_RANK = frozenset({"squeeze", "squeeze_"})  # by sizes, which are no constants
_SHAPED_BY_DATA = frozenset(
    "nonzero argwhere masked_select unique unique_consecutive where repeat_interleave bincount".split()
)
_SYMBOLS = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**",
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
}  # fmt: skip


def name_of(target: Any) -> str:
    """Name of a node's target, be it a method name, a module path or a function."""
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def rank_follows(
    kind: str, target: Any, args: Any, kwargs: Any, leaf: torch.nn.Module | None, ranked: set[fx.Node]
) -> bool:
    """Whether the result's number of dimensions follows from that of ``ranked`` nodes, for any input.

    ``leaf``: the module of a ``call_module`` node. Functions and modules of the user may do anything, so they end it.
    """
    if kind == "call_method" and target in _SETS_RANK and len(args) > 1 and _are_sizes(args[1:]):
        return True
    inputs = proxies_in((args, kwargs))
    if not all(p.node in ranked or not isinstance(p.shadow, (Tensor, tuple, list)) for p in inputs):
        return False
    if kind == "call_module":
        return type(leaf).__module__.startswith("torch.nn.")
    if kind == "call_method":
        return not changes_rank(target)
    module = getattr(target, "__module__", None) or "torch"  # torch's builtin functions have no module
    return module.split(".")[0] in ("torch", "_operator", "builtins") and not changes_rank(target)


def changes_rank(target: Any) -> bool:
    """Whether the number of dimensions of the result depends on the sizes of the input."""
    return name_of(target) in _CHANGES_RANK


def _are_sizes(arguments: tuple[Any, ...]) -> bool:
    """Whether a fixed number of sizes was given, one by one or as one tuple or list."""
    sizes = arguments[0] if isinstance(arguments[0], (tuple, list)) else arguments
    return type(sizes) is not ShadowProxy and all(isinstance(shadows_of(size), int) for size in sizes)


def shape_is_constant(target: Any, args: Any, value: Any) -> bool:
    """Whether a function of constants has a shape that does not depend on their data, which may be loaded anew."""
    name = name_of(target)
    indexed_by_data = name == "getitem" and any(isinstance(p.shadow, Tensor) for p in proxies_in(args[1:]))
    return isinstance(value, (Tensor, tuple, list)) and name not in _SHAPED_BY_DATA and not indexed_by_data


def has_fixed_length(target: Any, args: Any, value: Any, inputs: list[ShadowProxy]) -> bool:
    """Whether a returned tuple or list has this length for any input."""
    if not isinstance(value, (tuple, list)):
        return False
    name = name_of(target)
    # chunk() gives fewer parts of a short input, and then reading the last one fails by itself.
    if name == "chunk" or hasattr(value, "n_sequence_fields") or hasattr(value, "_fields"):
        return True
    sizes = args[1] if name in ("split", "split_with_sizes", "tensor_split") and len(args) > 1 else None
    if isinstance(sizes, (tuple, list)):
        return True
    if not inputs:
        return False
    return all(p.static for p in inputs) or (name == "getitem" and inputs[0].fixed_length)


def describe(node: Any, scalars: set[fx.Node], depth: int = 6) -> str:
    """A size computation as its source would look: ``x.size(3) % 2 != 0``."""
    if not isinstance(node, fx.Node) or depth == 0:
        return str(node)
    if node.op == "get_attr":
        return str(node.target)
    args = [describe(a, scalars, depth - 1) for a in node.args]
    name = name_of(node.target)
    if node.target is getattr:
        return f"{args[0]}.{node.args[1]}"
    if node not in scalars:
        return node.name
    if name in _SYMBOLS and len(args) == 2:
        left, right = (f"({a})" if " " in a else a for a in args)
        return f"{left} {_SYMBOLS[name]} {right}"
    if node.op == "call_method":
        return f"{args[0]}.{name}({', '.join(args[1:])})"
    return f"{args[0]}[{args[1]}]" if name == "getitem" else f"{name}({', '.join(args)})"
