"""Do gradients rank the sites as measuring does? Spearman's rank correlation of both scores.

    python examples/paper/gradient_scores.py --device cuda

`--plot-only` tabulates the files that are there, one per task.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from common import SHORT, TASKS, VARIANTS, Task, batches, pick
from results import parser, read_by_task, write_csv, write_markdown

import vmeanba_fx

METRICS = ("loss", "kl")


def rows_of(task: Task, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    graph = None
    for count in [8] if args.quick else args.images:
        calibration = batches(*task.load(args.data, True, count, 0, args.device), 32)
        graph = graph or vmeanba_fx.capture(task.model(args.device), (calibration[0][0][:2],))
        for variant in (VARIANTS["mean"], VARIANTS["rank4"]):
            options: dict[str, Any] = {"score": "both", "held_out": False, "progress": False} | variant.calibrate
            found = {m: vmeanba_fx.calibrate(graph, calibration, metric=m, **options).correlation() for m in METRICS}
            row = {"task": task.name, "images": count, "replaced by": SHORT[variant.name]}
            yield row | {m: float("nan") if value is None else round(value, 4) for m, value in found.items()}


def main() -> None:
    p = parser(__doc__)
    tasks = ["v05", "v0", "deep", "segmentation", "segmentation_scans"]
    p.add_argument("--tasks", nargs="+", choices=list(TASKS), default=tasks)
    p.add_argument("--images", nargs="+", type=int, default=[64, 256])
    p.add_argument("--plot-only", action="store_true", help="only make the table from the files that are there")
    args = p.parse_args()
    for task in [] if args.plot_only else pick(args.tasks):
        rows = []
        for row in rows_of(task, args):
            rows.append(row)
            print(row, flush=True)
            write_csv(args.out / "gradient_scores" / f"{task.name}.csv", rows)
    found = read_by_task(args.out / "gradient_scores", TASKS)
    text = [
        [r["task"], r["images"], r["replaced by"], *(f"{float(r[m]):.2f}" for m in METRICS)]
        for rows, _ in found.values() for r in rows
    ]  # fmt: skip
    note = "Spearman's correlation over the sites of measured and gradient scores of the loss and of kl."
    notes = [note, "\n".join(origin for _, origins in found.values() for origin in origins)]
    head = ["task", "images", "replaced by", *METRICS]
    write_markdown(args.out / "gradient_scores.md", "Gradient scores", head, text, notes)


if __name__ == "__main__":
    main()
