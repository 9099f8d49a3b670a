"""The quickstart on two larger models, trained on Fashion-MNIST at 96x96 pixels.

    python examples/fashion_mnist.py /usr/share/datasets/fashion-mnist --model v05 --weights vmamba_v05_fashion96.pt

The data folder holds the four idx files, plain or gzipped (Debian and Ubuntu: apt-get install dataset-fashion-mnist).
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from quickstart import curve, every_k, export_and_check

import vmeanba_fx
from vmeanba_fx.cli.arguments import at_least, resolve_device
from vmeanba_fx.data import FashionMNIST, make_loader
from vmeanba_fx.files import unwritable
from vmeanba_fx.models import CheckpointError, load_checkpoint, vmamba_fashion_v0, vmamba_fashion_v05

MODELS = {"v05": vmamba_fashion_v05, "v0": vmamba_fashion_v0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with the idx files")
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint of the model")
    parser.add_argument("--model", choices=sorted(MODELS), default="v05", help="which VMamba (default: v05)")
    parser.add_argument("--metric", choices=["accuracy", "loss", "kl"], default="loss", help="default: loss")
    parser.add_argument("--mean", choices=["direction", "all", "input"], default="direction", help="which mean")
    parser.add_argument("--rank", type=at_least(1), help="scan so many fitted channels per direction instead of a mean")
    parser.add_argument("--refit", choices=["sites", "all"], help="refit the layer behind each site, or all later ones too")
    parser.add_argument("--calibration-images", type=at_least(1), default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--test-images", type=at_least(1), default=2000, metavar="N", help="default: 2000")
    parser.add_argument("--device", type=resolve_device, default="cpu")
    parser.add_argument("--k", type=int, help="sites to replace in the exported model (default: half)")
    parser.add_argument("--out", type=Path, help="where to keep the exported model (default: a temporary folder)")
    args = parser.parse_args()
    if args.out and (reason := unwritable(args.out)):
        raise OSError(reason)

    model = MODELS[args.model]()
    try:
        load_checkpoint(model, args.weights)
        train = loader(args.data, True, args.calibration_images, args.device)
        test = loader(args.data, False, args.test_images, args.device)
    except (ValueError, CheckpointError) as error:
        sys.exit(f"fashion_mnist.py: {error}")
    model.eval().to(args.device)

    how = {"mean": args.mean} if args.rank is None else {"reduce": "rank", "rank": args.rank}
    refit = args.refit or False

    def check(unscored: vmeanba_fx.Plan) -> None:
        if args.k is not None:
            unscored.check_choice(args.k)

    plan = vmeanba_fx.calibrate(model, train, metric=args.metric, before_scoring=check, **how)
    print(plan, end="\n\n")
    rewritten = every_k(plan, refit=refit)
    print(curve(rewritten, plan, model, test), end="\n\n")

    gm = rewritten[args.k if args.k is not None else len(plan.sites) // 2]
    print(vmeanba_fx.report(gm), end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        path = args.out or Path(folder) / f"vmamba_{args.model}_fashion.pt2"
        print(export_and_check(gm, next(iter(test))[0], path))


def loader(folder: Path, train: bool, limit: int, device: torch.device) -> torch.utils.data.DataLoader:
    """The first ``limit`` images as batches on ``device``."""
    data = FashionMNIST(folder, train, limit=limit)
    return make_loader(data.prepare(data.images).to(device), data.labels.long().to(device))


if __name__ == "__main__":
    try:
        main()
    except (vmeanba_fx.VMeanbaError, OSError) as error:
        sys.exit(f"fashion_mnist.py: {error}")
