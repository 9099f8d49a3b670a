"""What happens to a value between two places of a graph, found by running that region, never by the names of its nodes.

:func:`linear_region` collects the nodes that carry a value by linear steps only (views, permutations, copies, casts, sums,
products with something else) up to the channel LayerNorms that end it. :func:`is_annihilated` then *runs* the region in
float64 on a channel-constant value: where every LayerNorm sees a shift that is constant along the axis it normalises, the
value makes no difference to its output (``LN(x + c*1) = LN(x)``, method section 3.1 of the project's notes).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from ..graph import args_of, aten, callee, concrete_size, concrete_sizes, describe, value

# Linear in their tensor inputs, whatever their other arguments are. Products are allowed with one reached factor only.
LINEAR = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int,
    aten.t.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.expand.default, aten.expand_as.default, aten.select.int,
    aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
    aten.narrow.default, aten.flip.default, aten.rot90.default, aten.roll.default, aten.index_select.default,
    aten.index.Tensor, aten.cat.default, aten.stack.default, aten.slice_scatter.default, aten.select_scatter.default,
    aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.sum.dim_IntList, aten.repeat.default,
    aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist, aten.swapaxes.default,
    aten.swapdims.default, aten.mT.default, aten.numpy_T.default, aten.ravel.default, aten.tile.default,
    aten.broadcast_to.default, aten.tensor_split.sections, aten.gather.default, aten.scatter.src, aten.index_put.default,
    aten.index_copy.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.copy.default,
    aten.as_strided_scatter.default, operator.getitem,
}  # fmt: skip
PRODUCT = {aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar}
# The identity up to rounding; run as the identity so that the check is exact.
IDENTITY = {
    aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default, aten.to.dtype,
    aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.dropout.default,
    aten.lift_fresh_copy.default, aten.view_as.default, aten.type_as.default,
}  # fmt: skip
# Read no number of it: its sizes and dtype at most.
NOTHING = {
    aten._assert_tensor_metadata.default, aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default,
    aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
    aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
}  # fmt: skip
LAYER_NORMS = {aten.layer_norm.default, aten.native_layer_norm.default}


@dataclass(frozen=True)
class Region:
    """``nodes``: the linear nodes a value flows through, in order; ``norms``: the LayerNorms it ends in."""

    start: fx.Node
    nodes: tuple[fx.Node, ...]
    norms: tuple[fx.Node, ...]


def linear_region(start: fx.Node) -> Region | str:
    """The region from ``start`` to the channel LayerNorms behind it, or a sentence saying why there is none."""
    reached = {start}
    nodes: list[fx.Node] = []
    norms: list[fx.Node] = []
    for node in start.graph.nodes:
        inputs = [a for a in node.all_input_nodes if a in reached]
        if not inputs or node is start or node.target in NOTHING:
            continue
        if node.target in LAYER_NORMS:
            if inputs != [node.args[0]] or node.args[0] in node.args[2:] or len(node.args[1]) != 1:
                return f"{node.name} is a LayerNorm over {len(node.args[1])} axes, not over the channels alone"
            norms.append(node)
            continue
        if node.op != "call_function" or not _is_linear(node, reached):
            return f"{_describe(node)} reads it before any LayerNorm"
        reached.add(node)
        nodes.append(node)
    if not norms:
        return "nothing normalises it"
    return Region(start, tuple(nodes), tuple(norms))


def _is_linear(node: fx.Node, reached: set[fx.Node]) -> bool:
    if node.target in IDENTITY:
        return node.args[0] in reached
    if node.target in PRODUCT:
        return (node.args[0] in reached and node.args[1] not in reached) or (
            node.target is aten.mul.Tensor and node.args[1] in reached and node.args[0] not in reached
        )
    return node.target in LINEAR


def is_linear_in(node: fx.Node, start: fx.Node) -> bool:
    """Whether ``node`` is a linear step from ``start`` alone, so that it is zero where ``start`` is."""
    others = [n for n in node.all_input_nodes if n is not start and isinstance(value(n), Tensor)]
    if node.target in PRODUCT:
        return _is_linear(node, {start})
    return _is_linear(node, {start}) and not any(value(n).dtype.is_floating_point for n in others)


def _describe(node: fx.Node) -> str:
    if node.op == "output":
        return "the model's output"
    name = getattr(node.target, "__name__", str(node.target))
    return f"{node.name} ({name})"


def concrete_shape(node: fx.Node) -> tuple[int, ...]:
    """Sizes of a node's value; a dynamic size is taken at the value it was traced with."""
    return concrete_sizes(value(node))


