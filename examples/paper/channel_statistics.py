"""Figure 3: how the outputs of the scans spread over the channels, for every site of every task.

    python examples/paper/channel_statistics.py --device cuda

For each site, over calibration images: the coefficient of variation over the channels; the share of the scan's energy that
the channel mean explains, that the paper's one-channel scan explains, and that the best r directions in channel space
explain (principal components of each scan direction: a bound for every way of scanning r channels).
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import torch
from common import TASKS, Task, pick
from results import drawn, parser, read_csv, write_csv, write_markdown
from torch import Tensor, fx
from vmeanba_fx.passes.mean_scan import mean_scan_tensors

import vmeanba_fx
from vmeanba_fx.graph import SITE, aten, scan_arguments, scan_nodes

RANKS = (1, 4, 16)


class Scans(fx.Interpreter):
    """Runs a captured graph and calls `see(node, arguments, y)` at every scan; y (B, K*D, L)."""

    def __init__(self, gm: fx.GraphModule, see) -> None:
        super().__init__(gm)
        self.see = see
        self.scans = {node for owner, node in scan_nodes(gm) if owner is gm}
        self.skips = {u: n for n in self.scans for u in n.users if u.target is aten.add.Tensor}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.scans:
            arguments = {k: self.env[v] if isinstance(v, fx.Node) else v for k, v in scan_arguments(n).items()}
            self.see(n.meta[SITE], arguments, result)
        if n in self.skips:
            self.see(self.skips[n].meta[SITE], None, result)
        return result


class Statistics:
    """Streamed sums of one site."""

    def __init__(self) -> None:
        self.energy = self.mean = self.paper = 0.0
        self.variation: list[Tensor] = []
        self.with_skip: list[Tensor] = []
        self.between: list[Tensor] = []
        self.gram: Tensor | None = None

    def scan(self, arguments: dict, y: Tensor) -> None:
        groups = arguments["B"].shape[1]
        y = y.double().unflatten(1, (groups, -1))  # (B, K, D, L)
        self.energy += float(y.square().sum())
        self.mean += float(y.mean(2).square().sum()) * y.shape[2]
        copy = mean_scan_tensors("direction", **arguments).double().unflatten(1, (groups, -1))
        self.paper += float((y - copy).square().sum())
        self.variation.append(spread(y))
        rows = y.permute(1, 0, 3, 2).flatten(1, 2)  # (K, B*L, D)
        gram = rows.transpose(1, 2) @ rows
        self.gram = gram if self.gram is None else self.gram + gram

    def skipped(self, y: Tensor, groups: int) -> None:
        y = y.double().unflatten(1, (groups, -1))
        self.with_skip.append(spread(y))
        # Is the distribution over the channels the same for every image? Distance between sorted values of two images.
        ordered = y.sort(2).values
        distance = (ordered[1:] - ordered[:-1]).abs().mean(2)
        self.between.append((distance / y.std(2)[1:].clamp_min(1e-12)).flatten())

    def row(self) -> dict[str, Any]:
        values = torch.linalg.eigvalsh(self.gram).flip(-1).clamp_min(0)
        out = {
            "CV, scan": _median(self.variation), "CV, scan + D u": _median(self.with_skip),
            "image to image": _median(self.between),
            "mean, %": 100 * self.mean / self.energy, "paper's scan, %": 100 * (1 - self.paper / self.energy),
        }  # fmt: skip
        for rank in RANKS:
            out[f"best {rank}, %"] = 100 * float(values[:, :rank].sum() / values.sum())
        return out


def spread(y: Tensor) -> Tensor:
    """Coefficient of variation over the channels, at every image, direction and position."""
    return (y.std(2) / y.mean(2).abs().clamp_min(1e-12)).flatten()


def _median(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).median()) if parts else float("nan")


def measure(task: Task, args) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The rows of a task's sites, and for the figure: y + D u (3, D, L) of each site, first direction, three images."""
    images, labels = task.load(args.data, True, 8 if args.quick else 256, 0, args.device)
    graph = vmeanba_fx.capture(task.model(args.device), (images[:4],))
    plan = vmeanba_fx.calibrate(graph, [(images[:4], labels[:4])], score_sites=False)
    sites = {s.name: s for s in plan.sites}
    found = {name: Statistics() for name in sites}
    figure: dict[str, Tensor] = {}

    def see(name: str, arguments: dict | None, y: Tensor) -> None:
        if arguments is not None:
            found[name].scan(arguments, y)
            return
        found[name].skipped(y, sites[name].groups)
        figure.setdefault(name, y[:3, : sites[name].channels].float().cpu())

    interpreter = Scans(graph, see)
    with torch.inference_mode():
        for part in images.split(64):
            interpreter.run(part)
    rows = [
        {"task": task.name, "site": s.name, "D": s.channels, "N": s.state, "L": s.length, **found[s.name].row()}
        for s in plan.sites
    ]
    return rows, figure


