"""Which setting to use, told by training images that no calibration saw: a choice must not be made on the test split.

    python examples/paper/held_out.py --device cuda

Four settings that differ in two ways and are `best` of common.py in all else: sites scored as they are replaced, or with the
layer behind them refitted (`refitted=True`); that layer refitted in the end, or the later ones too (`refit="all"`). They are
judged by the kl from the original model's outputs, less is better; the points of accuracy lost are shown beside it. The
images are training images that are in no calibration set of any seed. `--plot-only` tabulates the files that are there.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import CALIBRATION_IMAGES, HELD_OUT, SEEDS, TASKS, VARIANTS, Study, Variant, evaluate, pick
from results import cell, parser, read_by_task, write_csv, write_tables
from torch import Tensor, nn

from vmeanba_fx.calibration.metrics import kl

SCORED = {"refitted": True, "as replaced": False}
REFITS = {"all": "all", "next layer": True}


def setting(scored: str, refit: str) -> Variant:
    best = VARIANTS["best"]
    return Variant(f"{scored}, {refit}", best.calibrate | {"refitted": SCORED[scored]}, {"refit": REFITS[refit]}, best.line)


@torch.inference_mode()
def difference(model: nn.Module, original: nn.Module, images: Tensor) -> tuple[float, int]:
    """Mean kl from the original's outputs, and how many predictions differ."""
    total, changed = 0.0, 0
    for x in images.split(500):
        new, old = model(x), original(x)
        total += float(kl(new, old).double().sum())
        changed += int((new.argmax(1) != old.argmax(1)).sum())
    return total / len(images), changed


def run(study: Study, images: Tensor, labels: Tensor, args: argparse.Namespace, path: Path) -> None:
    """Measures and writes as it goes. Settings that choose the same sites are one model."""
    until, rows = time.perf_counter() + args.seconds, []
    base = evaluate(study.model, images, labels, study.task.measure)
    judged: dict[tuple[str, frozenset[str]], dict[str, Any]] = {}
    for k, refit, scored in itertools.product(args.ks or range(1, len(study.sites) + 1), REFITS, SCORED):
        if time.perf_counter() > until:
            return
        variant = setting(scored, refit)
        sites = frozenset(study.plan(variant).choose(k))
        if (refit, sites) not in judged:
            model = study.apply(variant, k)
            mean, changed = difference(model, study.model, images)
            drop = base - evaluate(model, images, labels, study.task.measure)
            judged[refit, sites] = {"kl": f"{mean:.6f}", "changed": changed, "drop": round(drop, 3)}
        kept = " ".join(str(i) for i, s in enumerate(study.sites) if s.name not in sites)
        row = {"task": study.task.name, "seed": study.seed, "images": len(labels), "scored": scored, "refit": refit, "k": k}
        rows.append(row | judged[refit, sites] | {"kept": kept})
        print(rows[-1], flush=True)
        write_csv(path, rows)


def tables(folder: Path) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """A task each: kl and points lost of every setting, by K."""
    for name, (rows, origins) in read_by_task(folder / "held_out", TASKS).items():
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
        yield title, ["refit", "measure", "scored", *(f"K={k}" for k in ks)], lines, ["\n".join(origins)]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["v05", "v0"])
    p.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    p.add_argument("--ks", nargs="+", type=int, help="which k (default: all)")
    p.add_argument("--images", type=int, default=8000, help="held-out images at most")
    p.add_argument("--calibration-images", type=int, default=CALIBRATION_IMAGES, metavar="N", help="not more than 4,000")
    p.add_argument("--seconds", type=float, default=1e9, help="stop after this time; what is measured is kept")
    p.add_argument("--tag", default="", help="added to the names of the files")
    p.add_argument("--plot-only", action="store_true", help="only make the tables from the files that are there")
    args = p.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    if not args.plot_only:
        if args.calibration_images > CALIBRATION_IMAGES:
            p.error(f"--calibration-images: at most {CALIBRATION_IMAGES}, so that images are left to judge by")
        for task in pick(args.tasks):
            images, labels = task.load(args.data, True, 16 if args.quick else args.images, HELD_OUT, args.device)
            if not len(labels):
                p.error(f"{task.name}: no training images are left to judge by")
            for seed in args.seeds:
                study = Study(task, args, seed, args.calibration_images)
                run(study, images, labels, args, args.out / "held_out" / f"{task.name}_seed{seed}{args.tag}.csv")
    note = (
        "Mean and standard deviation over the seeds of the calibration data; differences are taken seed by seed, first line "
        "less second: negative where scoring refitted sites is better. Where both choose the same sites it is zero."
    )
    write_tables(args.out / "held_out.md", tables(args.out), [note])


if __name__ == "__main__":
    main()