def run_region(region: Region, seed: Tensor, generator: torch.Generator) -> dict[fx.Node, Tensor]:
    """Input of every LayerNorm of ``region`` for ``seed`` at its start; everything else that enters is random, float64.

    The random values depend on ``generator`` alone, so two runs from the same seed differ by the region's image of the
    difference of their seeds.
    """
    env: dict[fx.Node, Any] = {region.start: seed}

    def lookup(arg: fx.Node) -> Any:
        if arg not in env:
            env[arg] = _outside(arg, generator)
        return env[arg]

    for node in region.nodes:
        if node.target in IDENTITY:
            env[node] = lookup(args_of(node)[0])
            continue
        args, kwargs = pytree.tree_map_only(fx.Node, lookup, (node.args, dict(node.kwargs)))
        # A view of a value whose copy was skipped may meet strides it cannot view.
        target = aten.reshape.default if node.target in (aten.view.default, aten._unsafe_view.default) else callee(node)
        env[node] = target(*args, **kwargs)
    return {norm: env[args_of(norm)[0]] for norm in region.norms}


def _outside(node: fx.Node, generator: torch.Generator) -> Any:
    held = value(node)
    if isinstance(held, Tensor):
        # Integers are positions: where they come from the graph's own tables, those decide what goes where.
        if not held.dtype.is_floating_point:
            return _constant(node)
        return torch.randn(concrete_shape(node), dtype=torch.float64, generator=generator)
    if isinstance(held, torch.SymInt):
        return concrete_size(held)
    return held


def _constant(node: fx.Node) -> Any:
    """An integer tensor of the graph's own: an attribute, or what is made of attributes alone."""
    if node.op == "get_attr" and node.graph.owning_module is not None:
        found: Any = node.graph.owning_module
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found.cpu()
    if node.op != "call_function":
        raise RuntimeError(f"it reads positions from {node.name}, which depends on the input")
    args, kwargs = pytree.tree_map_only(fx.Node, _constant_argument, (node.args, dict(node.kwargs)))
    made = callee(node)(*args, **kwargs)
    return made.cpu() if isinstance(made, Tensor) else made


def _constant_argument(node: fx.Node) -> Any:
    held = value(node)
    return concrete_size(held) if isinstance(held, torch.SymInt) else _constant(node)


def is_annihilated(start: fx.Node, groups: int) -> tuple[bool, str]:
    """Whether a term of ``start`` (B, K*D, L) that is constant over each group's channels changes nothing downstream.

    Returns (True, the LayerNorms that absorb it) or (False, the reason why it lives on).
    """
    region = linear_region(start)
    if isinstance(region, str):
        return False, region
    batch, channels, length = concrete_shape(start)
    seed = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, groups, 1, length, dtype=torch.float64, generator=seed)
    constant = noise.expand(-1, -1, channels // groups, -1).reshape(batch, channels, length)
    state = seed.get_state()
    try:
        moved = run_region(region, constant, seed)
        seed.set_state(state)
        still = run_region(region, torch.zeros_like(constant), seed)
    except (RuntimeError, IndexError, TypeError) as error:
        return False, f"the region behind it could not be run ({str(error).splitlines()[0]})"
    for norm, there in moved.items():
        shift = there - still[norm]
        spread = (shift - shift.mean(-1, keepdim=True)).abs().max().item()
        if not spread <= 1e-9 * max(shift.abs().max().item(), 1.0):
            return False, f"it reaches {norm.name} differently in different channels"
    return True, ", ".join(map(describe, region.norms))
