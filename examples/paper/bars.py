"""What was aimed at against what was reached, from the files of the other scripts.

    python examples/paper/bars.py
"""

from __future__ import annotations

import statistics
from pathlib import Path

from common import SHORT, TASKS
from curves import collected
from frontier import ALL, FULL_SIZE, joined
from results import RESULTS, cell, read_csv, write_markdown

ABSOLUTE = [("v05", {5: 0.15, 7: 0.25, 10: 1.0}), ("v0", {7: 0.2, 10: 0.4})]
RELATIVE = ("deep", "segmentation", "segmentation_scans")
SCANS = ("scan_v05_digits", "scan_v0_digits", "scan_v05_fashion", "scan_v0_fashion")
# All of them, whatever they reach: a choice by these numbers would be one on the test split.
SHOWN = ("rank4_refit", "rank16_refit", "rank16_refit_all", "rank16_outputs_refit_all", "best")


def line(task: str, k: int, limit: float, name: str, values: list[float], mean: list[float] | None) -> list[str]:
    reached = statistics.fmean(values)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    verdict = "yes" if reached <= limit else "no, by less than the spread" if reached - spread <= limit else "no"
    return [TASKS[task].title, f"{k}", cell(mean), f"{limit:.2f}", cell(values), SHORT[name], verdict]


def rows_of(folder: Path) -> list[list[str]]:
    drops, *_ = collected(folder)
    rows = []
    for task, limits in ABSOLUTE:
        for k, limit in limits.items():
            of = drops.get(task, {})
            rows += [line(task, k, limit, v, of[v][k], of.get("mean", {}).get(k)) for v in SHOWN if k in of.get(v, {})]
    for task in RELATIVE:
        for k, mean in sorted(drops.get(task, {}).get("mean", {}).items()):
            limit, of = max(statistics.fmean(mean) / 3, 0.0), drops[task]
            rows += [line(task, k, limit, v, of[v][k], mean) for v in SHOWN if k in of.get(v, {})]
    for task in SCANS:
        found = drops.get(task, {}).get("rank8_refit", {})
        for k, limit in ((1, 3.0), (3, 10.0)):
            if k in found:
                rows.append(line(task, k, limit, "rank8_refit", found[k], drops[task].get("mean", {}).get(k)))
    return rows


def main() -> None:
    head = ["model", "K", "paper's mean loses", "at most", "reached", "with", "met"]
    notes = ["Points lost on the test split, mean and standard deviation over the seeds of the calibration data."]
    for path in sorted((RESULTS / "frontier").glob(f"{FULL_SIZE}*.csv")):
        rows, origin = read_csv(path)
        mode, ms = joined(rows)
        parts = [
            f"{v} at K={k}: {t / ms['rank1', k, ALL]:.3f}"
            for (v, k, p), t in ms.items() if v in ("rank2", "rank4") and p == ALL
        ]  # fmt: skip
        notes.append(f"Time against rank 1, {FULL_SIZE}, {mode} (at most 1.10): {'; '.join(parts)}. {origin}")
    cost = RESULTS / "calibration_cost.csv"
    if cost.is_file():
        rows, origin = read_csv(cost)
        parts = [f"{r['what']}: {r['together, s']} s, {r['peak memory beyond the model, GB']} GB" for r in rows]
        notes.append(f"Calibration with {rows[0]['images']} images (under 60 s, under 4 GB): {'; '.join(parts)}. {origin}")
    write_markdown(RESULTS / "bars.md", "Aims and results", head, rows_of(RESULTS), notes)
    print((RESULTS / "bars.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
