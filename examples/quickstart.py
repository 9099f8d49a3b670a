"""A trained VMamba, scored, rewritten, measured and exported. Needs no GPU and takes about a minute on two cores.

    python examples/quickstart.py
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.export import Dim
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import vmeanba_fx
from vmeanba_fx.data import accuracy, load_digits_images, make_loader
from vmeanba_fx.files import unwritable
from vmeanba_fx.models import vmamba_digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, help="sites to replace in the export (default: all)")
    parser.add_argument("--out", type=Path, help="where to keep the exported model (default: a temporary folder)")
    args = parser.parse_args()
    if args.out and (reason := unwritable(args.out)):
        raise OSError(reason)

    model = vmamba_digits(pretrained=True).eval()
    train = make_loader(*load_digits_images(train=True))
    test = make_loader(*load_digits_images(train=False))

    # Score every scan: how much accuracy is lost where only this one is replaced? The model itself is not changed.
    plan = vmeanba_fx.calibrate(model, train, metric="accuracy")
    if args.k is not None:
        plan.check_choice(args.k)
    print(plan, end="\n\n")

    # Apply the plan for every k, and measure on images that took no part in the scoring.
    print("VMeanba as published, the mean over the channels:\n")
    print(curve(every_k(plan), plan, model, test), end="\n\n")

    # This model needs its scans: four fitted channels per direction instead of one mean, and the layers behind refitted.
    # The curve below is of test images, so none is measured on held-out training images.
    plan = vmeanba_fx.calibrate(model, train, metric="loss", reduce="rank", rank=4, held_out=False)
    rewritten = every_k(plan, refit="all")
    print("Four fitted channels and refitted layers, without training either:\n")
    print(curve(rewritten, plan, model, test), end="\n\n")

    gm = rewritten[-1 if args.k is None else args.k]
    print(vmeanba_fx.report(gm), end="\n\n")

    with tempfile.TemporaryDirectory() as folder:
        path = args.out or Path(folder) / "vmamba_digits.pt2"
        print(export_and_check(gm, next(iter(test))[0], path))


def every_k(plan: vmeanba_fx.Plan, **options: Any) -> list[torch.fx.GraphModule]:
    """The model with 0, 1, ... and all of its sites replaced."""
    ks = range(len(plan.sites) + 1)
    return [plan.apply(k, **options) for k in tqdm(ks, desc="rewriting", leave=False, disable=None)]


def curve(
    rewritten: list[torch.fx.GraphModule], plan: vmeanba_fx.Plan, model: torch.nn.Module, test: DataLoader
) -> str:
    """A table over k: test accuracy, operations of all scans, and time per batch, each measured here."""
    images = next(iter(test))[0]
    base = accuracy(model, test)
    flops = sum(site.flops() for site in plan.sites)
    rows = [["original", f"{100 * base:.2f}", "", f"{flops / 1e6:.2f}", milliseconds(model, images)]]
    for k, gm in enumerate(tqdm(rewritten, desc="measuring", leave=False, disable=None)):
        found = accuracy(gm, test)
        flops = vmeanba_fx.report(gm).flops_after
        change = f"{100 * (found - base):+.2f}"
        rows.append([f"k = {k}", f"{100 * found:.2f}", change, f"{flops / 1e6:.2f}", milliseconds(gm, images)])
    head = ["sites replaced", "test accuracy, %", "change", "scan MFLOPs per image", f"ms per {len(images)} images"]
    samples = len(test.dataset)  # type: ignore[arg-type]  # torch says so of no Dataset
    return tabulate(rows, head, disable_numparse=True, colalign=("left", *["right"] * 4)) + (
        f"\n{samples} test images; time: median, {torch.get_num_threads()} threads, {images.device.type}"
    )


@torch.no_grad()
def milliseconds(model: torch.nn.Module, images: torch.Tensor) -> str:
    """Median time of one forward pass."""
    model(images)
    timer = Timer("model(images)", globals={"model": model, "images": images}, num_threads=torch.get_num_threads())
    return f"{1e3 * timer.blocked_autorange(min_run_time=0.2).median:.1f}"


@torch.no_grad()
def export_and_check(gm: torch.fx.GraphModule, images: torch.Tensor, path: Path) -> str:
    """Write ``gm`` with a dynamic batch, load it again, and see that both give the same numbers."""
    program = torch.export.export(gm, (images,), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    for batch in (images, images[:1], images[:5]):
        torch.testing.assert_close(loaded(batch), gm(batch), rtol=1e-5, atol=1e-5)
    size = f"{path.stat().st_size / 1e6:.2f} MB"
    return f"exported to {path.name}, {size}; loaded again: equal at batch {len(images)}, 1 and 5"


if __name__ == "__main__":
    try:
        main()
    except (vmeanba_fx.VMeanbaError, OSError, ImportError) as error:
        sys.exit(f"quickstart.py: {error}")
