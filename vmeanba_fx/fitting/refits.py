"""Refits the layers behind replaced sites, in graph order, each on the activations of the graph as rewritten so far.

The original graph and the rewritten one run side by side over each batch, both as far as the next layer; there they wait,
within ``KEPT_BYTES``, or start again from the beginning for the layer after it. In all that is one pass over the data where
everything can be kept, and one per layer, shorter for early layers, where nothing can.

Targets come from the original graph: the residual sum the layer writes into where there is one (then the error that earlier
sites left in the stream is compensated too), else the layer's own output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from ..analysis.evaluate import is_parameter_only
from ..calibration.batches import Batches
from ..calibration.execute import Executor
from ..calibration.metrics import Batch
from ..calibration.replacing import NewWeights, Replacer
from ..errors import CalibrationError
from ..graph import SITE, args_of, copy_graph, describe, downstream, read_attribute, scan_nodes
from ..passes.refit import Readout, find_readout, find_stream, is_pointwise_linear, refit, weight_position
from ..sites import Site
from .least_squares import Sums, halves_of, refit_linear

Refit = bool | Literal["sites", "all"]
"""Which layers get new weights: none, those that read replaced sites out (True, "sites"), or all later ones too."""

REFIT = "vmeanba_fx.refit"
"""``gm.meta`` key of a list of :class:`Refitted`."""
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
KEPT_BYTES = 2 << 30
_ROWS_BUDGET = 1 << 23  # float64 numbers of rows at a time


@dataclass(frozen=True)
class Refitted:
    """``layer``: its node and module; ``left``: share of the squared error at its target that remains; or ``refused``: why."""

    site: str
    layer: str = ""
    left: float = 1.0
    refused: str = ""

    def __str__(self) -> str:
        if self.refused:
            return f"{self.site}: not refitted, {self.refused}"
        return f"{self.site or 'later layer'}: {self.layer} refitted, {self.left:.0%} of its squared error is left"


def readouts(original: fx.GraphModule, sites: Iterable[str]) -> list[tuple[str, Readout | str]]:
    """(site, its readout or the reason why there is none) in graph order."""
    wanted = set(sites)
    found: list[tuple[str, Readout | str]] = []
    for owner, scan in scan_nodes(original):
        if scan.meta[SITE] in wanted:
            inside = "it lies inside an autocast or checkpoint region"
            found.append((scan.meta[SITE], find_readout(scan) if owner is original else inside))
    return found


def later_layers(original: fx.GraphModule, first: fx.Node) -> list[Readout]:
    """Layers behind ``first`` that write into a residual stream or give the model's output, in graph order."""
    reached = downstream(original.graph, {first})
    found = [node for node in original.graph.nodes if node in reached and is_pointwise_linear(node)]
    found = [Readout(node, find_stream(node)) for node in found if is_parameter_only(node.args[1])]
    return [r for r in found if r.stream is not None or any(user.op == "output" for user in r.layer.users)]


def refit_sites(
    gm: fx.GraphModule, original: fx.GraphModule, sites: Iterable[str], data: Batches, *, how: Refit = True
) -> fx.GraphModule:
    """Refit ``gm``, a copy of ``original`` with ``sites`` replaced, in place, and return it.

    Layers that several sites share are refitted once. ``gm.meta[REFIT]`` lists what was done.
    """
    found = readouts(original, sites)
    done = [Refitted(site, refused=readout) for site, readout in found if isinstance(readout, str)]
    layers = {readout.layer: (site, readout) for site, readout in found if isinstance(readout, Readout)}
    if how == "all" and layers:
        for readout in later_layers(original, next(iter(layers))):
            layers.setdefault(readout.layer, ("", readout))
    refitter = _Refitter(gm, original, data)
    for node in original.graph.nodes:
        if node in layers:
            site, readout = layers[node]
            done.append(Refitted(site, describe(node), refitter.refit(readout)))
    gm.meta[REFIT] = done
    return gm


def refit_each(
    gm: fx.GraphModule, sites: Sequence[Site], data: Batches, replacer: Replacer
) -> dict[str, NewWeights]:
    """New weights of the layer that reads each site out, fitted with that site alone replaced.

    Sites without such a layer, and those that share one, are left out.
    """
    found = {site: r.layer for site, r in readouts(gm, [s.name for s in sites]) if isinstance(r, Readout)}
    weights: dict[str, NewWeights] = {}
    for site, layer in found.items():
        if list(found.values()).count(layer) > 1:
            continue
        rewritten = refit_sites(replacer.rewrite(copy_graph(gm), [site]), gm, [site], data)
        new = next(n for n in rewritten.graph.nodes if n.name == layer.name)
        at = weight_position(new)
        weights[site] = NewWeights(layer, *(read_attribute(rewritten, str(n.target)) for n in args_of(new)[at : at + 2]))
    return weights


