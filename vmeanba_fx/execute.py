"""Run a graph once, then run only what changes: scoring site i re-executes the nodes downstream of site i.

The executor keeps, from one full run, exactly the values that some later partial run will read: the inputs of the
points that may be overridden, and whatever crosses from outside into the part downstream of one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from .graph import downstream


class State:
    """Values kept from one full run."""

    def __init__(self, env: dict[fx.Node, Any]) -> None:
        self.env = env

    def value(self, node: fx.Node) -> Any:
        """The value of ``node`` in the full run; it must be an override point or one of its inputs."""
        return self.env[node]


class Executor:
    """Interprets ``gm`` node by node. ``points``: the nodes whose values :meth:`rerun` may override."""

    def __init__(self, gm: fx.GraphModule, points: Sequence[fx.Node]) -> None:
        self.gm = gm
        self.nodes = list(gm.graph.nodes)
        self.interpreter = fx.Interpreter(gm, garbage_collect_values=False)
        self._below = {point: downstream(gm.graph, {point}) for point in points}
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

    @staticmethod
    def to_device(values: Any, device: torch.device) -> Any:
        return pytree.tree_map_only(Tensor, lambda t: t.to(device), values)

    def run(self, *args: Any, **kwargs: Any) -> tuple[Any, State]:
        """All nodes. Returns the model's outputs and the state that :meth:`rerun` needs."""
        flat = iter(self.gm.graph.process_inputs(*args, **kwargs))
        env: dict[fx.Node, Any] = {}
        output = None
        for position, node in enumerate(self.nodes):
            if node.op == "placeholder":
                env[node] = next(flat)
            elif node.op == "output":
                output = self._fetch(node.args[0], env)
            else:
                env[node] = self._call(node, env)
            for dead in self._last_use.get(position, ()):
                if dead not in self._kept:
                    env.pop(dead, None)
        return self.gm.graph.process_outputs(output), State(env)

    def rerun(self, state: State, overrides: Mapping[fx.Node, Any]) -> Any:
        """The model's outputs with ``overrides`` in place of some points' values; runs only what lies downstream."""
        below = set().union(*(self._below[point] for point in overrides))
        env = dict(overrides)
        output = None
        for position, node in enumerate(self.nodes):
            if node in below and node not in overrides:
                if node.op == "output":
                    output = self._fetch(node.args[0], env, state.env)
                else:
                    env[node] = self._call(node, env, state.env)
            for dead in self._last_use.get(position, ()):
                env.pop(dead, None)
        if output is None:
            output = self._fetch(self.nodes[-1].args[0], env, state.env)
        return self.gm.graph.process_outputs(output)

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
