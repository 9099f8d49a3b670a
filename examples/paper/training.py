"""One training loop for all recipes of this folder: AdamW, one learning-rate cycle, bfloat16 autocast on a GPU."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import CHECKPOINTS, TASKS, evaluate
from results import parser, write_csv
from torch import Tensor, nn

from vmeanba_fx.models import save_checkpoint
from vmeanba_fx.models.ss2d import SS2D

WARM_UP, CLIP, SMOOTHING = 0.05, 1.0, 0.05


def _as_is(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images, labels


def fit(
    model: nn.Module, batch: Callable[[int], tuple[Tensor, ...]], prepare: Callable[..., tuple[Tensor, Tensor]] = _as_is, *,
    steps: int, lr: float, seconds: float, weight_decay: float = 0.05, graph: bool = False,
) -> list[dict[str, float]]:  # fmt: skip
    """Trains in place; returns the loss curve.

    `prepare(*batch(step))` gives images and labels on the model's device; `prepare` is part of the replayed step.

    The learning rate falls to zero after `steps` steps or `seconds` seconds, whichever is first; how far it came is logged.
    graph: replay each step as one CUDA graph. Small models wait for launches otherwise.
    """
    device = next(model.parameters()).device
    decay = [p for n, p in model.named_parameters() if p.ndim >= 2 and not n.endswith("A_logs")]
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or n.endswith("A_logs")]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    rate = torch.tensor(0.0, device=device)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=on_gpu, capturable=on_gpu)

    def advance(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            images, labels = prepare(*inputs)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            loss = F.cross_entropy(model(images).float(), labels, label_smoothing=SMOOTHING)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.detach()

    step_once = _Replayed(advance, optimizer) if graph and on_gpu else _Eager(advance, optimizer)
    curve, total, counted = [], torch.zeros((), device=device), 0
    started = time.perf_counter()
    model.train()
    for step in range(steps):
        elapsed = time.perf_counter() - started
        progress = max(step / steps, elapsed / seconds)
        if progress >= 1:
            break
        rate.fill_(lr * min(progress / WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * progress)))
        total += step_once(*batch(step))
        counted += 1
        if counted == 100 or step + 1 == steps:
            curve.append({"step": step + 1, "seconds": round(elapsed, 1), "loss": round(float(total) / counted, 4)})
            print(curve[-1], flush=True)
            total.zero_()
            counted = 0
    model.eval()
    return curve


class _Eager:
    def __init__(self, advance: Callable[..., Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.advance, self.optimizer = advance, optimizer

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        return self.advance(*inputs)


class _Replayed(_Eager):
    """The first steps run as they are, on a stream of their own; then one step is captured and replayed."""

    EAGER = 12

    def __init__(self, advance: Callable[..., Tensor], optimizer: torch.optim.Optimizer) -> None:
        super().__init__(advance, optimizer)
        self.stream, self.done = torch.cuda.Stream(), 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.done += 1
        if self.done <= self.EAGER:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = super().__call__(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.graph is None:
            self.held = [t.clone() for t in inputs]
            self.optimizer.zero_grad(set_to_none=True)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss = self.advance(*self.held)
        for held, new in zip(self.held, inputs, strict=True):
            held.copy_(new)
        self.graph.replay()
        return self.loss


def start_with_scans(model: nn.Module) -> nn.Module:
    """Scales the projections of B, C and the step to their fan-in: at the official values the scan starts near zero."""
    for module in model.modules():
        if isinstance(module, SS2D):
            nn.init.normal_(module.x_proj.weight, std=module.d_inner**-0.5)
            nn.init.normal_(module.dt_projs.weight, std=module.dt_rank**-0.5)
            nn.init.uniform_(module.dt_projs_bias, -4.0, 0.0)
    return model


def shifted(images: Tensor, distance: int, flip: bool, generator: torch.Generator) -> Tensor:
    """(n, H, W) moved by up to `distance` pixels in each direction, zeros coming in, and mirrored at random."""
    count, height, width = images.shape
    padded = F.pad(images, (distance,) * 4)
    offsets = torch.randint(2 * distance + 1, (2, count), generator=generator).to(images.device)
    rows = offsets[0][:, None] + torch.arange(height, device=images.device)
    columns = offsets[1][:, None] + torch.arange(width, device=images.device)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator).to(images.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    return padded[torch.arange(count, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def shuffled(total: int, size: int, seed: int) -> Callable[[int], Tensor]:
    """`indices(step)`: every epoch is a new permutation; depends on seed and step alone."""
    per_epoch = max(total // size, 1)
    held: dict[int, Tensor] = {}

    def indices(step: int) -> Tensor:
        epoch, position = divmod(step, per_epoch)
        if epoch not in held:
            held.clear()
            held[epoch] = torch.randperm(total, generator=torch.Generator().manual_seed(1000 * seed + epoch))
        return held[epoch][position * size : (position + 1) * size]

    return indices


def arguments(doc: str):
    p = parser(doc)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--seconds", type=float, default=1e9, help="end the learning-rate cycle after this time at the latest")
    p.add_argument("--steps", type=int, help="override the recipe's number of steps")
    p.add_argument("--graph", action="store_true", help="replay training steps as CUDA graphs")
    p.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="folder for the weights")
    return p


def finish(name: str, model: nn.Module, curve: list[dict[str, float]], args) -> float:
    """Rounds to fp16, measures on the test split, writes checkpoint and loss curve; returns the measure in percent."""
    task = TASKS[name]
    half = copy.deepcopy(model).half()
    model.load_state_dict(half.state_dict())
    count = 64 if args.quick else task.test_images
    reached = evaluate(model, *task.load(args.data, False, count, 0, args.device), task.measure)
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    steps = int(curve[-1]["step"]) if curve else 0
    metadata = {"test_" + task.measure: f"{reached:.3f}", "seed": args.seed, "steps": steps, "torch": torch.__version__}
    save_checkpoint(half, args.checkpoints / f"{name}.safetensors", metadata)
    if curve:
        write_csv(args.out / "training" / f"{name}.csv", curve)
    print(f"{name}: test {task.measure} {reached:.2f} % after {steps} steps", flush=True)
    return reached
