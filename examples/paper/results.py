"""Arguments of the scripts of this folder, and their files: csv with its origin, tables, plots."""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
FASHION = "/usr/share/datasets/fashion-mnist"


class Parser(argparse.ArgumentParser):
    """Refuses ``--quick`` where a few images would take the place of what was measured."""

    def parse_args(self, *given: Any, **more: Any) -> argparse.Namespace:  # type: ignore[override]  # overloaded there
        args = super().parse_args(*given, **more)
        for name, value in vars(args).items():
            if args.quick and isinstance(value, Path) and value == self.get_default(name):
                self.error(f"--quick needs --{name} FOLDER as well: what was measured lies in the default folder")
        return args


def parser(doc: str) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    p = Parser(description=doc.splitlines()[0])
    p.add_argument("--data", default=FASHION, help="folder of Fashion-MNIST's idx files, or an .npz file (see common.py)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default: docs/results)")
    p.add_argument("--quick", action="store_true", help="a few images only, to see that everything runs")
    return p


def provenance() -> str:
    """Command, machine and date, for the foot of a result."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    command = shlex.join(["python", f"examples/paper/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return f"`{command}`; {device}, torch {torch.__version__}, {datetime.date.today().isoformat()}"


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows with the same keys. `path` gets a line at its head that says where the numbers come from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {provenance()}\n")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> tuple[list[dict[str, str]], str]:
    """The rows of `write_csv`, and its line of origin."""
    with path.open(encoding="utf-8", newline="") as file:
        origin = file.readline().removeprefix("#").strip()
        return list(csv.DictReader(file)), origin


def read_by_task(folder: Path, names: Iterable[str]) -> dict[str, tuple[list[dict[str, str]], list[str]]]:
    """Of all csv files of a folder the rows of each task, in the order of `names`, and one line per file on its origin."""
    found: dict[str, tuple[list[dict[str, str]], list[str]]] = {}
    for path in sorted(folder.glob("*.csv")):
        rows, origin = read_csv(path)
        mine, origins = found.setdefault(rows[0]["task"], ([], []))
        mine += rows
        origins.append(f"* {path.name}: {origin}")
    return {name: found[name] for name in names if name in found}


def cell(values: Sequence[float] | None) -> str:
    """Mean and standard deviation over the seeds; their number where it is two."""
    if not values:
        return ""
    mean = round(statistics.fmean(values), 2) + 0.0  # no minus zero
    few = " (2)" if len(values) == 2 else ""
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}{few}" if len(values) > 1 else f"{mean:.2f}"


def markdown(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]], notes: Sequence[str] = ()) -> str:
    table = tabulate(rows, head, tablefmt="github", disable_numparse=True)
    return "\n\n".join([f"# {title}", table, *notes]) + "\n"


def write_markdown(path: Path, title: str, head: Sequence[str], rows: Iterable[Sequence[Any]], notes: Sequence[str]) -> None:
    write_tables(path, [(title, head, rows, notes)])


def write_tables(path: Path, tables: Iterable[tuple], notes: Sequence[str] = ()) -> None:
    """Several tables, each with the arguments of `markdown`, in one file; `notes` follow the last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [*(markdown(*table) for table in tables), *(["\n".join(notes) + "\n"] if notes else [])]
    path.write_text("\n".join(text), encoding="utf-8")


def drawn(draw: Callable[..., None], *args: Any) -> None:
    """`draw(pyplot, *args)`, without a screen; where matplotlib is not installed, a hint."""
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib here: draw with --plot-only where it is installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    draw(pyplot, *args)
    pyplot.close("all")


def panels(plt: Any, count: int, below: float) -> tuple[Any, list[Any]]:
    """A figure with `count` axes, in rows of two or three, and room of so many inches for a legend below."""
    width = count if count < 4 else 2 if count == 4 else 3
    rows = -(-count // width)
    fig, axes = plt.subplots(rows, width, figsize=(5.0 * width, 4.2 * rows + below), squeeze=False, layout="constrained")
    for ax in axes.flat[count:]:
        ax.axis("off")
    return fig, list(axes.flat[:count])


def legend_below(figure: Any, columns: int) -> None:
    """One legend for all axes of `panels`; a label that several have is shown once."""
    found = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def show_points_lost(ax: Any, most: float) -> None:
    """An axis of points lost, fewer at the top, on which hundredths and tens can both be read."""
    ax.set_yscale("symlog", linthresh=1.0)
    ticks = [t for t in (0, 0.25, 0.5, 1, 2, 5, 10, 20, 50) if t <= 1.5 * most or t <= 1]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.set(ylabel="points lost")
    ax.invert_yaxis()
    ax.grid(alpha=0.3)
