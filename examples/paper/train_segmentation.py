"""Trains VMamba + UperNet on scenes composed of Fashion-MNIST images (96x96, ten classes and background).

    python examples/paper/train_segmentation.py --device cuda
"""

import torch
from common import arrays, segmentation
from scenes import compose
from training import arguments, finish, fit

STEPS, BATCH, LR = 6000, 64, 1.5e-3


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.manual_seed(args.seed)
    model = segmentation().to(args.device)
    images, labels = (t.to(args.device) for t in arrays(args.data, "fashion", True))
    size = 2 if args.quick else BATCH

    def batch(step: int):
        # Seeds below a million: those of the calibration and test scenes are larger.
        return compose(images, labels, size, seed=100_000 * args.seed + step)

    steps = args.steps or (2 if args.quick else STEPS)
    finish("segmentation", model, fit(model, batch, steps=steps, lr=LR, seconds=args.seconds), args)


if __name__ == "__main__":
    main()
