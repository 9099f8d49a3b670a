"""Do gradients rank the sites as measuring does? Spearman's rank correlation of both scores.

    python examples/paper/gradient_scores.py --device cuda
"""

from __future__ import annotations

from common import TASKS, batches, pick
from results import parser, provenance, write_csv, write_markdown

import vmeanba_fx


def main() -> None:
    p = parser(__doc__)
    tasks = ["v05", "v0", "deep", "segmentation", "segmentation_scans"]
    p.add_argument("--tasks", nargs="+", choices=list(TASKS), default=tasks)
    p.add_argument("--images", nargs="+", type=int, default=[64, 256])
    args = p.parse_args()
    rows = []
    for task in pick(args.tasks):
        graph = None
        for count in [8] if args.quick else args.images:
            calibration = batches(*task.load(args.data, True, count, 0, args.device), 32)
            graph = graph or vmeanba_fx.capture(task.model(args.device), (calibration[0][0][:2],))
            for label, options in (("mean", {}), ("rank 4", {"reduce": "rank", "rank": 4})):
                row = {"task": task.name, "images": count, "replaced by": label}
                for metric in ("loss", "kl"):
                    plan = vmeanba_fx.calibrate(
                        graph, calibration, metric=metric, score="both", held_out=False, progress=False, **options
                    )
                    row[metric] = plan.correlation()
                rows.append(row)
                print(row, flush=True)
                write_csv(args.out / "gradient_scores.csv", rows)
    text = [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    note = "Spearman's correlation over the sites of measured and gradient scores of the loss and of kl."
    write_markdown(args.out / "gradient_scores.md", "Gradient scores", list(rows[0]), text, [note, provenance()])


if __name__ == "__main__":
    main()
