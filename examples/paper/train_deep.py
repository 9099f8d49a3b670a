"""Trains the classifier with 20 scan sites on Fashion-MNIST at 96x96.

    python examples/paper/train_deep.py --device cuda
"""

import torch
from common import arrays, deep, fashion_images
from training import arguments, finish, fit, shifted, shuffled

STEPS, BATCH, LR = 6000, 256, 2e-3


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.manual_seed(args.seed)
    model = deep().to(args.device)
    images, labels = (t.to(args.device) for t in arrays(args.data, "fashion", True))
    size = 8 if args.quick else BATCH
    indices = shuffled(len(labels), size, args.seed)

    def batch(step: int):
        chosen = indices(step).to(args.device)
        generator = torch.Generator().manual_seed(10_000_000 * (args.seed + 1) + step)
        return fashion_images(shifted(images[chosen], 2, True, generator), 96), labels[chosen]

    steps = args.steps or (2 if args.quick else STEPS)
    finish("deep", model, fit(model, batch, steps=steps, lr=LR, seconds=args.seconds, graph=args.graph), args)


if __name__ == "__main__":
    main()
