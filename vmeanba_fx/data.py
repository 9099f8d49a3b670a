"""The two small data sets of the examples: scikit-learn's digits and Fashion-MNIST. No torchvision."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

DIGITS_MEAN, DIGITS_STD = 0.305, 0.324
FASHION_MEAN, FASHION_STD = 0.286, 0.353
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_GET_FASHION = (
    "get the four idx files of Fashion-MNIST from github.com/zalandoresearch/fashion-mnist, or on Debian and Ubuntu "
    "'apt-get install dataset-fashion-mnist', which puts them into /usr/share/datasets/fashion-mnist"
)
MAX_IDX_BYTES = 1 << 27  # Fashion-MNIST's largest file has 47 MB


def load_digits_images(train: bool, *, size: int = 32, test_fraction: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 digits as images (n, 1, size, size), about zero mean and unit variance, and labels (n,).

    The 8x8 originals are enlarged bilinearly. The split is stratified and fixed by `seed`; train and test are disjoint.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits images need scikit-learn: pip install 'vmeanba-fx[examples]'") from error
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must lie between 0 and 1, not {test_fraction}")
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    order = order[np.argsort(digits.target[order], kind="stable")]  # by class, shuffled within
    rank = np.concatenate([np.arange(n) / n for n in np.bincount(digits.target)])
    chosen = np.sort(order[(rank >= test_fraction) if train else (rank < test_fraction)])
    images = torch.from_numpy(digits.images[chosen]).float()[:, None] / 16.0
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return (images - DIGITS_MEAN) / DIGITS_STD, torch.from_numpy(digits.target[chosen]).long()


def read_idx(path: str | Path) -> np.ndarray:
    """The uint8 array in an idx file, plain or gzipped. Damage is an error that names the file.

    No more is read or unpacked than the header announces.
    """
    with open(path, "rb") as file:
        opened = gzip.open if file.read(2) == b"\x1f\x8b" else open
    try:
        with opened(path, "rb") as file:
            first = file.read(4)
            dims = first[3] if first[:3] == b"\x00\x00\x08" and len(first) == 4 else 0
            sizes = file.read(4 * dims)
            if not 1 <= dims <= 4 or len(sizes) < 4 * dims:
                raise ValueError(f"{path}: not an idx file of bytes (its first bytes are {first!r})")
            shape = tuple(int(n) for n in np.frombuffer(sizes, ">u4"))
            wanted = math.prod(shape)
            if wanted > MAX_IDX_BYTES:
                raise ValueError(f"{path}: header says {'x'.join(map(str, shape))} bytes; no file of the data set has as many")
            raw = file.read(wanted + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated gzip file ({error})") from error
    if len(raw) != wanted:
        has = len(raw) if len(raw) < wanted else "more"
        raise ValueError(f"{path}: header says {'x'.join(map(str, shape))} bytes, the file has {has}")
    return np.frombuffer(raw, np.uint8).reshape(shape)


class FashionMNIST(Dataset):
    """Fashion-MNIST from a folder of idx files, plain or `.gz`: items (image (1, size, size), label).

    Pixels become (x/255 - 0.286) / 0.353 after bilinear enlargement. `limit` keeps the first so many images.
    """

    def __init__(self, folder: str | Path, train: bool, *, size: int = 96, limit: int | None = None):
        stem = "train" if train else "t10k"
        self.images = self._read(folder, f"{stem}-images-idx3-ubyte", ndim=3)[:limit]
        self.labels = self._read(folder, f"{stem}-labels-idx1-ubyte", ndim=1)[:limit]
        self.size = size
        if len(self.images) != len(self.labels):
            raise ValueError(f"{folder}: {len(self.images)} images but {len(self.labels)} labels for {stem}")
        if len(self.labels) and int(self.labels.max()) >= len(FASHION_CLASSES):
            raise ValueError(f"{folder}: a {stem} label is {int(self.labels.max())}; Fashion-MNIST has 0 to 9")

    @staticmethod
    def _read(folder: str | Path, name: str, ndim: int) -> Tensor:
        folder = Path(folder)
        path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{folder / name}(.gz) not found; {_GET_FASHION}")
        array = read_idx(path)
        if array.ndim != ndim:
            raise ValueError(f"{path}: expected {ndim} dimensions, the file has {array.ndim}")
        return torch.from_numpy(array.copy())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.prepare(self.images[index][None])[0], int(self.labels[index])

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 (n, 28, 28) -> normalised float (n, 1, size, size)."""
        x = images[:, None].float() / 255.0
        x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)
        return (x - FASHION_MEAN) / FASHION_STD


def make_loader(images: Tensor, labels: Tensor, batch_size: int = 64, *, seed: int | None = None) -> DataLoader:
    """Batches (images, labels), in order, or shuffled anew every epoch by `seed`."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(images, labels), batch_size, shuffle=seed is not None, generator=generator)


@torch.no_grad()
def accuracy(model: torch.nn.Module, loader: DataLoader) -> float:
    """The share of `loader`'s samples whose largest logit is their label; the model's mode is restored."""
    was_training = model.training
    model.eval()
    try:
        right = total = 0
        for images, labels in loader:
            right += int((model(images).argmax(1) == labels).sum())
            total += len(labels)
    finally:
        model.train(was_training)
    if not total:
        raise ValueError("the loader is empty: there is no accuracy to measure")
    return right / total
