"""FLOPs of VMamba-T, -S and -B before and after, counted by torch's flop counter with the formulas of `vmeanba_fx.ops.flops`.

    python examples/paper/flops_table.py

Nothing is computed: the graphs run on fake tensors.
"""

from typing import Any

import torch
from results import parser, provenance, write_csv, write_markdown
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import vmeanba_fx
from vmeanba_fx import models

SCANS = ("selective_scan", "linear_scan", "shared_scan", "shared_scan2d", "ss2d")
LITERAL = ["drop_annihilated", "merge_skips", "fuse_ss2d", "channels_last", "cleanup"]
NAMES = ("vmamba_tiny_s1l8", "vmamba_small_s1l20", "vmamba_base_s1l20", "vanilla_vmamba_tiny")


def count(model: torch.nn.Module, images: torch.Tensor) -> tuple[float, float]:
    """(all, scans) in GFLOPs per image."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, FlopCounterMode(display=False) as counter, torch.no_grad():
        model(mode.from_tensor(images))
    counts = counter.get_flop_counts()["Global"]
    scans = sum(n for op, n in counts.items() if str(op).split(".")[-1] in SCANS)
    return counter.get_total_flops() / len(images) / 1e9, scans / len(images) / 1e9


def planned(name: str, size: int, device: str) -> tuple[torch.nn.Module, torch.Tensor, vmeanba_fx.Plan]:
    torch.manual_seed(0)
    images = torch.randn(2, 3, size, size, device=device)
    model = getattr(models, name)().eval().to(device)
    return model, images, vmeanba_fx.calibrate(model, [images], score_sites=False)


def rows_of(name: str, model: torch.nn.Module, images: torch.Tensor, plan: vmeanba_fx.Plan) -> list[dict]:
    n = len(plan.sites)
    # The paper's own formulas, over all sites: 9 B L D N + B L D before, B L D N + 10 B L N + B L D after.
    before = sum(s.flops() for s in plan.sites)
    width = [(s.groups * s.length * s.state, s.channels, s.groups * s.length * s.channels) for s in plan.sites]
    after = sum(positions * (channels + 10) + skip for positions, channels, skip in width)
    core = 1 - sum(p * (c + 10) for p, c, _ in width) / sum(9 * p * c for p, c, _ in width)
    rows: list[dict[str, Any]] = [
        {"model": name, "variant": "original", "GFLOPs": None, "scan GFLOPs": None, "counted by": "flop counter"},
        {"model": name, "variant": "paper's block at all sites", "counted by": "flop counter"},
        {"model": name, "variant": "all sites, exact passes", "counted by": "flop counter"},
        {"model": name, "variant": "original", "scan GFLOPs": before / 1e9, "counted by": "paper's formula"},
        {"model": name, "variant": "paper's block at all sites", "scan GFLOPs": after / 1e9, "counted by": "paper's formula",
         "scan change, without the skip": f"{-100 * core:.1f} %"},
    ]  # fmt: skip
    forms = [model, plan.apply(n, skip_passes=LITERAL), plan.apply(n)]
    for row, form in zip(rows, forms, strict=False):
        row["GFLOPs"], row["scan GFLOPs"] = count(form, images)
    keys = ("model", "counted by", "variant", "GFLOPs", "change", "scan GFLOPs", "scan change",
            "scan change, without the skip")  # fmt: skip
    out = []
    for row in rows:
        first = next(r for r in rows if r["counted by"] == row["counted by"])
        if row is not first:
            row["scan change"] = _change(row["scan GFLOPs"], first["scan GFLOPs"])
            if row.get("GFLOPs"):
                row["change"] = _change(row["GFLOPs"], first["GFLOPs"])
        out.append({key: row.get(key, "") for key in keys})
    return out


def _change(new: float, old: float) -> str:
    return f"{100 * (new / old - 1):+.1f} %"


def stages(name: str, plan: vmeanba_fx.Plan) -> str:
    """The claim "89 % fewer FLOPs" for each width: 1 - (10 + D) / (9 D)."""
    widths = sorted({s.channels for s in plan.sites})
    return f"{name} " + ", ".join(f"D={D}: {100 * (1 - (10 + D) / (9 * D)):.1f} %" for D in widths)


def main() -> None:
    args = parser(__doc__).parse_args()
    names, size = (NAMES[:1], 64) if args.quick else (NAMES, 224)
    rows, ratios = [], []
    for name in names:
        model, images, plan = planned(name, size, args.device)
        rows += rows_of(name, model, images, plan)
        ratios.append(stages(name, plan))
    write_csv(args.out / "flops.csv", rows)
    text = [[f"{v:.3f}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    note = (
        "Per image. A multiply-add of a matrix product counts as 2, a scan as the paper counts it; what is neither "
        "(norms, activations, and of the paper's block the discretisation and the mean) counts as 0, "
        "so the paper's block looks cheaper by the flop counter than by the paper's formula."
    )
    ratio = "Reduction per site by the paper's ratio (10 + D) / (9 D), whose limit is 8/9 = 88.9 %: " + "; ".join(ratios)
    write_markdown(args.out / "flops.md", f"FLOPs at {size} px", list(rows[0]), text, [note, ratio, provenance()])
    print((args.out / "flops.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
