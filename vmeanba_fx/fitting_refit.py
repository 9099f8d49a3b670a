"""Refits the layers behind replaced sites, in graph order, each on the activations of the graph as rewritten so far.

One pass over the calibration data per layer; the original graph and the rewritten one run side by side over each batch,
both only as far as the layer. Targets come from the original graph: the residual sum the layer writes into where there is
one (then the error that earlier sites left in the stream is compensated too), else the layer's own output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from .batches import Batches
from .errors import CalibrationError
from .evaluate import is_parameter_only
from .execute import Executor
from .fitting import Sums, refit_linear
from .graph import SITE, downstream, scan_nodes
from .passes.refit import Readout, find_readout, find_stream, is_pointwise_linear, refit

Refit = bool | Literal["all"]

REFIT = "vmeanba_fx.refit"
"""``gm.meta`` key of a list of :class:`Refitted`."""
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_ROWS_BUDGET = 1 << 23  # float64 numbers of rows at a time


@dataclass(frozen=True)
class Refitted:
    """``layer``: the node's name; ``left``: share of the squared error at its target that remains; or ``refused``: why."""

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
    gm: fx.GraphModule, original: fx.GraphModule, sites: Iterable[str], data: Batches, *, how: Refit = True,
    stream: bool = True,
) -> fx.GraphModule:  # fmt: skip
    """Refit ``gm``, a copy of ``original`` with ``sites`` replaced, in place, and return it.

    Layers that several sites share are refitted once. ``gm.meta[REFIT]`` lists what was done.
    """
    found = readouts(original, sites)
    done = [Refitted(site, refused=readout) for site, readout in found if isinstance(readout, str)]
    layers = {readout.layer: (site, readout) for site, readout in found if isinstance(readout, Readout)}
    if how == "all" and layers:
        for readout in later_layers(original, next(iter(layers))):
            layers.setdefault(readout.layer, ("", readout))
    for node in original.graph.nodes:
        if node in layers:
            site, readout = layers[node]
            done.append(Refitted(site, node.name, refit_layer(gm, original, readout, data, stream=stream)))
    gm.meta[REFIT] = done
    return gm


def refit_layer(
    gm: fx.GraphModule, original: fx.GraphModule, readout: Readout, data: Batches, *, stream: bool = True
) -> float:
    """Refit one layer of ``gm``; ``readout`` is in terms of ``original``. Returns the share of the error that is left."""
    target = readout.stream if stream and readout.stream is not None else readout.layer
    nodes = {n.name: n for n in gm.graph.nodes}
    layer, new_target = nodes[readout.layer.name], nodes[target.name]
    before, after = Executor(original, []), Executor(gm, [])
    sums: Sums | None = None
    seen: dict[str, Tensor] = {}

    def keep_target(env: Mapping[fx.Node, Any]) -> None:
        seen["target"] = env[target]

    def keep_layer(env: Mapping[fx.Node, Any]) -> None:
        seen["input"] = env[layer.args[0]]
        for name, node in (("weight", readout_weight(layer)), ("bias", readout_bias(layer))):
            if node is not None:
                seen[name] = env[node]
        keep_new(env) if new_target is layer else None

    def keep_new(env: Mapping[fx.Node, Any]) -> None:
        seen["found"] = env[new_target]

    for index, batch in enumerate(data.sweep()):
        batch = batch.to(after.device)
        with torch.no_grad():
            before.visit({target: keep_target}, *batch.args, **batch.kwargs)
            after.visit({layer: keep_layer, new_target: keep_new} if new_target is not layer else {layer: keep_layer},
                        *batch.args, **batch.kwargs)  # fmt: skip
            x = _rows(seen["input"], readout.channel_dim)
            error = _rows(seen["target"].double() - seen["found"].double(), readout.channel_dim)
            if readout.is_norm:
                sums = _add_norm(sums, layer, x, error, index)
            else:
                sums = _add(sums, x[None], error[None], index)
    assert sums is not None
    if not bool(torch.isfinite(sums.halves).all()):
        raise CalibrationError(f"{layer.name}: its values are not finite (nan or inf) on the calibration data")
    weight = seen["weight"].double()
    change, bias, left = _solve_norm(sums) if readout.is_norm else refit_linear(sums, x.shape[-1], RIDGES)
    if "bias" in seen:
        bias = bias + seen["bias"].double()
    refit(gm, layer, weight + change.reshape(weight.shape), bias)
    return left


def readout_weight(layer: fx.Node) -> fx.Node:
    return Readout(layer, None).weight


def readout_bias(layer: fx.Node) -> fx.Node | None:
    return Readout(layer, None).bias


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
    middle = items // 2 if items > 1 else (index + 1) % 2
    step = max(1, _ROWS_BUDGET // (heads * positions * width))
    for half, (start, stop) in enumerate(((0, middle), (middle, items))):
        for low in range(start, stop, step):
            now = slice(low, min(low + step, stop))
            parts = [x[:, now].double(), error[:, now], torch.ones_like(error[:, now, :, :1])]
            sums.add(torch.cat(parts, dim=-1).flatten(1, 2), half)
    return sums


def _add_norm(sums: Sums | None, layer: fx.Node, x: Tensor, error: Tensor, index: int) -> Sums:
    """Every channel is a head: [normalised value | error | 1]."""
    eps = float(layer.args[4]) if len(layer.args) > 4 else 1e-5
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
