"""Rank-r fits of a captured graph's sites: three passes over the calibration data, whatever their number; four with
``fit="outputs"``, which needs one for :mod:`.sensitivity`.

The first pass finds the energy of every channel of the scans. The channels will share one decay, a weighted mean: the second
pass collects the sums of :mod:`.least_squares` with channels weighted by their energy, the third with equal weights.

Sums of one site take 2 heads * ((K + 2) * D + 1)^2 float64 numbers where the K directions are provably merged into one map
(then heads = 1: what is fitted is the merged output), and 2 K (3 D + 1)^2 where they are not (every direction by itself).
Sites whose sums exceed ``SUMS_BUDGET`` together are fitted in several passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from .. import ops
from ..analysis.cross_scan import find_cross_scan, find_merge
from ..analysis.evaluate import Unprovable
from ..calibration.batches import Batches
from ..calibration.execute import Executor
from ..errors import CalibrationError, NoSitesError, SiteError
from ..graph import SITE, find_scan, group_shape, scan_arguments, scan_nodes, value
from ..ops.directions import inverse_table
from ..sites import Site, SiteList, skip_product
from .least_squares import Layout, LowRank, Sums, Weighting, auto_rank, fit_low_rank, halves_of
from .rank_block import RankFit, call, shared_step
from .reduction import DEFAULT_ENERGY, Reduction
from .sensitivity import output_gradients

SUMS_BUDGET = 1 << 30  # bytes
# Channels share one step; each counts by its energy to this power. Both are tried, the better fit stays.
WEIGHT_POWERS = (1.0, 0.0)
_ROWS_BUDGET = 1 << 24  # float64 numbers of rows at a time


class _SiteRows:
    """Turns what a scan node reads and gives into rows of :class:`.least_squares.Layout`."""

    def __init__(self, gm: fx.GraphModule, site: Site) -> None:
        _, self.scan = find_scan(gm, site.name)
        self.site = site
        self.args = scan_arguments(self.scan)
        self.groups, self.channels = group_shape(value(self.args["u"]), value(self.args["B"]))
        self.skip = skip_product(self.scan) is not None
        self.inverse = self._inverse_order()
        merged = self.inverse is not None
        self.layout = Layout(self.groups if merged else 1, self.channels)
        self.heads = 1 if merged else self.groups
        self.weights = torch.empty(0)
        self.sensitivity: Tensor | None = None  # (heads, D, D)

    def _inverse_order(self) -> Tensor | None:
        """(K, L): at which step direction k visits each position, where the directions are merged into one map."""
        if self.groups == 1:
            return None
        try:
            cross = find_cross_scan(self.args["u"], self.groups)
            find_merge(cross, self.scan, self.scan)
        except Unprovable:
            return None
        return inverse_table(cross.order)

    @property
    def bytes(self) -> int:
        return 16 * self.heads * self.layout.width**2

    def sums(self, device: torch.device) -> Sums:
        return Sums(self.heads, self.layout.width, device)

    def add_energy(self, moments: Tensor, _: int, env: Mapping[fx.Node, Any]) -> None:
        """Add a batch to ``moments`` (3, K, D): count, sum and sum of squares of every channel of the scan."""
        y = env[self.scan].double().unflatten(1, (self.groups, self.channels))
        moments += torch.stack([torch.ones_like(y).sum((0, 3)), y.sum((0, 3)), y.square().sum((0, 3))])

    def set_weights(self, moments: Tensor, power: float) -> None:
        """How much each channel counts in the step that all share: by its variance to the given power."""
        count, total, square = moments
        energy = (square - total.square() / count.clamp_min(1.0)).clamp_min(0.0) ** power
        energy += 1e-12 * energy.max() + torch.finfo(energy.dtype).tiny
        self.weights = energy / energy.sum(1, keepdim=True)

    def add_sensitivity(self, gradients: Tensor) -> None:
        """Add a batch of gradients by the scan's output (B, K*D, L); a merged map has the same in every direction."""
        g = gradients.double().unflatten(1, (self.groups, self.channels))[:, : self.heads]
        g = _by_head(g)
        added = g.transpose(1, 2) @ g
        self.sensitivity = added if self.sensitivity is None else self.sensitivity + added

    def add(self, sums: Sums, batch_index: int, env: Mapping[fx.Node, Any]) -> None:
        given = {k: env[v] if isinstance(v, fx.Node) else v for k, v in self.args.items()}
        y = env[self.scan]
        step = max(1, _ROWS_BUDGET // (self.heads * self.layout.width * y.shape[2]))
        for half, now in halves_of(y.shape[0], batch_index, step):
            part = {k: t[now] if k in ("u", "delta", "B", "C") else t for k, t in given.items()}
            sums.add(self._rows(y[now], **part), half)

    def _rows(self, y: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_bias: Tensor | None,
              delta_softplus: bool, out_dtype: Any) -> Tensor:  # fmt: skip
        """(heads, items * L, width) float64."""
        compute = torch.promote_types(u.dtype, torch.float32)
        K, D = self.groups, self.channels

        def cast(t: Tensor) -> Tensor:
            return t.to(compute)

        weights = {dtype: self.weights[:, None].to(dtype) for dtype in (delta.dtype, compute)}
        delta1, A1 = shared_step(call, delta, delta_bias, A, weights, lambda t: t.dtype, compute, cast)
        us = u.unflatten(1, (K, D))
        z = ops.shared_scan(cast(us), delta1, A1, cast(B), cast(C), None, delta_softplus)  # (b, K, D, L)
        ys = y.unflatten(1, (K, D))
        if self.inverse is None:
            parts = [z, us, ys]
            return torch.cat([_by_head(t.double()) for t in parts] + [_ones(z, K)], dim=2)
        z, ys = self._in_place(z), self._in_place(ys).sum(1)
        x = us[:, 0].index_select(-1, self.inverse[0].to(us.device))
        flat = [z.flatten(1, 2), x, ys]
        return torch.cat([_by_head(t[:, None].double()) for t in flat] + [_ones(z, 1)], dim=2)

    def _in_place(self, t: Tensor) -> Tensor:
        """(b, K, D, L) in scan order -> in spatial order."""
        assert self.inverse is not None
        return torch.stack([t[:, k].index_select(-1, row.to(t.device)) for k, row in enumerate(self.inverse)], 1)

    def solve(self, sums: Sums, reduction: Reduction) -> RankFit:
        weights = [None] * self.heads if self.sensitivity is None else self.sensitivity
        weightings = [
            Weighting.of(self.channels, project=self.site.annihilated, device=sums.halves.device, weights=G) for G in weights
        ]
        options: dict[str, Any] = {"weightings": weightings, "skip": self.skip}
        rank = reduction.rank
        assert rank is not None  # only the mean has none, and nothing to fit
        if rank == "auto":
            rank = auto_rank(sums, self.layout, reduction.energy or DEFAULT_ENERGY, **options)
        elif rank > self.channels:
            raise SiteError(f"{self.site.name}: rank={rank} is more than its {self.channels} channels")
        fits, energy = fit_low_rank(sums, self.layout, rank, **options)
        return self._as_fit(fits, energy, int(sums.whole[0, -1, -1]))

    def _as_fit(self, heads: list[LowRank], energy: float, rows: int) -> RankFit:
        W, V = torch.cat([f.W for f in heads]), torch.cat([f.V for f in heads])
        skip, bias = (torch.cat([getattr(f, name) for f in heads]) for name in ("s", "b"))
        if self.inverse is not None:  # of the merged map: each direction gets its share
            skip, bias = (t.repeat(self.groups) / self.groups for t in (skip, bias))
        return RankFit(W, V, self.weights, skip if self.skip else None, bias, energy, rows)


def reachable(gm: fx.GraphModule, sites: SiteList) -> SiteList:
    """The sites that a rank-r scan can replace; the others are refused.

    Raises:
        NoSitesError: there is none.
    """
    inside = {node.meta[SITE] for owner, node in scan_nodes(gm) if owner is not gm}
    why = "it lies inside an autocast or checkpoint region, where reduce='rank' does not reach"
    found = SiteList([s for s in sites if s.name not in inside], [*sites.refused, *((n, why) for n in sorted(inside))])
    if not found:
        raise NoSitesError(f"no scan can be replaced by a rank-r scan: {why}")
    return found


def fit_sites(
    gm: fx.GraphModule, sites: Iterable[Site], data: Batches, reduction: Reduction
) -> dict[str, RankFit]:
    """Fits of ``sites`` on the activations of ``gm`` itself, each as if it alone were replaced.

    Raises:
        SiteError: a rank above a site's channels.
        CalibrationError: the loader is empty, a scan's values are not finite, or see :func:`output_gradients`.
    """
    rows = [_SiteRows(gm, site) for site in sites]
    executor = Executor(gm, [])

    def sweep(readers: Mapping[fx.Node, Callable[..., None]]) -> None:
        for index, batch in enumerate(data.sweep()):
            batch = batch.to(executor.device)
            with torch.no_grad():
                executor.visit({n: partial(read, index) for n, read in readers.items()}, *batch.args, **batch.kwargs)

    moments = {r: torch.zeros(3, r.groups, r.channels, dtype=torch.float64, device=executor.device) for r in rows}
    sweep({r.scan: partial(r.add_energy, moments[r]) for r in rows})
    if reduction.fit == "outputs" and rows:
        for gradients in output_gradients(gm, [r.scan for r in rows], data):
            for r, by_output in zip(rows, gradients, strict=True):
                r.add_sensitivity(by_output)
    fits: dict[str, RankFit] = {}
    for some in _grouped(rows):
        for power in WEIGHT_POWERS:
            sums = {r: r.sums(executor.device) for r in some}
            for r in some:
                r.set_weights(moments[r], power)
            sweep({r.scan: partial(r.add, sums[r]) for r in some})
            for r in some:
                if not bool(torch.isfinite(sums[r].halves).all()):
                    raise CalibrationError(
                        f"{r.site.name}: the scan's values are not finite (nan or inf) on the calibration data"
                    )
                fit = r.solve(sums.pop(r), reduction)
                best = fits.get(r.site.name)
                if best is None or (-fit.rank, fit.energy) > (-best.rank, best.energy):
                    fits[r.site.name] = fit
    return fits


def _grouped(rows: list[_SiteRows]) -> Iterable[list[_SiteRows]]:
    """In order, so that each group's sums fit the budget; a site above it goes alone."""
    group: list[_SiteRows] = []
    for r in rows:
        if group and sum(g.bytes for g in group) + r.bytes > SUMS_BUDGET:
            yield group
            group = []
        group.append(r)
    if group:
        yield group


def _by_head(t: Tensor) -> Tensor:
    """(b, heads, C, L) -> (heads, b * L, C)."""
    return t.permute(1, 0, 3, 2).flatten(1, 2)


def _ones(z: Tensor, heads: int) -> Tensor:
    return torch.ones(heads, z.shape[0] * z.shape[-1], 1, dtype=torch.float64, device=z.device)
