"""Run a graph once, then run only what changes: scoring site i re-executes the nodes downstream of site i.

The executor keeps, from one full run, exactly the values that some later partial run will read: the inputs of the
points that may be overridden, and whatever crosses from outside into the part downstream of one of them. In a graph
that writes into its own values data flow does not tell what changes; there every run is a full one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx._pytree as fx_pytree
import torch.utils._pytree as pytree
from torch import Tensor, fx

from .graph import downstream, graph_modules, mutates


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
        """The value of ``node`` in the full run; it must be an override point or one of its inputs."""
        return self.env[node]


class Executor:
    """Interprets ``gm`` node by node. ``points``: the nodes whose values :meth:`rerun` may override."""

    def __init__(self, gm: fx.GraphModule, points: Sequence[fx.Node]) -> None:
        self.gm = gm
        self.nodes = list(gm.graph.nodes)
        self.interpreter = fx.Interpreter(gm, garbage_collect_values=False)
        # A write nobody reads goes into the caller's inputs, at the end: of no use here, and it would change the batch.
        self._skipped = {node for node in self.nodes if mutates(node) and not node.users}
        self._writes = any(
            mutates(n) for owner in graph_modules(gm) for n in owner.graph.nodes if n not in self._skipped
        )
        everything = set(self.nodes)
        self._below = {point: everything if self._writes else downstream(gm.graph, {point}) for point in points}
        self._kept: set[fx.Node] = set(points)
        for point, below in self._below.items():
            self._kept.update(point.all_input_nodes)
            for node in below - {point}:
                self._kept.update(a for a in node.all_input_nodes if a not in below)
        self._last_use = _last_uses(self.nodes)

    @property
    def device(self) -> torch.device:
        """Device of the graph's parameters and buffers."""
        for tensor in (*self.gm.parameters(), *self.gm.buffers()):
            return tensor.device
        return torch.device("cpu")

    def share_below(self, point: fx.Node) -> float:
        """The share of the graph's nodes that :meth:`rerun` runs for an override of ``point``."""
        return len(self._below[point]) / len(self.nodes)

    @property
    def writes(self) -> bool:
        """Whether the graph writes into its own values: then no value may be used again later."""
        return self._writes

    @staticmethod
    def to_device(values: Any, device: torch.device) -> Any:
        return pytree.tree_map_only(Tensor, lambda t: t.to(device), values)

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
        """The model's outputs with ``overrides`` in place of some points' values; runs only what lies downstream.

        An override is a value, or :class:`Computed` from the values that the point's inputs have in this run.
        """
        below = set().union(*(self._below[point] for point in overrides))
        env = {node: given for node, given in overrides.items() if not isinstance(given, Computed)}
        if self._writes:
            env |= self._copies(dict(zip(self.gm.graph.find_nodes(op="placeholder"), state.inputs, strict=True)))
        output = None
        for position, node in enumerate(self.nodes):
            if node in below and node not in env and node not in self._skipped:
                if node.op == "output":
                    output = self._fetch(node.args[0], env, state.env)
                elif node in overrides:
                    env[node] = overrides[node].compute(lambda n: self._fetch(n, env, state.env))
                else:
                    env[node] = self._call(node, env, state.env)
            for dead in self._last_use.get(position, ()):
                env.pop(dead, None)
        if output is None:
            output = self._fetch(self.nodes[-1].args[0], env, state.env)
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


def _last_uses(nodes: list[fx.Node]) -> dict[int, list[fx.Node]]:
    """For each position the nodes whose values nothing reads after it."""
    position = {node: i for i, node in enumerate(nodes)}
    table: dict[int, list[fx.Node]] = {}
    for node in nodes:
        last = max((position[user] for user in node.users), default=position[node])
        table.setdefault(last, []).append(node)
    return table
