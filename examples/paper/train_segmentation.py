"""Trains VMamba + UperNet on scenes composed of Fashion-MNIST images (96x96, ten classes and background).

    python examples/paper/train_segmentation.py --device cuda --graph

Twice: as it is, and without the depthwise convolutions of the blocks.
"""

import torch
from common import TASKS, arrays
from scenes import compose
from training import arguments, finish, fit, start_with_scans

STEPS, BATCH, LR = 12_000, 64, 1.5e-3
NAMES = ["segmentation", "segmentation_scans"]


def main() -> None:
    p = arguments(__doc__)
    p.add_argument("--only", choices=NAMES, nargs="+", default=NAMES)
    args = p.parse_args()
    images, labels = (t.to(args.device) for t in arrays(args.data, "fashion", True))
    size = 2 if args.quick else BATCH

    def batch(step: int):
        # Numbers below a million: those of the calibration and test scenes are larger.
        return (torch.arange(step * size, (step + 1) * size, device=args.device),)

    def draw(numbers: torch.Tensor):
        return compose(images, labels, numbers)

    for name in args.only:
        torch.manual_seed(args.seed)
        model = start_with_scans(TASKS[name].build()).to(args.device)
        steps = args.steps or (2 if args.quick else STEPS)
        curve = fit(model, batch, draw, steps=steps, lr=LR, seconds=args.seconds, graph=args.graph)
        finish(name, model, curve, args)


if __name__ == "__main__":
    main()