def plot(plt, figures: dict[str, Tensor], path: Path) -> None:
    """Per task the site in the middle: bands over the channels along the sequence, and the histogram at the last position."""
    rows = -(-len(figures) // 2)
    fig, axes = plt.subplots(rows, 4, figsize=(16, 2.7 * rows), squeeze=False, width_ratios=(3, 1, 3, 1), layout="constrained")
    for ax in axes.flat[2 * len(figures) :]:
        ax.axis("off")
    for (title, y), (left, right) in zip(figures.items(), axes.reshape(-1, 2)[: len(figures)], strict=True):
        for i, (image, colour) in enumerate(zip(y, ("tab:blue", "tab:orange", "tab:green"), strict=False)):
            low, middle, high = image.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=0).numpy()
            left.fill_between(range(len(middle)), low, high, color=colour, alpha=0.25, lw=0)
            left.plot(middle, color=colour, lw=1, label=f"image {i + 1}")
            right.hist(image[:, -1].tolist(), bins=30, color=colour, alpha=0.5)
        left.set_title(textwrap.fill(title, 60), fontsize=10)
        left.set(xlabel="position l in the first scan direction", ylabel="y over the channels")
        right.set_title(f"at l = {y.shape[-1] - 1}", fontsize=10)
        right.set(xlabel="y", ylabel="channels")
    axes[0, 0].legend(fontsize=7, loc="upper left")
    fig.suptitle("y = scan + D u of three images: median and 10 to 90 % of the channels")
    fig.savefig(path, dpi=90)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    p.add_argument("--plot-only", action="store_true", help="draw and tabulate an earlier run's files")
    args = p.parse_args()
    values = args.out / "channel_statistics.csv"
    if not args.plot_only:
        rows, kept = [], {}
        for task in pick(args.tasks):
            found, figure = measure(task, args)
            rows += found
            name = list(figure)[len(figure) // 2] if figure else None
            if name:
                kept[f"{task.title}: {name}"] = figure[name]
            write_csv(values, rows)
            torch.save(kept, args.out / "channel_statistics.pt")
    rows, origin = read_csv(values)
    head = list(rows[0])
    text = [[f"{float(v):.2f}" if key not in ("task", "site", "D", "N", "L") else v for key, v in r.items()] for r in rows]
    note = (
        "CV: standard deviation over the channels over the absolute mean over the channels, median over images, "
        "directions and positions; far below 1 is what the method's premise asks for. Image to image: mean distance between "
        "the sorted channel values of two images at the same position, in standard deviations over the channels. Shares are "
        "of the energy of the scan without D u; negative: worse than nothing."
    )
    write_markdown(args.out / "channel_statistics.md", "Channel statistics (Figure 3)", head, text, [note, origin])
    kept = args.out / "channel_statistics.pt"
    if kept.is_file():
        drawn(plot, torch.load(kept, weights_only=True), args.out / "channel_statistics.png")


if __name__ == "__main__":
    main()
