"""Run a graph once, then run only what changes: scoring site i re-executes the nodes from a little before site i on.

The executor keeps, from one full run, exactly the values that some later partial run will read. A partial run does not
begin at the point that it overrides but where, since the point before, the fewest bytes are alive: in front of a block
that is the residual stream alone, a tenth of what a scan reads. In a graph that writes into its own values data flow does
not tell what changes; there every run is a full one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx._pytree as fx_pytree
import torch.utils._pytree as pytree
from torch import Tensor, fx

from ..capturing.copies import device_of
from ..errors import UnknownSizeError
from ..graph import concrete_sizes, graph_modules, mutates, value


@dataclass(frozen=True)
class Computed:
    """An override that is computed when its turn comes: ``compute(value)``, where ``value(node)`` is an input's value."""

    compute: Callable[[Callable[[fx.Node], Any]], Any]


class State:
    """Values kept from one full run, and its flat inputs."""

    def __init__(self, env: dict[fx.Node, Any], inputs: list[Any]) -> None:
        self.env = env
        self.inputs = inputs

    def value(self, node: fx.Node) -> Any:
        """The value of ``node`` in the full run; it must be one that the executor was told to keep."""
        return self.env[node]


class Executor:
    """Interprets ``gm`` node by node.

    Args:
        points: the nodes whose values :meth:`rerun` may override.
        keep: nodes whose values of the full run are wanted as well.
    """

    def __init__(self, gm: fx.GraphModule, points: Sequence[fx.Node], keep: Collection[fx.Node] = ()) -> None:
        self.gm = gm
        self.nodes = list(gm.graph.nodes)
        self.interpreter = fx.Interpreter(gm, garbage_collect_values=False)
        # A write nobody reads goes into the caller's inputs, at the end: of no use here, and it would change the batch.
        self._skipped = {node for node in self.nodes if mutates(node) and not node.users}
        self._writes = any(
            mutates(n) for owner in graph_modules(gm) for n in owner.graph.nodes if n not in self._skipped
        )
        self._last_use = _last_uses(self.nodes)
        self._start, kept = self._cuts(points)
        self._kept = kept | set(keep)

    def _cuts(self, points: Sequence[fx.Node]) -> tuple[dict[fx.Node, int], set[fx.Node]]:
        """Position from which a run that overrides a point starts, and all values that such runs read."""
        if self._writes:
            return dict.fromkeys(points, 0), set()
        wanted, start, kept = set(points), {}, set()
        alive: dict[fx.Node, int] = {}
        best: tuple[int, int, set[fx.Node]] | None = None  # bytes alive, position, what is alive
        for position, node in enumerate(self.nodes):
            here = sum(alive.values())
            if best is None or here <= best[0]:
                best = here, position, set(alive)
            if node in wanted:
                start[node] = best[1]
                kept |= best[2]
                best = None
            alive[node] = traced_bytes(node)
            for dead in self._last_use.get(position, ()):
                alive.pop(dead, None)
        return start, kept

    @property
    def device(self) -> torch.device:
        """Device of the graph's parameters and buffers."""
        return device_of(self.gm)

    def share_below(self, point: fx.Node) -> float:
        """The share of the graph's nodes that :meth:`rerun` runs for an override of ``point``."""
        return 1.0 - self._start[point] / len(self.nodes)

    @property
    def writes(self) -> bool:
        """Whether the graph writes into its own values: then no value may be used again later."""
        return self._writes

    def run(self, *args: Any, **kwargs: Any) -> tuple[Any, State]:
        """All nodes. Returns the model's outputs and the state that :meth:`rerun` needs."""
        inputs = self._flat(args, kwargs)
        env = self._copies(dict(zip(self.gm.graph.find_nodes(op="placeholder"), inputs, strict=True)))
        kept = dict(env)
        output = None
        for position, node in enumerate(self.nodes):
            if node.op == "output":
                output = self._fetch(node.args[0], env)
            elif node.op != "placeholder" and node not in self._skipped:
                env[node] = self._call(node, env)
                if node in self._kept:
                    kept |= self._copies({node: env[node]})
            for dead in self._last_use.get(position, ()):
                env.pop(dead, None)
        return self.gm.graph.process_outputs(output), State(kept, inputs)

    def visit(self, readers: Mapping[fx.Node, Callable[[Mapping[fx.Node, Any]], None]], *args: Any, **kwargs: Any) -> None:
        """Run as far as the last of the nodes in ``readers``, each called with the values at hand right after its node.

        At hand are at least the values of the node itself and of its arguments.
        """
        env = self.begin(*args, **kwargs)
        left = len(readers)
        for position, node in enumerate(self.nodes):
            if not left:
                return
            if node.op not in ("placeholder", "output") and node not in self._skipped:
                env[node] = self._call(node, env)
            if node in readers:
                readers[node](env)
                left -= 1
            for dead in self._last_use.get(position, ()):
                env.pop(dead, None)

    def advance(self, env: dict[fx.Node, Any], done: Set[fx.Node], until: fx.Node) -> None:
        """Run the nodes before ``until`` that are not ``done``, in place: ``env`` then holds what ``until`` and all nodes
        behind it read of those before. An ``env`` of nothing ``done`` is what :meth:`begin` returns."""
        for position, node in enumerate(self.nodes):
            if node is until:
                return
            if node not in done and node.op not in ("placeholder", "output") and node not in self._skipped:
                env[node] = self._call(node, env)
            for dead in self._last_use.get(position, ()):
                env.pop(dead, None)

    def begin(self, *args: Any, **kwargs: Any) -> dict[fx.Node, Any]:
        """The values of the placeholders."""
        return self._copies(dict(zip(self.gm.graph.find_nodes(op="placeholder"), self._flat(args, kwargs), strict=True)))

    def compute(self, env: dict[fx.Node, Any], first: fx.Node, last: fx.Node) -> dict[fx.Node, Any]:
        """Values of the nodes from ``first`` to ``last``, from those in ``env``, which stays as it is."""
        env = dict(env)
        inside = False
        for node in self.nodes:
            inside = inside or node is first
            if inside and node not in self._skipped:
                env[node] = self._call(node, env)
            if node is last:
                return env
        raise KeyError(last.name)

    def rerun(self, state: State, overrides: Mapping[fx.Node, Any]) -> Any:
        """The model's outputs with ``overrides`` in place of some points' values; runs only the end of the graph.

        An override is a value, or :class:`Computed` from the values that the point's inputs have in this run.
        """
        env = {node: given for node, given in overrides.items() if not isinstance(given, Computed)}
        if self._writes:
            env |= self._copies(dict(zip(self.gm.graph.find_nodes(op="placeholder"), state.inputs, strict=True)))
        output = None
        start = min((self._start[point] for point in overrides), default=0)
        for position, node in enumerate(self.nodes[start:], start):
            if node.op == "output":
                output = self._fetch(node.args[0], env, state.env)
            elif node in overrides and node not in env:
                env[node] = overrides[node].compute(lambda n: self._fetch(n, env, state.env))
            elif node.op != "placeholder" and node not in env and node not in self._skipped:
                env[node] = self._call(node, env, state.env)
            for dead in self._last_use.get(position, ()):
                env.pop(dead, None)
        return self.gm.graph.process_outputs(output)

    def _flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Inputs in the order of the placeholders."""
        spec = getattr(self.gm, "_in_spec", None)
        if spec is None:
            return [*args, *kwargs.values()]
        try:
            flat = fx_pytree.tree_flatten_spec((args, kwargs), spec)
        except (LookupError, TypeError, RuntimeError):
            flat = []
        if len(flat) != len(pytree.tree_leaves((args, kwargs))):
            raise ValueError("its inputs are not structured like those of the first batch")
        return flat

    def _copies(self, values: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        """``values`` themselves, or copies where the graph might write into them later."""
        return pytree.tree_map_only(Tensor, torch.clone, values) if self._writes else values

    def _fetch(self, args: Any, *envs: dict[fx.Node, Any]) -> Any:
        def lookup(node: fx.Node) -> Any:
            for env in envs:
                if node in env:
                    return env[node]
            raise KeyError(f"value of {node.name} was not kept")

        return fx.node.map_arg(args, lookup)

    def _call(self, node: fx.Node, *envs: dict[fx.Node, Any]) -> Any:
        args, kwargs = self._fetch(node.args, *envs), self._fetch(node.kwargs, *envs)
        return getattr(self.interpreter, node.op)(node.target, args, kwargs)


def traced_bytes(node: fx.Node) -> int:
    """Size of a node's value as it was traced; what the graph is given lies there anyway, and some sizes are unknown."""
    if node.op in ("placeholder", "get_attr"):
        return 0
    tensors = [t for t in pytree.tree_leaves(value(node)) if isinstance(t, Tensor)]
    try:
        return sum(t.element_size() * math.prod(concrete_sizes(t)) for t in tensors)
    except UnknownSizeError:
        return 0


def _last_uses(nodes: list[fx.Node]) -> dict[int, list[fx.Node]]:
    """For each position the nodes whose values nothing reads after it."""
    position = {node: i for i, node in enumerate(nodes)}
    table: dict[int, list[fx.Node]] = {}
    for node in nodes:
        last = max((position[user] for user in node.users), default=position[node])
        table.setdefault(last, []).append(node)
    return table
