"""Trains small models that cannot do without their scans: three blocks, no depthwise convolution, 4x4 patches.

And one with MambaVision's mixers, convolutions and attention, which can.

    python examples/paper/train_scan_dependent.py --device cuda

The last lines tell what is left where all scans are deleted.
"""

import copy

import torch
from common import TASKS, arrays, digits_images, evaluate, fashion_images
from training import arguments, finish, fit, shifted, shuffled, start_with_scans
from vim import Direction

from vmeanba_fx.models.ss2d import SS2D

STEPS = {"digits": 3000, "fashion": 4000}
BATCH = {"digits": 128, "fashion": 256}
LR, SHIFT = 4e-3, 3
NAMES = [f"scan_{kind}_{data}" for data in ("digits", "fashion") for kind in ("v05", "v0")]
NAMES += ["scan_live_digits", "scan_vim_digits", "scan_mambavision_digits", "mambavision_fashion"]


def main() -> None:
    p = arguments(__doc__)
    p.add_argument("--only", choices=NAMES, nargs="+", default=NAMES)
    args = p.parse_args()
    for name in args.only:
        model = train(name, args)
        without = delete_scans(model)
        task = TASKS[name]
        left = evaluate(without, *task.load(args.data, False, 64 if args.quick else task.test_images, 0, args.device))
        print(f"{name}: without its scans {left:.2f} %", flush=True)


def train(name: str, args) -> torch.nn.Module:
    data = name.split("_")[-1]
    torch.manual_seed(args.seed)
    model = start_with_scans(TASKS[name].build()).to(args.device)
    images, labels = (t.to(args.device) for t in arrays(args.data, data, True))
    images = digits_images(images)[:, 0] if data == "digits" else images
    size = 8 if args.quick else BATCH[data]
    indices = shuffled(len(labels), size, args.seed)

    def batch(step: int):
        chosen = indices(step).to(args.device)
        generator = torch.Generator().manual_seed(10_000_000 * (args.seed + 1) + step)
        if data == "fashion":
            return fashion_images(shifted(images[chosen], 2, True, generator), 32), labels[chosen]
        # What is shifted in is the paper's white, which is the smallest value after normalisation.
        x = images[chosen] - images.min()
        return (shifted(x, SHIFT, False, generator) + images.min())[:, None], labels[chosen]

    steps = args.steps or (2 if args.quick else STEPS[data])
    finish(name, model, fit(model, batch, steps=steps, lr=LR, seconds=args.seconds, graph=args.graph), args)
    return model


def delete_scans(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in which nothing but the skip `D * u` is left of every scan: its C is zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SS2D):
                module.x_proj.weight.unflatten(0, (4, -1))[:, -module.d_state :] = 0.0
            elif isinstance(module, Direction):
                module.x_proj.weight[-module.state :] = 0.0
    return model


if __name__ == "__main__":
    main()
