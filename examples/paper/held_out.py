"""Which setting to use, told by training images that no calibration saw: a choice must not be made on the test split.

    python examples/paper/held_out.py --device cuda

Four settings that differ in two ways and are `best` of common.py in all else: sites scored as they are replaced, or with the
layer behind them refitted (`refitted=True`); that layer refitted in the end, or the later ones too (`refit="all"`). They are
judged by the kl from the original model's outputs, less is better; the points of accuracy lost are shown beside it. The
images are those of the training split that are in no calibration set of any seed in `HELD_OUT_FROM`. `--plot-only` tabulates
the files that are there.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import (
    TASKS,
    VARIANTS,
    Study,
    Variant,
    arrays,
    fashion_images,
    parser,
    pick,
    read_csv,
    subset,
    write_csv,
    write_tables,
)
from curves import cell
from torch import Tensor, nn

from vmeanba_fx.metrics import kl

SCORED = {"refitted": True, "as replaced": False}
REFITS = {"all": "all", "next layer": True}
HELD_OUT_FROM = (0, 1, 2)


def setting(scored: str, refit: str) -> Variant:
    best = VARIANTS["best"]
    return Variant(f"{scored}, {refit}", best.calibrate | {"refitted": SCORED[scored]}, {"refit": REFITS[refit]}, best.line)


def held_out(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 96, 96) and labels of the training split outside all calibration sets."""
    images, labels = arrays(args.data, "fashion", True)
    free = torch.ones(len(labels), dtype=torch.bool)
    for seed in HELD_OUT_FROM:
        free[subset(len(labels), args.calibration_images, True, seed)] = False
    chosen = free.nonzero()[: 16 if args.quick else args.images, 0]
    return fashion_images(images[chosen].to(args.device), 96), labels[chosen].to(args.device)


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(x) for x in images.split(500)])


def run(study: Study, images: Tensor, labels: Tensor, args: argparse.Namespace, path: Path) -> None:
    """Measures and writes as it goes. Settings that choose the same sites are one model."""
    until, rows = time.perf_counter() + args.seconds, []
    original = logits(study.model, images)
    right = (original.argmax(1) == labels).sum()
    judged: dict[tuple[str, frozenset[str]], dict[str, Any]] = {}
    for refit, k, scored in itertools.product(REFITS, args.ks or range(1, len(study.sites) + 1), SCORED):
        if time.perf_counter() > until:
            return
        variant = setting(scored, refit)
        sites = frozenset(study.plan(variant).choose(k))
        if (refit, sites) not in judged:
            new = logits(study.apply(variant, k), images)
            judged[refit, sites] = {
                "kl": f"{float(kl(new, original).mean()):.6f}", "changed": int((new.argmax(1) != original.argmax(1)).sum()),
                "drop": round(100 * float(right - (new.argmax(1) == labels).sum()) / len(labels), 3),
            }  # fmt: skip
        kept = " ".join(str(i) for i, s in enumerate(study.sites) if s.name not in sites)
        row = {"task": study.task.name, "seed": study.seed, "images": len(labels), "scored": scored, "refit": refit, "k": k}
        rows.append(row | judged[refit, sites] | {"kept": kept})
        print(rows[-1], flush=True)
        write_csv(path, rows)


def tables(folder: Path) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """A task each: kl and points lost of every setting, by K."""
    found: dict[str, list[dict[str, str]]] = {}
    origins: dict[str, list[str]] = {}
    for path in sorted((folder / "held_out").glob("*.csv")):
        rows, origin = read_csv(path)
        found.setdefault(rows[0]["task"], []).extend(rows)
        origins.setdefault(rows[0]["task"], []).append(f"* {path.name}: {origin}")
    for name, rows in found.items():
        ks = sorted({int(r["k"]) for r in rows})
        lines = []
        for refit, (measure, scale, title) in itertools.product(REFITS, (("kl", 1e3, "1000 kl"), ("drop", 1, "points lost"))):
            by_seed = {
                scored: [
                    {r["seed"]: scale * float(r[measure]) for r in rows
                     if (r["scored"], r["refit"], int(r["k"])) == (scored, refit, k)} for k in ks
                ]
                for scored in SCORED
            }  # fmt: skip
            lines += [[refit, title, scored, *(cell(list(of.values())) for of in cells)] for scored, cells in by_seed.items()]
            paired = [[a[seed] - b[seed] for seed in a if seed in b] for a, b in zip(*by_seed.values(), strict=True)]
            lines.append([refit, title, "difference", *map(cell, paired)])
        title = f"{TASKS[name].title}, {rows[0]['images']} held-out training images"
        yield title, ["refit", "measure", "scored", *(f"K={k}" for k in ks)], lines, ["\n".join(origins[name])]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--tasks", nargs="+", choices=["v05", "v0", "deep"], default=["v05", "v0"])
    p.add_argument("--seeds", nargs="+", type=int, choices=HELD_OUT_FROM, default=HELD_OUT_FROM)
    p.add_argument("--ks", nargs="+", type=int, help="which k (default: all)")
    p.add_argument("--images", type=int, default=8000, help="held-out images at most")
    p.add_argument("--calibration-images", type=int, default=4000, metavar="N")
    p.add_argument("--seconds", type=float, default=1e9, help="stop after this time; what is measured is kept")
    p.add_argument("--tag", default="", help="added to the names of the files")
    p.add_argument("--plot-only", action="store_true", help="only make the tables from the files that are there")
    args = p.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    if not args.plot_only:
        images, labels = held_out(args)
        for task, seed in itertools.product(pick(args.tasks), args.seeds):
            study = Study(task, args, seed, args.calibration_images)
            run(study, images, labels, args, args.out / "held_out" / f"{task.name}_seed{seed}{args.tag}.csv")
    note = (
        "Mean and standard deviation over the seeds of the calibration data; differences are taken seed by seed, first line "
        "less second: negative where scoring refitted sites is better. Where both choose the same sites it is zero."
    )
    write_tables(args.out / "held_out.md", tables(args.out), [note])


if __name__ == "__main__":
    main()
