"""What a calibration costs: VMamba-T, 1,000 images of 224x224, scored and applied with half of the sites replaced.

    python examples/paper/calibration_cost.py --device cuda

The images are random numbers; the work is the same.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from common import SHORT, VARIANTS
from results import parser, provenance, write_csv, write_markdown

import vmeanba_fx
from vmeanba_fx import models


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default="vmamba_tiny_s1l8")
    p.add_argument("--images", type=int, default=1000)
    p.add_argument("--batch", type=int, default=50)
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["mean", "rank4_refit", "best"])
    args = p.parse_args()
    count, batch, size = (4, 2, 64) if args.quick else (args.images, args.batch, args.size)
    torch.manual_seed(0)
    model = getattr(models, args.model)().eval().to(args.device)
    loader = [(torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))) for _ in range(count // batch)]
    rows = []
    for variant in (VARIANTS[name] for name in args.variants):
        on_gpu = args.device != "cpu"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        options: dict[str, Any] = {"metric": "loss", "progress": False} | variant.calibrate
        started = time.perf_counter()
        plan = vmeanba_fx.calibrate(model, loader, **options)
        scored = time.perf_counter()
        plan.apply(len(plan.sites) // 2, **variant.apply)
        if on_gpu:
            torch.cuda.synchronize()
        applied = time.perf_counter()
        rows.append({
            "model": args.model, "images": count, "size": size, "what": SHORT[variant.name],
            "scoring, s": round(scored - started, 1), "applying, s": round(applied - scored, 1),
            "together, s": round(applied - started, 1),
            "peak memory beyond the model, GB":
                round((torch.cuda.max_memory_allocated() - before) / 1e9, 2) if on_gpu else "",
        })  # fmt: skip
        print(rows[-1], flush=True)
        write_csv(args.out / "calibration_cost.csv", rows)
    text = [list(r.values()) for r in rows]
    note = "Scoring includes capture, the fits of all sites and the curve on held-out images; all runs are in float32."
    write_markdown(args.out / "calibration_cost.md", "Cost of a calibration", list(rows[0]), text, [note, provenance()])


if __name__ == "__main__":
    main()
