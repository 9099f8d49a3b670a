"""The kernel part of bench: the scans of a model on their own, the full one beside the one-channel one that replaces it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from torch.utils.benchmark import Timer

from .. import ops
from ..sites import Site
from .arguments import CommandError

_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@dataclass(frozen=True)
class KernelRow:
    """One distinct scan of the model. ``sites``: how often it occurs. Times of one call, in microseconds."""

    sites: int
    batch: int
    groups: int
    channels: int
    state: int
    length: int
    full_us: float
    one_us: float
    factor: float


def kernel_rows(
    sites: Iterable[Site], batch: int, dtype: torch.dtype, device: torch.device, min_time: float
) -> list[KernelRow]:
    """Check, then time, the scans of all sites that differ.

    Raises:
        CommandError: a kernel is wrong on the inputs it was to be timed on.
    """
    counts: dict[tuple[int, int, int, int], int] = {}
    for site in sites:
        shape = (site.groups, site.channels, site.state, site.length)
        counts[shape] = counts.get(shape, 0) + 1
    rows = []
    for (groups, channels, state, length), count in counts.items():
        full, one = (
            _check_and_time((batch, groups, width, state, length), dtype, device, min_time) for width in (channels, 1)
        )
        rows.append(KernelRow(count, batch, groups, channels, state, length, full, one, full / one))
    return rows


def _check_and_time(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, min_time: float) -> float:
    """Microseconds of one scan; with one channel per direction by the op that replaced sites use."""
    batch, groups, channels, state, length = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    u, delta = (normal(batch, groups * channels, length).to(dtype) for _ in range(2))
    B, C = (normal(batch, groups, state, length).to(dtype) for _ in range(2))
    A = -torch.rand(groups * channels, state, generator=generator, device=device) - 0.1
    bias = normal(groups * channels) - 2
    if channels > 1:
        def run() -> Tensor:
            return ops.selective_scan(u, delta, A, B, C, None, None, bias, True, torch.float32)
    else:
        def run() -> Tensor:
            return ops.shared_scan(u.unsqueeze(2), delta, A, B, C, bias, True, torch.float32)

    found = run()[-1].double().flatten(0, -2)
    expected = _reference(u[-1], delta[-1], A, B[-1], C[-1], bias)
    error = ((found - expected).norm() / expected.norm()).item()
    if not error <= _TOLERANCE.get(dtype, 5e-3):
        name = "selective_scan" if channels > 1 else "shared_scan"
        raise CommandError(f"{name} at (B, K, D, N, L) = {shape} is off by {error:.1e}: nothing was timed")
    return time_us(run, device, min_time)


def _reference(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, bias: Tensor) -> Tensor:
    """One batch item in float64: u, delta (K*D, L), B, C (K, N, L). The recurrence by doubling, log2(L) passes."""
    u, delta, A, B, C, bias = (t.double() for t in (u, delta, A, B, C, bias))
    each = u.shape[0] // B.shape[0]
    dt = F.softplus(delta + bias[:, None])
    y = torch.zeros_like(u)
    for n in range(A.shape[1]):
        a = torch.exp(dt * A[:, n, None])
        h = dt * u * B[:, n].repeat_interleave(each, 0)
        offset = 1
        while offset < h.shape[1]:
            h = torch.cat([h[:, :offset], torch.addcmul(h[:, offset:], a[:, offset:], h[:, :-offset])], 1)
            a = torch.cat([a[:, :offset], a[:, offset:] * a[:, :-offset]], 1)
            offset *= 2
        y.addcmul_(C[:, n].repeat_interleave(each, 0), h)
    return y


def time_us(run: Callable[[], object], device: torch.device, min_time: float) -> float:
    """Median microseconds of a call: on a GPU without the host's part, as replays of a CUDA graph of ten calls."""
    if device.type != "cuda":
        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        return 1e6 * timer.blocked_autorange(min_run_time=min_time).median
    with torch.cuda.device(device):
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                run()
        times: list[float] = []
        while len(times) < 10 or (sum(times) < 1e3 * min_time and len(times) < 100):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return 100 * statistics.median(times[3:])


def kernel_table(rows: list[KernelRow]) -> str:
    return tabulate(
        [
            [r.sites, r.batch, r.groups, r.channels, r.state, r.length, f"{r.full_us:.1f}", f"{r.one_us:.1f}",
             f"{r.factor:.1f}x"]
            for r in rows
        ],
        ["sites", "batch", "K", "D", "N", "L", "full scan us", "one channel us", "factor"],
        disable_numparse=True, colalign=["right"] * 9,
    )  # fmt: skip
