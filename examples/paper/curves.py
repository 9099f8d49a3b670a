"""Figure 4 and more: accuracy or mIoU against the number of replaced sites, for every transform.

    python examples/paper/curves.py --device cuda --tasks v05 --seeds 0 1 2
    python examples/paper/curves.py --plot-only

A variant is the paper's mean or a rank-r scan, with or without refitted readouts, the sites chosen from one round of scores
or greedily. Everything is fitted and chosen on training images (`--calibration-images` of them, another choice for each
seed); the test split is measured at the end and nothing else. Results are added to one file per task and seed, so that
runs can be spread over GPUs; `--plot-only` tabulates and draws all files that are there.
"""

from __future__ import annotations

import argparse
import statistics
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import SEEDS, SHORT, TASKS, VARIANTS, Study, Variant, pick
from results import cell, drawn, legend_below, panels, parser, read_csv, show_points_lost, write_csv, write_tables

PANELS = {
    "classification": ("v05", "v0", "deep"),
    "segmentation": ("segmentation", "segmentation_scans"),
    "scan-dependent": ("scan_v05_digits", "scan_v0_digits", "scan_v05_fashion", "scan_v0_fashion"),
    "live": ("scan_live_digits", "scan_vim_digits", "scan_mambavision_digits", "mambavision_fashion"),
}
# The tables have all variants; more lines than these lie on top of each other.
DRAWN = ("mean", "rank1_refit", "rank4_refit", "rank8_refit_all", "rank16_refit", "best")


def curve(study: Study, variant: Variant, ks: list[int], until: float) -> Iterator[dict[str, Any]]:
    """One row per k; stops when the time is over."""
    started = time.perf_counter()
    study.plan(variant)
    scoring = time.perf_counter() - started
    for k in ks:
        if time.perf_counter() > until:
            break
        started = time.perf_counter()
        gm = study.apply(variant, k)
        applying = time.perf_counter() - started
        value = study.measure(gm)
        yield {
            "task": study.task.name, "variant": variant.name, "seed": study.seed, "k": k, "value": round(value, 3),
            "drop": round(study.base - value, 3), "scoring_s": round(scoring, 1), "applying_s": round(applying, 1),
        }  # fmt: skip


def numbers(sites: int, quick: bool) -> list[int]:
    """The k that are measured: all of them for small models, about eight for larger ones."""
    if quick:
        return [1, sites]
    if sites <= 4:
        return list(range(1, sites + 1))
    if sites <= 10:
        return [k for k in (1, 3, 5, 7, 8, 9, 10) if k < sites] + [sites]
    return [*range(2, sites, 3), sites]


def run(args: argparse.Namespace) -> None:
    until = time.perf_counter() + args.seconds
    for task in pick(args.tasks):
        for seed in args.seeds:
            study = Study(task, args, seed, args.calibration_images)
            path = args.out / "curves" / f"{task.name}_seed{seed}{args.tag}.csv"
            rows = [{
                "task": task.name, "variant": "original", "seed": seed, "k": 0, "value": round(study.base, 3), "drop": 0.0,
                "scoring_s": 0.0, "applying_s": 0.0,
            }]  # fmt: skip
            for name in args.variants:
                if time.perf_counter() < until:
                    for row in curve(study, VARIANTS[name], args.ks or numbers(len(study.sites), args.quick), until):
                        print(row, flush=True)
                        rows.append(row)
                        write_csv(path, rows)


# -- tables and plots -------------------------------------------------------------------------------------------------


def collected(folder: Path) -> tuple[dict[str, dict[str, dict[int, list[float]]]], dict[str, float], dict[str, str]]:
    """drops[task][variant][k] over seeds, the base of every task, and where the numbers of every file come from."""
    by_seed: dict[tuple[str, str, int], dict[str, float]] = {}
    bases: dict[str, float] = {}
    origins: dict[str, str] = {}
    for path in sorted((folder / "curves").glob("*.csv")):
        rows, origin = read_csv(path)
        origins[path.stem] = origin
        for row in rows:
            if row["variant"] == "original":
                bases[row["task"]] = float(row["value"])
            else:
                by_seed.setdefault((row["task"], row["variant"], int(row["k"])), {})[row["seed"]] = float(row["drop"])
    drops: dict[str, dict[str, dict[int, list[float]]]] = {}
    for (task, variant, k), found in by_seed.items():
        drops.setdefault(task, {}).setdefault(variant, {})[k] = list(found.values())
    return drops, bases, origins


def tabulated(folder: Path) -> None:
    drops, bases, origins = collected(folder)
    for panel, names in PANELS.items():
        tables, shown = [], [n for n in names if n in drops]
        for name in shown:
            ks = sorted({k for of in drops[name].values() for k in of})
            rows = [[SHORT[v], *(cell(drops[name][v].get(k)) for k in ks)] for v in VARIANTS if v in drops[name]]
            title = f"{TASKS[name].title}: {bases[name]:.2f} % {TASKS[name].measure}"
            tables.append((title, ["variant", *(f"K={k}" for k in ks)], rows))
        if not shown:
            continue
        note = (
            "Drop of the test measure in points, mean and standard deviation over three seeds of the calibration data, "
            "over two where it says (2); one seed where there is no deviation. Negative: better than the original."
        )
        commands: dict[str, list[str]] = {}
        for file, origin in origins.items():
            if any(file.startswith(f"{name}_seed") for name in shown):
                commands.setdefault(origin, []).append(file)
        own = [f"* {', '.join(files)}: {origin}" for origin, files in commands.items()]
        write_tables(folder / f"curves_{panel}.md", tables, [note, "", *own])
        drawn(plot, folder / f"curves_{panel}.png", shown, drops, bases)


def plot(plt, path: Path, names: list[str], drops: dict, bases: dict[str, float]) -> None:
    fig, axes = panels(plt, len(names), 0.6)
    for name, ax in zip(names, axes, strict=True):
        most = 0.0
        for variant in (v for v in DRAWN if v in drops[name]):
            of = {0: [0.0]} | drops[name][variant]
            ks = sorted(of)
            means, low, high = ([pick_one(of[k]) for k in ks] for pick_one in (statistics.fmean, min, max))
            line = ax.plot(ks, means, VARIANTS[variant].line, label=SHORT[variant], lw=1.5, ms=5)[0]
            ax.fill_between(ks, low, high, color=line.get_color(), alpha=0.15, lw=0)
            most = max(most, *means)
        show_points_lost(ax, most)
        measure = f"of {bases[name]:.1f} % {TASKS[name].measure}"
        ax.set(title=textwrap.fill(TASKS[name].title, 48), xlabel="K, sites replaced", ylabel=f"points lost {measure}")
        ax.xaxis.get_major_locator().set_params(integer=True)
    legend_below(fig, 4)
    fig.savefig(path, dpi=110)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    p.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    p.add_argument("--ks", nargs="+", type=int, help="which k (default: a choice that depends on the model)")
    p.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    p.add_argument("--calibration-images", type=int, default=1000, metavar="N")
    p.add_argument("--seconds", type=float, default=1e9, help="stop after this time; what is measured is kept")
    p.add_argument("--tag", default="", help="added to the names of the files")
    p.add_argument("--plot-only", action="store_true", help="tabulate and draw the files that are there")
    args = p.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    if not args.plot_only:
        run(args)
    tabulated(args.out)


if __name__ == "__main__":
    main()
