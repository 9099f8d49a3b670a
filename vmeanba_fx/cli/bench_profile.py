"""The profile part of bench, the paper's Figure 1: which kernels one block of the model spends its time in."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..sites import Site
from .arguments import CommandError

_RUNS = 5


@dataclass(frozen=True)
class ProfileRow:
    """A kernel (on the CPU: an operator): microseconds per run of the block, and their share of all kernels' time."""

    name: str
    calls: float
    microseconds: float
    share: float


def block_of(site: Site) -> str:
    """The block that a site lies in: its innermost module that is an element of a list (``layers.0.blocks.1``)."""
    parts = site.module.split(".")
    while parts and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts)


def profile_rows(model: nn.Module, images: Tensor, block: str) -> list[ProfileRow]:
    """The kernels of ``block`` (a module path, "" for the whole model) on what it sees of ``images``, longest first.

    Raises:
        CommandError: there is no such module, or the model does not call it.
    """
    try:
        module = model.get_submodule(block)
    except AttributeError:
        raise CommandError(f"--block {block}: the model has no such module") from None
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model(images)
    finally:
        handle.remove()
    if not seen:
        raise CommandError(f"--block {block}: the model does not call this module")
    args, kwargs = seen[0]
    on_gpu = images.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    module(*args, **kwargs)
    with profile(activities=activities, acc_events=True) as recorded:
        for _ in range(_RUNS):
            module(*args, **kwargs)
        if on_gpu:
            torch.cuda.synchronize(images.device)
    times = []
    for event in recorded.key_averages():
        kernel = event.device_type == torch.autograd.DeviceType.CUDA
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent > 0 and kernel == on_gpu:
            times.append((event.key, event.count / _RUNS, spent / _RUNS))
    total = sum(spent for *_, spent in times)
    times.sort(key=lambda row: -row[2])
    return [ProfileRow(name, calls, spent, spent / total) for name, calls, spent in times]


def profile_table(rows: list[ProfileRow], block: str, top: int = 5) -> str:
    rows = _by_short_name(rows)
    if rows[top:]:
        rows = [*rows[:top], _sum(f"({len(rows) - top} others)", rows[top:])]
    table = [[r.name, f"{r.calls:g}", f"{r.microseconds:.1f}", f"{r.share:.1%}"] for r in rows]
    head = [f"kernels of {block or 'the model'}", "calls", "us per run", "share"]
    return tabulate(table, head, disable_numparse=True, colalign=("left", "right", "right", "right"))


def profile_plot(rows: list[ProfileRow], title: str, path: Path, top: int = 5) -> bool:
    """The bar chart of the top kernels as an image; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    bars = _by_short_name(rows, 48)[:top][::-1]
    figure = Figure(figsize=(8, 0.5 * len(bars) + 1.5))
    axis = figure.add_subplot()
    axis.barh([r.name for r in bars], [100 * r.share for r in bars])
    for place, row in enumerate(bars):
        axis.text(100 * row.share, place, f" {row.share:.1%}", va="center")
    axis.set_xlabel("share of kernel time, %")
    figure.suptitle(textwrap.fill(title, 110), fontsize=8)
    axis.margins(x=0.12)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return True


def _by_short_name(rows: list[ProfileRow], most: int = 70) -> list[ProfileRow]:
    """Kernels that differ in types or tile sizes alone are one row here."""
    found: dict[str, list[ProfileRow]] = {}
    for row in rows:
        found.setdefault(_short(row.name, most), []).append(row)
    return sorted((_sum(name, same) for name, same in found.items()), key=lambda r: -r.microseconds)


def _sum(name: str, rows: list[ProfileRow]) -> ProfileRow:
    return ProfileRow(name, sum(r.calls for r in rows), sum(r.microseconds for r in rows), sum(r.share for r in rows))


def _short(name: str, most: int = 70) -> str:
    """A kernel's C++ name without namespaces, arguments and types, cut; what PyTorch's general kernels compute in brackets."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = re.sub(r"\b(?!aten|vmeanba_fx)\w+::(?=\w)", "", name)
    plain = re.split(r"[<(]", name)[0]
    inner = re.search(r"CUDAFunctor_\w+|\w+_kernel_cuda|(?!gpu_)\b\w+_kernel_impl\b|\w+Functor", name[len(plain) :])
    plain += f" ({inner[0]})" if inner else ""
    return plain if len(plain) <= most else plain[: most - 3] + "..."