class _Walk:
    """A graph and all batches of the calibration data, which stop before one node after the other, in graph order.

    Of each batch the values that later nodes need are kept where ``KEPT_BYTES`` allow; others start from the beginning.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self._kept: dict[int, dict[fx.Node, Any]] = {}
        self._done: set[fx.Node] = set()

    def start(self) -> None:
        """Before a round over the batches; the graph may have changed since the last one."""
        self.executor = Executor(self.gm, [])

    def stop(self, before: fx.Node, index: int, batch: Batch) -> dict[fx.Node, Any]:
        """What batch ``index`` holds right before a node."""
        env = self._kept.pop(index, None)
        done: set[fx.Node] = self._done
        if env is None:
            env, done = self.executor.begin(*batch.args, **batch.kwargs), set()
        self.executor.advance(env, done, before)
        return env

    def keep(self, index: int, env: dict[fx.Node, Any], room: int) -> int:
        """Keep ``env`` if it needs at most ``room`` bytes; returns the bytes that are left."""
        leaves = pytree.tree_leaves([v for node, v in env.items() if node.op != "get_attr"])
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in leaves if isinstance(t, Tensor)}
        size = sum(storages.values())
        if size > room or self.executor.writes:
            return room
        self._kept[index] = env
        return room - size

    def finish(self, before: fx.Node) -> None:
        """After a round: what has been run."""
        nodes = list(self.gm.graph.nodes)
        self._done = set(nodes[: nodes.index(before)])


class _Refitter:
    """The original graph and the rewritten one side by side over the calibration data."""

    def __init__(self, gm: fx.GraphModule, original: fx.GraphModule, data: Batches) -> None:
        self.gm, self.data = gm, data
        self.old, self.new = _Walk(original), _Walk(gm)

    def refit(self, readout: Readout) -> float:
        """Refit one layer, given in terms of the original graph; layers come in graph order. Returns the error's share left."""
        target = readout.layer if readout.stream is None else readout.stream
        nodes = {n.name: n for n in self.gm.graph.nodes}
        layer, found = nodes[readout.layer.name], nodes[target.name]
        self.old.start()
        self.new.start()
        sums: Sums | None = None
        room = KEPT_BYTES
        with torch.no_grad():
            for index, batch in enumerate(self.data.sweep()):
                batch = batch.to(self.new.executor.device)
                old, new = self.old.stop(readout.layer, index, batch), self.new.stop(layer, index, batch)
                wanted = self.old.executor.compute(old, readout.layer, target)[target]
                given = self.new.executor.compute(new, layer, found)[found]
                x = _rows(new[layer.args[0]], readout.channel_dim)
                error = _rows(wanted.double() - given.double(), readout.channel_dim)
                sums = _add_norm(sums, layer, x, error, index) if readout.is_norm else _add(sums, x[None], error[None], index)
                weight, bias = (None if n is None else new[n] for n in (Readout(layer, None).weight, Readout(layer, None).bias))
                room = self.new.keep(index, new, self.old.keep(index, old, room))
        assert sums is not None and weight is not None
        self.old.finish(readout.layer)
        self.new.finish(layer)
        if not bool(torch.isfinite(sums.halves).all()):
            raise CalibrationError(f"{layer.name}: its values are not finite (nan or inf) on the calibration data")
        change, shift, left = _solve_norm(sums) if readout.is_norm else refit_linear(sums, x.shape[-1], RIDGES)
        refit(self.gm, layer, weight.double() + change.reshape(weight.shape), shift if bias is None else shift + bias.double())
        return left


def _rows(t: Tensor, channel_dim: int) -> Tensor:
    """(items, positions, channels)."""
    t = t.movedim(channel_dim, -1)
    return t.reshape(t.shape[0], -1, t.shape[-1])


def _add(sums: Sums | None, x: Tensor, error: Tensor, index: int) -> Sums:
    """Add rows [x | error | 1]; x, error (heads, items, positions, channels)."""
    heads, items, positions, _ = x.shape
    width = x.shape[-1] + error.shape[-1] + 1
    if sums is None:
        sums = Sums(heads, width, x.device)
    step = max(1, _ROWS_BUDGET // (heads * positions * width))
    for half, now in halves_of(items, index, step):
        parts = [x[:, now].double(), error[:, now], torch.ones_like(error[:, now, :, :1])]
        sums.add(torch.cat(parts, dim=-1).flatten(1, 2), half)
    return sums


def _add_norm(sums: Sums | None, layer: fx.Node, x: Tensor, error: Tensor, index: int) -> Sums:
    """Every channel is a head: [normalised value | error | 1]."""
    eps = float(args_of(layer)[4]) if len(layer.args) > 4 else 1e-5
    normal = torch.nn.functional.layer_norm(x.double(), x.shape[-1:], eps=eps)
    return _add(sums, normal.movedim(-1, 0)[..., None], error.movedim(-1, 0)[..., None], index)


def _solve_norm(sums: Sums) -> tuple[Tensor, Tensor, float]:
    """Change of scale and of bias per channel, and the share of the squared error left."""
    gram = sums.whole  # (D, 3, 3)
    n, mx, me = gram[:, 2, 2].clamp_min(1.0), gram[:, 0, 2], gram[:, 1, 2]
    variance = (gram[:, 0, 0] - mx * mx / n).clamp_min(1e-12 * n)
    scale = (gram[:, 0, 1] - mx * me / n) / variance
    bias = (me - scale * mx) / n
    left = gram[:, 1, 1] - 2 * (scale * gram[:, 0, 1] + bias * me)
    left = left + scale**2 * gram[:, 0, 0] + 2 * scale * bias * mx + bias**2 * n
    total = float(gram[:, 1, 1].sum())
    return scale, bias, float(left.sum()) / total if total > 0 else 1.0
