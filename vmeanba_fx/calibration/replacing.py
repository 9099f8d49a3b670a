"""Replacements of sites while a captured graph is interpreted: what scoring runs without rewriting the graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx

from ..errors import CalibrationError
from ..fitting.rank_block import RankFit, rank_scan_tensors
from ..graph import SITE, args_of, callee, copy_graph, find_scan, graph_modules, read_attribute, scan_arguments
from ..passes.mean_scan import Mean, mean_scan, mean_scan_tensors
from ..passes.rank_scan import rank_scan
from ..passes.refit import weight_position
from ..sites import Site
from .execute import Computed


class Point:
    """Where a site's replacement enters the graph: its scan node, or the sub-graph that holds it (``body``)."""

    def __init__(self, gm: fx.GraphModule, site: Site) -> None:
        self.site = site
        owner, self.scan = find_scan(gm, site.name)
        self.body: fx.GraphModule | None = None
        self.node = self.scan
        if owner is gm:
            return
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                module = read_attribute(gm, str(node.target))
                if isinstance(module, fx.GraphModule) and any(o is owner for o in graph_modules(module)):
                    self.node, self.body = node, module
                    return
        raise CalibrationError(f"{site.name}: its scan lies in a sub-graph that the top-level graph does not reach")


@dataclass(frozen=True)
class NewWeights:
    """``layer``, a linear, 1x1 convolution or LayerNorm node, with another weight and bias."""

    layer: fx.Node
    weight: Tensor
    bias: Tensor

    def compute(self, value: Callable[[fx.Node], Any]) -> Tensor:
        at = weight_position(self.layer)
        x, *rest = args_of(self.layer)
        return callee(self.layer)(value(x), *rest[: at - 1], self.weight, self.bias, *rest[at + 1 :])


class Replacer:
    """Overrides for :meth:`Executor.rerun` that replace sites, given by index: by their rank-r fits where there are any,
    and with them the layers that read them out where ``readouts`` has new weights."""

    def __init__(
        self, gm: fx.GraphModule, sites: Sequence[Site], mean: Mean, fits: Mapping[str, RankFit] | None = None,
        readouts: Mapping[str, NewWeights] | None = None,
    ) -> None:  # fmt: skip
        self.mean = mean
        self.fits = fits or {}
        self.readouts = readouts or {}
        self.points = [Point(gm, site) for site in sites]
        self._patched: dict[tuple[fx.Node, tuple[str, ...]], fx.GraphModule] = {}

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes that overrides may name."""
        return list({node: None for node in [*(p.node for p in self.points), *(r.layer for r in self.readouts.values())]})

    def overrides(self, chosen: Sequence[int]) -> dict[fx.Node, Any]:
        """What to override to replace the sites ``chosen`` together."""
        out: dict[fx.Node, Any] = {}
        inside: dict[fx.Node, tuple[fx.GraphModule, list[str]]] = {}
        for i in chosen:
            point = self.points[i]
            if (readout := self.readouts.get(point.site.name)) is not None:
                out[readout.layer] = Computed(readout.compute)
            if point.body is None:
                out[point.node] = Computed(partial(self._replacement, point.scan))
            else:
                inside.setdefault(point.node, (point.body, []))[1].append(point.site.name)
        for node, (body, replaced) in inside.items():
            names = tuple(replaced)
            if (node, names) not in self._patched:
                self._patched[node, names] = self.rewrite(copy_graph(body), names)
            out[node] = self._patched[node, names]
        return out

    def rewrite(self, gm: fx.GraphModule, names: Collection[str]) -> fx.GraphModule:
        """``gm`` (changed in place) with the scans of these sites replaced for good."""
        fits = {name: self.fits[name] for name in names if name in self.fits}
        gm = rank_scan(gm, fits) if fits else gm
        return mean_scan(gm, [name for name in names if name not in fits], mean=self.mean)

    def _replacement(self, scan: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        args = {k: value(v) if isinstance(v, fx.Node) else v for k, v in scan_arguments(scan).items()}
        fit = self.fits.get(scan.meta[SITE])
        return mean_scan_tensors(self.mean, **args) if fit is None else rank_scan_tensors(fit, **args)
