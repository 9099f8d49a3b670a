"""VMamba + UperNet on ADE20k: score the scans, replace k of them, measure mIoU on the validation images.

    python examples/ade20k.py /data/ADEChallengeData2016 --model vmamba_tiny_s1l8 \\
        --weights upernet_vssm_4xb4-160k_ade20k-512x512_tiny.pth --device cuda -k 0 4 7 14 \\
        --rank 4 --refit all

The data folder is the one of the SceneParsing benchmark: `images/{training,validation}/*.jpg` and
`annotations/{training,validation}/*.png`, where 0 is unlabelled and 1 to 150 are the classes. Images are prepared as usual:
shorter side to 512, ImageNet's mean and deviation. The model sees windows of 512x512 that overlap by a third, and the
logits are averaged (mmsegmentation's "slide" mode), so that one captured graph serves all images. Needs Pillow.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from imagenet import arguments, calibrated, curve, normalised, shorter_side
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

import vmeanba_fx
from vmeanba_fx import models
from vmeanba_fx.calibration.metrics import IGNORED
from vmeanba_fx.cli.arguments import at_least


class Scenes(Dataset):
    """(image (3, H, W), classes (h, w)) of a split; the image is resized, the classes are not. Unlabelled pixels: IGNORED."""

    def __init__(self, folder: Path, split: str, size: int = 512, *, limit: int | None = None, seed: int = 0):
        images = sorted((folder / "images" / split).glob("*.jpg"))
        if not images:
            raise FileNotFoundError(f"no images in {folder / 'images' / split}")
        if limit is not None:
            random.Random(seed).shuffle(images)
        self.items = [(path, folder / "annotations" / split / f"{path.stem}.png") for path in images[:limit]]
        self.size = size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, classes = self.items[index]
        labels = torch.from_numpy(np.array(Image.open(classes))).long() - 1
        labels[labels < 0] = IGNORED
        return normalised(shorter_side(Image.open(image).convert("RGB"), self.size, Image.Resampling.BILINEAR)), labels


class Crops(Dataset):
    """One random window of `size` x `size` per scene, for calibration."""

    def __init__(self, scenes: Scenes, seed: int):
        self.scenes, self.seed = scenes, seed

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.scenes[index]
        size = self.scenes.size
        labels = F.interpolate(labels[None, None].float(), size=image.shape[1:], mode="nearest")[0, 0].long()
        place = random.Random(f"{self.seed},{index}")
        top, left = (place.randrange(length - size + 1) for length in image.shape[1:])
        return image[:, top : top + size, left : left + size], labels[top : top + size, left : left + size]


def windows(length: int, size: int) -> Iterator[int]:
    """Where windows of `size` begin so that they cover `length` and overlap by a third."""
    stride = max(size * 2 // 3, 1)
    count = max(-(-(length - size) // stride), 0) + 1
    for i in range(count):
        yield min(i * stride, length - size)


@torch.inference_mode()
def mean_iou(model: torch.nn.Module, scenes: Scenes, classes: int, device: torch.device) -> float:
    counts = torch.zeros(classes, classes, dtype=torch.double)
    size = scenes.size
    for image, labels in tqdm(scenes, desc="measuring", leave=False, disable=None):
        if int(labels.max()) >= classes:
            raise ValueError(f"an annotation holds class {int(labels.max()) + 1}, --classes is {classes}")
        _, height, width = image.shape
        corners = [(top, left) for top in windows(height, size) for left in windows(width, size)]
        crops = torch.stack([image[:, t : t + size, x : x + size] for t, x in corners])
        logits = torch.zeros(classes, height, width, device=device)
        seen = torch.zeros(height, width, device=device)
        for (top, left), out in zip(corners, model(crops.to(device)), strict=True):
            logits[:, top : top + size, left : left + size] += out
            seen[top : top + size, left : left + size] += 1
        logits = F.interpolate((logits / seen)[None], size=labels.shape, mode="bilinear", align_corners=False)
        found, valid = logits[0].argmax(0).cpu(), labels >= 0
        pairs = labels[valid] * classes + found[valid]
        counts += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    hits = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hits
    return 100 * float((hits[union > 0] / union[union > 0]).mean())


def main() -> None:
    p = arguments(__doc__)
    p.add_argument("--size", type=at_least(1), default=512, help="shorter side, and side of the windows")
    p.add_argument("--classes", type=at_least(2), default=150)
    p.add_argument("--channels", type=at_least(1), default=512, help="channels of the UperNet head")
    p.add_argument("--ignore", nargs="*", default=["auxiliary_head.*"],
                   help="keys of the checkpoint that the model lacks; alone, without a key, for none")  # fmt: skip
    args = p.parse_args()
    test = Scenes(args.data, "validation", args.size, limit=args.test_images)
    scenes = Scenes(args.data, "training", args.size, limit=args.calibration_images, seed=args.seed)
    model = models.UperNet(models.backbone(args.model, in_chans=3), args.classes, args.channels)
    models.load_checkpoint(model, args.weights, ignore=args.ignore).eval().to(args.device)
    plan = calibrated(model, Crops(scenes, args.seed), args)
    print(curve(plan, model, lambda m: mean_iou(m, test, args.classes, args.device), "mIoU", args))
    print(f"{len(test)} validation images; calibrated on {len(scenes)} training images")


if __name__ == "__main__":
    try:
        main()
    except (vmeanba_fx.VMeanbaError, OSError, ValueError) as error:
        sys.exit(f"ade20k.py: {error}")
