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
# One setting for all, chosen by held_out.py. Which variant does best on the test split must not decide.
CHOSEN = "best"


def line(task: str, k: int, limit: float, name: str, of: dict[str, dict[int, list[float]]]) -> list[str]:
    values = of[name][k]
    reached, limit = round(statistics.fmean(values), 2) + 0.0, round(limit, 2)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    verdict = "yes" if reached <= limit else "no, by less than the spread" if reached - spread <= limit else "no"
    return [TASKS[task].title, f"{k}", cell(of["mean"].get(k)), f"{limit:.2f}", cell(values), SHORT[name], verdict]


def rows_of(folder: Path) -> list[list[str]]:
    drops, *_ = collected(folder)
    limits = {(task, k, CHOSEN): limit for task, of in ABSOLUTE for k, limit in of.items()}
    for task in RELATIVE:
        limits |= {(task, k, CHOSEN): max(statistics.fmean(mean) / 3, 0.0) for k, mean in sorted(drops[task]["mean"].items())}
    rank8 = ("rank8_refit", "rank8_refit_all")
    limits |= {(task, k, v): limit for task in SCANS for k, limit in ((1, 3.0), (3, 10.0)) for v in rank8}
    found = {key: drops.get(key[0], {}) for key in limits}
    return [line(task, k, limits[task, k, v], v, of) for (task, k, v), of in found.items() if k in of.get(v, {})]


def main() -> None:
    head = ["model", "K", "paper's mean loses", "at most", "reached", "with", "met"]
    notes = [
        "Points lost on the test split, mean and standard deviation over three seeds of the calibration data, two where it "
        "says (2); compared as they are printed. Rank 16 to outputs, scored refitted, was compared with its alternatives on "
        "held-out training images (held_out.md); all variants: curves_*.md."
    ]
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
