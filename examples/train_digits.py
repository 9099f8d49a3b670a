"""Trains `vmamba_digits` on scikit-learn's digits and writes the checkpoint that the package ships.

A few minutes on 2 cores.

    python examples/train_digits.py --out vmamba_digits.safetensors

The model has no depthwise convolution and only one downsampling, so it cannot read a digit without its scans: the last
lines print the accuracy with one scan deleted, for every site, and with all of them deleted.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmeanba_fx.data import accuracy, load_digits_images, make_loader
from vmeanba_fx.files import unwritable
from vmeanba_fx.models import VSSM, save_checkpoint, vmamba_digits
from vmeanba_fx.models.ss2d import SS2D

EPOCHS, BATCH, LEARNING_RATE, MAX_SHIFT = 60, 64, 5e-3, 3


def start_with_scans(model: VSSM) -> None:
    """Scales the projections of B, C and the step to their fan-in: at the official values the scan starts near zero."""
    for module in model.modules():
        if isinstance(module, SS2D):
            nn.init.normal_(module.x_proj.weight, std=module.d_inner**-0.5)
            nn.init.normal_(module.dt_projs.weight, std=module.dt_rank**-0.5)
            nn.init.uniform_(module.dt_projs_bias, -4.0, 0.0)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved by up to MAX_SHIFT pixels in each direction, its border repeated."""
    height, width = images.shape[2:]
    padded = F.pad(images, (MAX_SHIFT,) * 4, mode="replicate")
    offsets = torch.randint(2 * MAX_SHIFT + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([x[:, top : top + height, left : left + width] for x, (top, left) in zip(padded, offsets, strict=True)])


def train(seed: int, epochs: int) -> VSSM:
    """One training run: AdamW, one learning-rate cycle, label smoothing, random shifts."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = vmamba_digits()
    start_with_scans(model)
    loader = make_loader(*load_digits_images(train=True), BATCH, seed=seed)
    test = make_loader(*load_digits_images(train=False), 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=max(epochs * len(loader), 10), pct_start=0.1
    )
    started = time.perf_counter()
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for images, labels in loader:
            loss = F.cross_entropy(model(shifted(images, generator)), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        if epoch % 5 == 0 or epoch == epochs:
            seconds = time.perf_counter() - started
            print(f"epoch {epoch:3d}  loss {total / len(loader):.3f}  test {accuracy(model, test):.2%}  {seconds:.0f} s")
    return model.eval()


@contextlib.contextmanager
def without_scans(sites: list[SS2D]) -> Iterator[None]:
    """Deletes the scans of `sites` for a while: with C = 0 nothing but the skip `D * u` is left of them."""
    saved = [site.x_proj.weight.detach().clone() for site in sites]
    with torch.no_grad():
        for site in sites:
            site.x_proj.weight.unflatten(0, (4, -1))[:, -site.d_state :] = 0.0
    try:
        yield
    finally:
        with torch.no_grad():
            for site, weight in zip(sites, saved, strict=True):
                site.x_proj.weight.copy_(weight)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train vmamba_digits on scikit-learn's digits.")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write (.safetensors)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")
    if reason := unwritable(args.out):
        parser.error(reason)

    model = train(args.seed, args.epochs)
    images, labels = load_digits_images(train=False)
    test = make_loader(images, labels, 128)
    reached = accuracy(model, test)
    metadata = {"test_accuracy": f"{reached:.4f}", "seed": args.seed, "epochs": args.epochs, "torch": torch.__version__}
    save_checkpoint(model, args.out, metadata)
    print(f"test accuracy {reached:.2%} ({len(labels)} images), written to {args.out}")

    sites = {name: module for name, module in model.named_modules() if isinstance(module, SS2D)}
    for name, site in sites.items():
        with without_scans([site]):
            print(f"without the scan of {name}: {accuracy(model, test):.2%}")
    with without_scans(list(sites.values())):
        print(f"without any scan: {accuracy(model, test):.2%}")


if __name__ == "__main__":
    main()
