"""Long-range dependence: the effective receptive field before and after replacing all scans.

    python examples/paper/receptive_field.py --device cuda

Squared gradient of the feature vector in the middle of a stage's map (random directions in channel space) with respect to
the image, averaged over test images: how far does the middle see?
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from common import SHORT, TASKS, VARIANTS, batches, dispensable, pick
from results import drawn, parser, read_csv, write_csv, write_markdown
from torch import Tensor, nn

import vmeanba_fx
from vmeanba_fx.models.vmamba import VSSM

# Task -> after which stages.
STAGES = {
    "scan_v05_digits": 1, "scan_v0_digits": 1, "scan_vim_digits": 1, "scan_mambavision_digits": 1, "v05": 2, "v0": 2, "deep": 3,
}  # fmt: skip
CHOSEN = ("mean", "rank1", "rank4", "rank4_refit", "rank8_refit")
SHOWN = ("original", "mean", "rank1", "rank4", "rank4_refit")
DIRECTIONS = 4


class Stages(nn.Module):
    """The first stages of a VMamba classifier, or all of one without stages: images -> map (B, C, H, W)."""

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.model: Any = model  # what is no VSSM has tokens
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.model, VSSM):
            tokens = self.model.tokens(x)
            return tokens.transpose(1, 2).unflatten(2, (math.isqrt(tokens.shape[1]), -1))
        x = self.model.embed(x)
        *before, last = self.model.layers[: self.count]
        for layer in before:
            x = layer(x)
        x = last.get_submodule("blocks")(x)
        return x if self.model.channel_first else x.permute(0, 3, 1, 2)


def field(model: nn.Module, images: Tensor) -> Tensor:
    """(H, W): energy of the gradient, summing to 1."""
    total = torch.zeros(images.shape[2:], dtype=torch.float64, device=images.device)
    generator = torch.Generator().manual_seed(0)
    for part in images.split(50):
        for _ in range(DIRECTIONS):
            x = part.clone().requires_grad_()
            features = model(x)
            _, channels, height, width = features.shape
            direction = torch.randn(channels, generator=generator).to(features)
            (grad,) = torch.autograd.grad((features[:, :, height // 2, width // 2] @ direction).sum(), x)
            total += grad.double().square().sum((0, 1))
    return total / total.sum()


def summary(energy: Tensor, cell: tuple[int, int]) -> dict[str, Any]:
    """Share of the energy outside the middle patch (and outside a quarter of the image around it), radius of 90 %.

    cell: pixels per position of the map, height and width.
    """
    height, width = energy.shape
    middle = [(n // c // 2 + 0.5) * c - 0.5 for n, c in zip((height, width), cell, strict=True)]
    rows, columns = (torch.arange(n, device=energy.device) - m for n, m in zip((height, width), middle, strict=True))
    distance = (rows[:, None].square() + columns[None].square()).sqrt().flatten()
    inside = (rows.abs()[:, None] <= cell[0] / 2) & (columns.abs()[None] <= cell[1] / 2)
    order = distance.argsort()
    reached = energy.flatten()[order].cumsum(0)
    radius = float(distance[order][int((reached < 0.9).sum().clamp_max(len(order) - 1))])
    return {
        "outside the patch, %": round(100 * float(energy[~inside].sum()), 2),
        "farther than a quarter, %": round(100 * float(energy.flatten()[distance > width / 4].sum()), 2),
        "radius of 90 %, px": round(radius, 1),
    }


def rows_of(name: str, args) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    task = TASKS[name]
    model = Stages(task.model(args.device), STAGES[name]).eval()
    calibration = [x for x, _ in batches(*task.load(args.data, True, 8 if args.quick else 1000, 0, args.device))]
    images, _ = task.load(args.data, False, 4 if args.quick else 200, 0, args.device)
    with torch.no_grad():
        height, width = model(images[:1]).shape[2:]
    cell = (images.shape[2] // height, images.shape[3] // width)
    graph = vmeanba_fx.capture(model, (calibration[0][:2],))
    forms: list[tuple[str, nn.Module]] = [("original", model)]
    for variant in (VARIANTS[v] for v in CHOSEN):
        plan = vmeanba_fx.calibrate(graph, calibration, metric="kl", score_sites=False, **variant.calibrate)
        forms.append((variant.name, plan.apply(sites="*", skip_passes=dispensable(plan), **variant.apply)))
    fields = {label: field(form, images).cpu() for label, form in forms}
    rows = [
        {"task": name, "stage": STAGES[name], "variant": label} | summary(energy, cell) for label, energy in fields.items()
    ]
    print(*rows, sep="\n", flush=True)
    return rows, fields


def plot(plt, kept: dict[str, dict[str, Tensor]], path: Path) -> None:
    size = (2.3 * len(SHOWN) + 0.8, 2.4 * len(kept) + 0.4)
    fig, axes = plt.subplots(len(kept), len(SHOWN), figsize=size, squeeze=False, layout="constrained")
    for (name, fields), line in zip(kept.items(), axes, strict=True):
        top = float(fields["original"].max())
        for label, ax in zip(SHOWN, line, strict=True):
            drawn = ax.imshow((fields[label] / top).clamp_min(1e-6).log10().numpy(), vmin=-5, vmax=0)
            ax.set_title(SHORT.get(label, label), fontsize=9)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(f"{TASKS[name].name}, stage {STAGES[name]}", fontsize=9)
    fig.colorbar(drawn, ax=axes, label="gradient energy, log10", shrink=0.6)
    fig.savefig(path, dpi=75)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--tasks", nargs="+", choices=list(STAGES), default=list(STAGES))
    p.add_argument("--plot-only", action="store_true", help="draw and tabulate an earlier run's files")
    args = p.parse_args()
    values, maps = args.out / "receptive_field.csv", args.out / "receptive_field.pt"
    if not args.plot_only:
        rows, kept = [], {}
        for task in pick(args.tasks):
            found, kept[task.name] = rows_of(task.name, args)
            rows += found
            write_csv(values, rows)
            torch.save(kept, maps)
    rows, origin = read_csv(values)
    note = (
        "Share of the squared gradient that comes from outside the middle position's own patch, from farther than a quarter of "
        "the image, and the radius that holds 90 % of it. All sites of these stages replaced."
    )
    text = [list(r.values()) for r in rows]
    write_markdown(args.out / "receptive_field.md", "Effective receptive field", list(rows[0]), text, [note, origin])
    if maps.is_file():
        drawn(plot, torch.load(maps, weights_only=True), args.out / "receptive_field.png")


if __name__ == "__main__":
    main()
