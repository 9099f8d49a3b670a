"""Compact tables of what end_to_end.py measured: times, speed-ups over the official model, and peak memory.

    python benchmarks/summary.py benchmarks/results/end_to_end_NVIDIA-H100-80GB-HBM3_torch2.11.0.csv

Writes them beside the CSV, as ``*_summary.md``.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

from tabulate import tabulate

PRECISIONS = {"amp16": "fp16", "ampbf16": "bf16", "fp32": "fp32"}
SHARES = {"k=0": 0, "k=n/4": 0.25, "k=n/2": 0.5, "k=n": 1}
HEAD = ("model", "precision", "batch", "official, ms", *SHARES, "peak MiB: official, k=0, k=n")
ABOUT = """ms, and in brackets how many times as fast as the official model in the same mode (without the option, if that was
not measured); of compiled models also, how many times as fast as the official model eager. Batches that wait for the CPU
are summed up as CUDA graphs only.
"""
REPLAYED, UNROLLED = "CUDA graph", ", unrolled"
BOUND_BY_CPU = 32  # batches up to this
Row = dict[str, str]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("tables", type=Path, nargs="+", metavar="CSV", help="what end_to_end.py wrote")
    for path in p.parse_args().tables:
        if path.suffix != ".csv" or not path.is_file():
            p.error(f"{path}: no such CSV file")
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        parts = [ABOUT]
        parts += [f"{title(mode)}:\n\n{tabulate(lines, HEAD, tablefmt='github', disable_numparse=True)}\n"
                  for mode in sorted({r["mode"] for r in rows}, key=rank) if (lines := summary(rows, mode))]  # fmt: skip
        path.with_name(f"{path.stem}_summary.md").write_text("\n".join(parts))
        print("\n".join(parts))


def title(mode: str) -> str:
    first, *more = mode.split(", ")
    options = " and ".join(f"`{option}`" for option in more if "=" in option)
    replayed = ", replayed as a CUDA graph" if REPLAYED in more else ""
    return {"compiled": "`torch.compile`", "eager": "Eager"}[first] + (f" with {options}" if options else "") + replayed


def rank(mode: str) -> tuple[bool, bool, str]:
    return REPLAYED in mode, mode.startswith("eager"), mode


def summary(rows: list[Row], mode: str) -> list[list[str]]:
    """A line for each model, precision and batch, and one more for graphs with unrolled depthwise convolutions."""
    lines = []
    default, eager = re.sub(", [a-z_.]+=[^,]+", "", mode), f"eager, {REPLAYED}" if REPLAYED in mode else "eager"
    for model, precision, batch in sorted({(r["model"], r["precision"], r["batch"]) for r in rows}, key=order):
        depth = max(replaced(r) for r in rows if r["model"] == model)
        of = {m: [r for r in rows if measured(r) == (model, precision, batch, m)] for m in (mode, default, eager)}
        official = {m: next((r for r in of[m] if replaced(r) < 0), None) for m in of}
        theirs = official[mode] or official[default]
        if not theirs or not ("graph" in mode or int(batch) > BOUND_BY_CPU):
            continue
        own_eager = official[eager]
        than = [theirs] if mode == eager or not own_eager else [theirs, own_eager]
        short = model.split("_")[1][0].upper()
        for name, unrolled in ((short, False), (f"{short}, unrolled", True)):
            held = {replaced(r): r for r in of[mode] if unrolled == (UNROLLED in r["variant"]) and replaced(r) >= 0}
            ours = [held.get(round(share * depth)) for share in SHARES.values()]
            peaks = [row["peak MiB"] and f"{float(row['peak MiB']):.0f}" for row in (theirs, ours[0], ours[-1]) if row]
            if held or (of[mode] and not unrolled):
                lines.append([name, PRECISIONS[precision], batch, f"{float(theirs['ms']):.2f}"]
                             + [cell(row, than) for row in ours] + [", ".join(peaks).strip(", ")])  # fmt: skip
    return lines


def measured(row: Row) -> tuple[str, ...] | None:
    """What the row is of, if its outputs were right and it is one of the variants that are summed up here."""
    known = re.fullmatch(rf"official|ours k=\d+(, baked)?({UNROLLED})?", row["variant"]) and row["ms"] not in ("", "nan")
    return (row["model"], row["precision"], row["batch"], row["mode"]) if known else None


def replaced(row: Row) -> int:
    """How many sites are; -1 in the official model."""
    k = re.search(r"k=(\d+)", row["variant"])
    return int(k[1]) if k else -1


def order(of: tuple[str, str, str]) -> tuple[int, int, int]:
    model, precision, batch = of
    return -int(batch), list(PRECISIONS).index(precision), -ord(model.split("_")[1][0])  # tiny, small, base


def cell(row: Row | None, than: list[Row]) -> str:
    if row is None:
        return ""
    factors = (f"{float(other['ms']) / float(row['ms']):.2f}x" for other in than)
    return f"{float(row['ms']):.2f} ({', '.join(factors)})"


if __name__ == "__main__":
    main()
