"""Other ways to reduce the channels: random projections, subsets of channels, a learned gate, against the mean and rank r.

    python examples/paper/reductions.py --device cuda

All of them scan r channels W u with a shared step and decay (the weighted means of rank r) and give V times the result to
all channels; they differ in W and V. "Fitted" means that V comes from least squares on calibration images. No refits; the
same sites for all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from channel_statistics import Scans
from common import TASKS, VARIANTS, Study, pick
from results import parser, read_csv, write_csv, write_tables
from torch import Tensor
from vmeanba_fx.passes import rank_scan
from vmeanba_fx.passes.rank_scan import RankFit

from vmeanba_fx import ops
from vmeanba_fx.graph import copy_graph
from vmeanba_fx.plan import Plan

RIDGE = 1e-4


@dataclass
class Grams:
    """Of one site, per direction (K, D, D): Z the shared-decay scan of every channel of u, Y the true scan."""

    ZZ: Tensor
    ZY: Tensor
    YY: Tensor
    weights: Tensor
    rows: int = 0

    def readout(self, W: Tensor) -> Tensor:
        """Least-squares V (K, D, r) for projections W (K, r, D)."""
        gram = W @ self.ZZ @ W.mT
        scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(gram + RIDGE * scale * eye, W @ self.ZY).mT

    def explained(self, W: Tensor, V: Tensor) -> float:
        M = (V @ W).mT  # y ~ M^T z
        left = self.YY.diagonal(dim1=1, dim2=2).sum() - 2 * (M * self.ZY).sum() + (M * (self.ZZ @ M)).sum()
        return float(1 - left / self.YY.diagonal(dim1=1, dim2=2).sum())


def grams(study: Study) -> dict[str, Grams]:
    """For every site, from the calibration images."""
    found: dict[str, Grams] = {}
    fits = study.plan(VARIANTS["rank1"]).fits

    def see(name: str, a: dict[str, Any] | None, y: Tensor) -> None:
        if a is None:
            return
        groups = a["B"].shape[1]
        u, delta = (a[key].float().unflatten(1, (groups, -1)) for key in ("u", "delta"))
        w = fits[name].weights.to(u)  # (K, D)
        bias = 0.0 if a["delta_bias"] is None else (w * a["delta_bias"].float().view(groups, -1)).sum(1)[:, None]
        step = (delta * w[:, :, None]).sum(2) + bias
        A = (a["A"].float().unflatten(0, (groups, -1)) * w[:, :, None]).sum(1)
        z = ops.shared_scan(u, step, A, a["B"].float(), a["C"].float(), None, a["delta_softplus"])
        Z, Y = (t.double().permute(1, 0, 3, 2).flatten(1, 2) for t in (z, y.unflatten(1, (groups, -1))))
        new = Grams(Z.mT @ Z, Z.mT @ Y, Y.mT @ Y, fits[name].weights, Z.shape[1])
        old = found.get(name)
        found[name] = new if old is None else Grams(
            old.ZZ + new.ZZ, old.ZY + new.ZY, old.YY + new.YY, old.weights, old.rows + new.rows
        )  # fmt: skip

    with torch.inference_mode():
        for images, _ in study.calibration:
            Scans(study.graph, see).run(images)
    return found


# -- W (K, r, D) and V (K, D, r) --------------------------------------------------------------------------------------


def plain_mean(g: Grams, r: int, seed: int) -> tuple[Tensor, Tensor]:
    K, D, _ = g.ZZ.shape
    return g.ZZ.new_full((K, 1, D), 1 / D), g.ZZ.new_ones(K, D, 1)


def mean_fitted(g: Grams, r: int, seed: int) -> tuple[Tensor, Tensor]:
    W, _ = plain_mean(g, r, seed)
    return W, g.readout(W)


def gate(g: Grams, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """The best weights of a weighted mean that is copied to all channels."""
    _, V = plain_mean(g, r, seed)
    eye = torch.eye(g.ZZ.shape[-1], dtype=g.ZZ.dtype, device=g.ZZ.device)
    scale = g.ZZ.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    return torch.linalg.solve(g.ZZ + RIDGE * scale * eye, g.ZY.mean(-1, keepdim=True)).mT, V


def random(g: Grams, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """Orthonormal random directions, and back the same way."""
    K, D, _ = g.ZZ.shape
    draw = torch.randn(K, D, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Q = torch.linalg.qr(draw).Q.to(g.ZZ)
    return Q.mT, Q


def random_fitted(g: Grams, r: int, seed: int) -> tuple[Tensor, Tensor]:
    W, _ = random(g, r, seed)
    return W, g.readout(W)


def subset(g: Grams, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """The r channels with the strongest scans; every channel gets the chosen one that it correlates with most."""
    K, D, _ = g.YY.shape
    power = g.YY.diagonal(dim1=1, dim2=2)
    chosen = power.topk(r, dim=1).indices
    W = g.ZZ.new_zeros(K, r, D).scatter_(2, chosen[:, :, None], 1.0)
    correlation = (W @ g.YY) / (power.gather(1, chosen)[:, :, None] * power[:, None]).sqrt().clamp_min(1e-12)
    V = g.ZZ.new_zeros(K, D, r).scatter_(2, correlation.argmax(1)[:, :, None], 1.0)
    return W, V


def subset_fitted(g: Grams, r: int, seed: int) -> tuple[Tensor, Tensor]:
    W, _ = subset(g, r, seed)
    return W, g.readout(W)


WAYS: list[tuple[str, Callable[[Grams, int, int], tuple[Tensor, Tensor]], tuple[int, ...]]] = [
    ("mean of the inputs", plain_mean, (1,)),
    ("mean, fitted gains", mean_fitted, (1,)),
    ("learned gate", gate, (1,)),
    ("random projection", random, (1, 4, 16)),
    ("random projection, fitted", random_fitted, (1, 4, 16)),
    ("subset of channels", subset, (1, 4, 16)),
    ("subset of channels, fitted", subset_fitted, (1, 4, 16)),
]


def rows_of(study: Study, quick: bool) -> Iterator[dict[str, Any]]:
    order = study.plan(VARIANTS["mean"])
    n = len(study.sites)
    picks = {"one": 1, "half": (n + 1) // 2, "all": n}
    of_site = grams(study)

    def row(way: str, r: int, fits: dict[str, RankFit], measured: Callable[[list[str]], float]) -> dict[str, Any]:
        found: dict[str, Any] = {"task": study.task.name, "way": way, "r": r}
        found["explained, %"] = round(100 * sum(f.energy for f in fits.values()) / max(len(fits), 1), 1)
        for label, k in picks.items():
            found[f"drop, {label}"] = round(study.base - measured(order.choose(k)), 3)
            found[f"K, {label}"] = k
        return found

    def applied(plan: Plan, names: list[str]) -> float:
        return study.measure(plan.apply(sites=names, skip_passes=study.skipped))

    def rewritten(fits: dict[str, RankFit], names: list[str]) -> float:
        gm = rank_scan(copy_graph(study.graph), {name: fits[name] for name in names})
        gm.recompile()
        return study.measure(gm)

    for r in (1,) if quick else (1, 4, 16):
        plan = study.plan(VARIANTS[f"rank{r}"])
        yield row("rank r", r, plan.fits, functools.partial(applied, plan))
    for way, make, ranks in WAYS[:2] if quick else WAYS:
        for r in ranks:
            fits = {}
            for name, g in of_site.items():
                W, V = make(g, r, 0)
                fits[name] = RankFit(W, V, g.weights, None, None, g.explained(W, V), g.rows)
            yield row(way, r, fits, functools.partial(rewritten, fits))


def tables(path: Path) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    rows, origin = read_csv(path)
    for name in dict.fromkeys(r["task"] for r in rows):
        mine = [r for r in rows if r["task"] == name]
        counts = [mine[0][f"K, {label}"] for label in ("one", "half", "all")]
        head = ["way", "r", "explained, %", *(f"K={k}" for k in counts)]
        drops = [[f"{float(r[f'drop, {label}']):.2f}" for label in ("one", "half", "all")] for r in mine]
        text = [[r["way"], r["r"], r["explained, %"], *lost] for r, lost in zip(mine, drops, strict=True)]
        yield TASKS[name].title, head, text, [origin]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["scan_v05_digits", "v05", "v0"])
    p.add_argument("--plot-only", action="store_true", help="only make the tables from the file that is there")
    args = p.parse_args()
    values = args.out / "reductions.csv"
    rows: list[dict[str, Any]] = []
    for task in [] if args.plot_only else pick(args.tasks):
        for row in rows_of(Study(task, args), args.quick):
            rows.append(row)
            print(row, flush=True)
            write_csv(values, rows)
    note = (
        "Drop in points on the test split with one site, half of the sites and all of them replaced, in the order of the "
        "paper's mean. Explained: share of the energy of the scan on the calibration images, mean over the sites; negative: "
        "worse than nothing. `rank r` also changes the D of the skip, and its share is of the energy about the mean, less "
        "what a LayerNorm absorbs."
    )
    write_tables(args.out / "reductions.md", tables(values), [note])


if __name__ == "__main__":
    main()
