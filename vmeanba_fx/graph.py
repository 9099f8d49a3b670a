"""Small helpers on captured graphs: which nodes are scans, how sites are named, how passes add and remove nodes."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode

from .errors import GraphCheckError, SiteError, UnknownSizeError
from .ops import last_state as _last_state  # noqa: F401  registers torch.ops.vmeanba_fx.*

aten = torch.ops.aten
CHECKS = {aten._assert_tensor_metadata.default}
"""Operators that only look at a value."""
SCAN = (torch.ops.vmeanba_fx.selective_scan, torch.ops.vmeanba_fx.selective_scan.default)
LAST_STATE = (torch.ops.vmeanba_fx.last_state, torch.ops.vmeanba_fx.last_state.default)
SITE = "vmeanba_fx.site"
MADE_BY = "vmeanba_fx.pass"
GUARDS = "_guards_fn"
"""Attribute of a captured graph: the module that checks its inputs."""
REPORT = "vmeanba_fx.report"
"""``gm.meta`` key of a rewritten graph: its report."""
NOT_FUSED = "vmeanba_fx.not_fused"
"""``node.meta`` key: the sentence why an exact pass left this node's site on the scanned copies of its map."""


def graph_modules(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """``gm`` and the sub-graphs inside it (bodies of autocast and checkpoint regions), outermost first."""
    yield gm
    for name, child in gm.named_modules():
        if name and isinstance(child, fx.GraphModule) and not name.startswith(GUARDS):
            yield child


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A deep copy, without the warning torch 2.13 gives about its own deprecated tree specs.

    Raises:
        GraphCheckError: the weights are packed for a CPU.
    """
    if any(t.is_mkldnn for t in gm.buffers()):
        raise GraphCheckError("weights packed by pack_weights can only run: start from the graph that they were packed from")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(gm)


def scan_nodes(gm: fx.GraphModule) -> list[tuple[fx.GraphModule, fx.Node]]:
    """Every full selective-scan node of ``gm`` and of its sub-graphs with the graph that owns it, in order of execution."""
    found: list[tuple[fx.GraphModule, fx.Node]] = []
    for node in gm.graph.nodes:
        if node.target in SCAN:
            found.append((gm, node))
        elif node.op == "call_function":  # a region operator takes its body, a sub-graph, as an argument
            for body in (read_attribute(gm, str(a.target)) for a in node.all_input_nodes if a.op == "get_attr"):
                if isinstance(body, fx.GraphModule):
                    found += scan_nodes(body)
    return found


def find_scan(gm: fx.GraphModule, site: str) -> tuple[fx.GraphModule, fx.Node]:
    """The scan of a site with the graph that owns it.

    Raises:
        SiteError: ``gm`` has no scan of that name.
    """
    names = []
    for owner, node in scan_nodes(gm):
        if node.meta[SITE] == site:
            return owner, node
        names.append(node.meta[SITE])
    raise SiteError(f"no scan named {site}; the graph has: {', '.join(names) or 'none'}")


def calls_of(gm: fx.GraphModule, target: Callable[..., Any]) -> list[tuple[fx.GraphModule, fx.Node]]:
    """Every call of ``target`` in ``gm`` and its sub-graphs with the graph that owns it."""
    return [(owner, n) for owner in graph_modules(gm) for n in owner.graph.find_nodes(op="call_function", target=target)]


def read_attribute(gm: fx.GraphModule, path: str) -> Any:
    """What a ``get_attr`` node of ``gm`` with this target reads; None where there is nothing."""
    found: Any = gm
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def module_path(node: fx.Node) -> str:
    """Path of the module a node was traced in, from ``nn_module_stack``; empty at top level."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    last = paths[-1] if paths else ""
    return "" if last.startswith("_empty_nn_module_stack") else last


def describe(node: fx.Node) -> str:
    """A node for messages: its name, and the module that it was traced in."""
    return f"{node.name} in {path}" if (path := module_path(node)) else node.name


def site_names(gm: fx.GraphModule) -> list[str]:
    """Give every scan its site name, the path of its module (``#i`` added where one module scans several times).

    Scans of the model itself, which has no path, are called ``selective_scan``.
    """
    nodes = [node for _, node in scan_nodes(gm)]
    paths = [node.meta.get(SITE) or module_path(node) or "selective_scan" for node in nodes]
    names: list[str] = []
    for i, path in enumerate(paths):
        name = f"{path}#{paths[:i].count(path)}" if paths.count(path) > 1 else path
        nodes[i].meta[SITE] = name
        names.append(name)
    return names


def strip_metadata(gm: fx.GraphModule) -> None:
    """Drop what export keeps for its own debugging: stack traces, and assertions that pin every cast to a dtype.

    With the assertions in place ``gm.half()`` would fail at the first cast that export saw as a no-op, and with the tracer
    of export on it the graph could not be unpickled.
    """
    for owner in graph_modules(gm):
        owner._tracer_cls = owner.graph._tracer_cls = None
        for node in list(owner.graph.nodes):
            if node.target in CHECKS:
                owner.graph.erase_node(node)
                continue
            for key in ("torch_fn", "from_node", "stack_trace"):
                node.meta.pop(key, None)


def value(node: Any) -> Any:
    """The fake value of a node, or the constant itself."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """``node.args``, for where the operator tells more about them than the type that fx gives them."""
    return node.args


def callee(node: fx.Node) -> Callable[..., Any]:
    """The function that a ``call_function`` node calls."""
    target: Any = node.target
    return target


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an operator's node by the names of its schema, defaults included."""
    target: Any = node.target.default if isinstance(node.target, torch._ops.OpOverloadPacket) else node.target
    schema = target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def scan_arguments(scan: fx.Node) -> dict[str, Any]:
    """Arguments of a selective-scan node by name. Captured scans carry neither D nor z: they are nodes of their own."""
    bound = arguments(scan)
    if bound.pop("D") is not None or bound.pop("z") is not None:
        raise SiteError(f"{scan.meta.get(SITE, scan.name)}: D or z lies inside the scan node; capture the model again")
    bound["delta_softplus"] = bool(bound["delta_softplus"])
    return bound


def group_shape(u: torch.Tensor, B: torch.Tensor) -> tuple[int, int]:
    """(K, D) of a scan from its u (B, K*D, L) and B (B, K, N, L)."""
    groups = int(B.shape[1])
    return groups, int(u.shape[1]) // groups


def concrete_sizes(t: torch.Tensor) -> tuple[int, ...]:
    """Sizes of a (fake) tensor; a dynamic one is taken at the value it was traced with.

    Raises:
        UnknownSizeError: a size depends on the data, as after a selection by a mask.
    """
    return tuple(concrete_size(s) for s in t.shape)


def concrete_size(size: int | torch.SymInt) -> int:
    """One size; see :func:`concrete_sizes`."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    found = size.node.hint if size.node.hint is not None else size.node.maybe_as_int()
    if found is None:
        raise UnknownSizeError(f"a size ({size}) depends on the data")
    return int(found)


def fresh_name(owner: torch.nn.Module, name: str) -> str:
    """A name like ``name`` that ``owner`` has no attribute of yet."""
    name = name.replace(".", "_").replace("#", "_")
    fresh, i = name, 0
    while hasattr(owner, fresh):
        i += 1
        fresh = f"{name}_{i}"
    return fresh


class Emitter:
    """Insert nodes into a graph, each with its fake value, its site and the name of the pass that made it.

    ``emit(target, *args)`` returns the new node; nodes and constants may be mixed in ``args``.
    """

    def __init__(self, graph: fx.Graph, before: fx.Node, made_by: str, like: fx.Node | None = None) -> None:
        self.graph = graph
        self.before = before
        self.made_by = made_by
        self.like = like or before

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        for key in ("nn_module_stack", SITE):
            if key in self.like.meta:
                node.meta[key] = self.like.meta[key]
        node.meta[MADE_BY] = self.made_by
        refresh(node)
        return node

    def get_attr(self, owner: fx.GraphModule, name: str, tensor: torch.Tensor, trained: bool = False) -> fx.Node:
        """Register ``tensor`` with ``owner`` under a fresh name made of ``name``; returns a node that reads it.

        It is a buffer, or with ``trained`` a parameter, which is frozen where all others are.
        """
        fresh = fresh_name(owner, name)
        if trained:
            frozen = not any(p.requires_grad for p in owner.parameters())
            owner.register_parameter(fresh, torch.nn.Parameter(tensor, requires_grad=not frozen))
        else:
            owner.register_buffer(fresh, tensor)
        with self.graph.inserting_before(self.before):
            node = self.graph.get_attr(fresh)
        node.meta[MADE_BY] = self.made_by
        node.meta["val"] = _fake(self.graph, tensor)
        return node


def fake_mode(graph: fx.Graph) -> Any:
    """The fake-tensor mode the values of ``graph`` belong to, or ``None``."""
    values = [n.meta["val"] for n in graph.nodes if "val" in n.meta]
    return detect_fake_mode(values)


def _fake(graph: fx.Graph, tensor: torch.Tensor) -> torch.Tensor:
    """The value of a node that reads ``tensor``, whose sizes are numbers."""
    mode = fake_mode(graph)
    return tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)


def refresh_from_weights(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` with values that fit its weights, where those were cast or moved after the capture (``gm.half()``)."""
    weights = {n: read_attribute(gm, str(n.target)) for n in gm.graph.find_nodes(op="get_attr")}
    weights = {n: t for n, t in weights.items() if isinstance(t, torch.Tensor)}
    became = {_kind(value(n)): t for n, t in weights.items() if _kind(value(n)) != _kind(t)}
    for node in gm.graph.nodes if became else ():
        if node in weights:
            node.meta["val"] = _fake(gm.graph, weights[node])
        elif node.op == "call_function":
            refresh(node)
        elif node.op == "placeholder" and isinstance(value(node), torch.Tensor):
            with fake_mode(gm.graph) or contextlib.nullcontext():
                node.meta["val"] = value(node).to(became.get(_kind(value(node)), value(node)))
    return gm


def _kind(tensor: torch.Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


def refresh(node: fx.Node) -> None:
    """Compute ``node.meta['val']`` from the fake values of its arguments."""
    args, kwargs = pytree.tree_map_only(fx.Node, value, (node.args, node.kwargs))
    tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
    mode = detect_fake_mode(tensors)
    # Composite operators reach symbolic sizes only through their Python decompositions.
    with mode or contextlib.nullcontext(), torch.no_grad(), enable_python_dispatcher():
        node.meta["val"] = callee(node)(*args, **kwargs)


def with_flat_weights(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph of ``gm``, which is used up, in a module that has all weights as buffers at its top level."""
    root = torch.nn.Module()
    names: dict[str, str] = {}
    for node in gm.graph.nodes:
        path = str(node.target)
        if node.op == "get_attr":
            if path not in names:
                names[path] = fresh_name(root, path)
                root.register_buffer(names[path], read_attribute(gm, path).detach())
            node.target = names[path]
        elif node.op == "call_module":
            root.add_module(path, gm.get_submodule(path))
    flat = fx.GraphModule(root, gm.graph)
    flat.meta.update(gm.meta)
    return flat.eval()


def computes_in_half(gm: fx.GraphModule) -> bool:
    """Whether any value of ``gm`` or of its regions is in half precision, whatever its outputs are in."""
    values = (node.meta.get("val") for owner in graph_modules(gm) for node in owner.graph.nodes)
    return any(getattr(held, "dtype", None) in (torch.float16, torch.bfloat16) for held in values)


def mutates(node: fx.Node) -> bool:
    """True for an operator that writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def downstream(graph: fx.Graph, roots: set[fx.Node]) -> set[fx.Node]:
    """Every node whose value depends on one of ``roots``, the roots included; needs a graph without mutation."""
    reached = set(roots)
    for node in graph.nodes:
        if node not in reached and any(a in reached for a in node.all_input_nodes):
            reached.add(node)
    return reached


def upstream(node: fx.Node) -> set[fx.Node]:
    """Every node that the value of ``node`` depends on, without itself."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        fresh = [above for above in stack.pop().all_input_nodes if above not in found]
        found.update(fresh)
        stack += fresh
    return found


def is_pointwise_conv(conv: fx.Node) -> bool:
    """Whether a convolution treats every position by itself: kernel 1, stride 1, no padding, one group."""
    a = arguments(conv)
    plain = set(a["stride"]) == {1} and set(a["padding"]) == {0} and a["groups"] == 1
    return plain and set(value(a["weight"]).shape[2:]) == {1}
