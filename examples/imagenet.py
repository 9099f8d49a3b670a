"""VMamba on ImageNet-1k: score the scans, replace k of them, measure top-1 on the validation images.

    python examples/imagenet.py /data/imagenet --model vmamba_tiny_s1l8 --weights vssm1_tiny_0230s_ckpt_epoch_264.pth \\
        --device cuda -k 0 4 7 14 --rank 4 --refit all

Without --rank and --refit, the method as published.

The data folder has `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`; classes are numbered in the order of their names. Images are
prepared as usual: shorter side to 256 (bicubic), the central 224x224, ImageNet's mean and deviation. Needs Pillow.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

import vmeanba_fx
from vmeanba_fx import models
from vmeanba_fx.cli.arguments import at_least, resolve_device
from vmeanba_fx.files import unwritable

try:
    from PIL import Image
except ImportError:
    sys.exit("this example reads images with Pillow: pip install pillow")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = {".jpeg", ".jpg", ".png", ".bmp", ".webp"}


class ImageFolder(Dataset):
    """`folder/CLASS/image` -> (image (3, size, size), class number). `limit` keeps a random choice that `seed` fixes."""

    def __init__(self, folder: Path, size: int = 224, *, limit: int | None = None, seed: int | None = None):
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}")
        self.classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
        number = {name: i for i, name in enumerate(self.classes)}
        files = sorted(p for p in folder.glob("*/*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise FileNotFoundError(f"{folder} has no images; expected {folder}/CLASS/*.JPEG")
        if seed is not None:
            random.Random(seed).shuffle(files)
        self.items = [(path, number[path.parent.name]) for path in files[:limit]]
        self.size = size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.items[index]
        return normalised(central(Image.open(path).convert("RGB"), self.size)), label


def central(image: Image.Image, size: int) -> Image.Image:
    """The central square after the shorter side was resized to size * 256 / 224."""
    image = shorter_side(image, round(size * 256 / 224), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def shorter_side(image: Image.Image, length: int, resampling: Image.Resampling) -> Image.Image:
    """`image` with its shorter side at `length`, aspect ratio kept."""
    scale = length / min(image.size)
    return image.resize((max(round(image.width * scale), length), max(round(image.height * scale), length)), resampling)


def normalised(image: Image.Image) -> torch.Tensor:
    """(3, H, W) float, less ImageNet's mean and over its deviation."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255.0
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def arguments(doc: str) -> argparse.ArgumentParser:
    """The options that this example and ade20k.py have."""
    p = argparse.ArgumentParser(description=doc.splitlines()[0])
    p.add_argument("data", type=Path, help="folder of the data set")
    p.add_argument("--model", default="vmamba_tiny_s1l8", help="name in vmeanba_fx.models (default: vmamba_tiny_s1l8)")
    p.add_argument("--weights", type=Path, required=True, help="official checkpoint")
    p.add_argument("-k", type=at_least(0), nargs="+", help="numbers of sites to replace (default: 0, a quarter, half, all)")
    p.add_argument("--rank", type=at_least(1), metavar="R", help="scan R fitted channels in each direction instead of the mean")
    p.add_argument("--refit", choices=("sites", "all"), help="refit the layer behind each replaced scan, or later ones as well")
    p.add_argument("--calibration-images", type=at_least(1), default=1000, metavar="N")
    p.add_argument("--test-images", type=at_least(1), metavar="N", help="a random choice of them (default: all)")
    p.add_argument("--batch", type=at_least(1), default=64)
    p.add_argument("--workers", type=at_least(0), default=4)
    p.add_argument("--device", type=resolve_device, default="auto", help="default: a GPU if there is one")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--plan", type=Path, help="file for the plan")
    return p


def calibrated(model: torch.nn.Module, calibration: Dataset, args: argparse.Namespace) -> vmeanba_fx.Plan:
    """The plan, printed and, if wished, saved."""
    if args.plan and (reason := unwritable(args.plan)):
        raise OSError(reason)
    loader = DataLoader(calibration, args.batch, num_workers=args.workers)
    options = {"reduce": "rank", "rank": args.rank} if args.rank else {}

    def check(unscored: vmeanba_fx.Plan) -> None:
        for k in args.k or ():
            unscored.check_choice(k)

    plan = vmeanba_fx.calibrate(model, loader, metric="loss", seed=args.seed, before_scoring=check, **options)
    print(plan, end="\n\n")
    if args.plan:
        plan.save(args.plan)
    return plan


def curve(plan: vmeanba_fx.Plan, model: torch.nn.Module, measure, what: str, args: argparse.Namespace) -> str:
    """A table of `measure(model)` over k."""
    n = len(plan.sites)
    base = measure(model)
    rows = [["original", f"{base:.2f}", ""]]
    for k in args.k if args.k is not None else sorted({0, n // 4, n // 2, n}):
        found = measure(plan.apply(k, refit=args.refit or False))
        rows.append([f"k = {k}", f"{found:.2f}", f"{found - base:+.2f}"])
    return tabulate(rows, ["sites replaced", f"{what}, %", "change"], disable_numparse=True)


@torch.inference_mode()
def top1(model: torch.nn.Module, loader: DataLoader, device: torch.device) -> float:
    right = total = 0
    for images, labels in tqdm(loader, desc="measuring", leave=False, disable=None):
        right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
        total += len(labels)
    return 100 * right / total


def main() -> None:
    p = arguments(__doc__)
    p.add_argument("--size", type=at_least(1), default=224)
    args = p.parse_args()
    factory = getattr(models, args.model, None)
    if factory is None:
        p.error(f"--model: vmeanba_fx.models has no {args.model}")
    test = ImageFolder(args.data / "val", args.size, limit=args.test_images, seed=None if args.test_images is None else 0)
    calibration = ImageFolder(args.data / "train", args.size, limit=args.calibration_images, seed=args.seed)
    if calibration.classes != test.classes:
        p.error(f"{args.data}: train and val have different classes")
    model = models.load_checkpoint(factory(in_chans=3, num_classes=len(test.classes)), args.weights).eval().to(args.device)
    plan = calibrated(model, calibration, args)
    loader = DataLoader(test, args.batch, num_workers=args.workers)
    print(curve(plan, model, lambda m: top1(m, loader, args.device), "top-1", args))
    print(f"{len(test)} validation images; calibrated on {len(calibration)} training images")


if __name__ == "__main__":
    try:
        main()
    except (vmeanba_fx.VMeanbaError, OSError) as error:
        sys.exit(f"imagenet.py: {error}")
