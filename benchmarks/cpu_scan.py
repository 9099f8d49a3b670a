"""Speed of the scan ops on this CPU, against Python loops over time, and its growth with the length.

    python benchmarks/cpu_scan.py [--threads 2] [--seconds 4] [--out benchmarks/results]

"official" is a loop as the reference functions of public code have it (VMamba's `selective_scan_torch`): discretise the whole
tensor, then per step a multiply, an add and an einsum. "tight" is the best loop we could write: time outermost, one fused
multiply-add per step in place, the outputs in one product at the end. "D=1" is `linear_scan` with one channel, the recurrence
that is left of a site after VMeanba's mean, at the same batch, groups, state and length; its share is of the full scan's time.

Numbers first: all are compared with `vmeanba_fx.ops.naive` in float64 on the benchmark's own inputs, and a failure prints no
speed. Times are medians in milliseconds of calls one after another: the inputs are where the last call left them, as in a
model they are where the operation before left them.
"""

import argparse
import datetime
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vmeanba_fx.cli.arguments import at_least
from vmeanba_fx.ops import cpu_jit, naive

# (batch, groups K, channels per group D, states N, length L)
SHAPES = [(8, 4, 96, 16, 576), (8, 4, 96, 1, 576), (1, 4, 96, 16, 3136), (1, 4, 96, 1, 3136)]
LENGTHS = [2**i for i in range(8, 17)]
TOLERANCE = 1e-5
# As graphs call them.
scan, one_channel_scan = torch.ops.vmeanba_fx.selective_scan.default, torch.ops.vmeanba_fx.linear_scan.default


def inputs(batch: int, K: int, D: int, N: int, L: int) -> tuple[dict, dict]:
    """Arguments of the full scan and of the one-channel scan, with decays spread over (0, 1)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    B, C = normal(batch, K, N, L), normal(batch, K, N, L)
    full = {
        "u": normal(batch, K * D, L),
        "delta": normal(batch, K * D, L),
        "A": -torch.exp(0.5 * normal(K * D, N)),
        "B": B,
        "C": C,
        "D": normal(K * D),
        "delta_bias": normal(K * D) - 2,
        "delta_softplus": True,
    }
    one = {"a": torch.rand(batch, K, N, L, generator=generator), "b": normal(batch, K, 1, N, L), "C": C}
    return full, one


def official_loop(u, delta, A, B, C, D, delta_bias, delta_softplus) -> Tensor:
    """Step for step what `selective_scan_torch` of the official VMamba computes."""
    batch, channels, length = u.shape
    K, N = B.shape[1:3]
    delta = F.softplus(delta + delta_bias[:, None]) if delta_softplus else delta + delta_bias[:, None]
    B, C = (x[:, :, None].expand(-1, -1, channels // K, -1, -1).reshape(batch, channels, N, length) for x in (B, C))
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    drive = torch.einsum("bdl,bdnl,bdl->bdln", delta, B, u)
    h = A.new_zeros(batch, channels, N)
    outputs = []
    for t in range(length):
        h = decay[:, :, t] * h + drive[:, :, t]
        outputs.append(torch.einsum("bdn,bdn->bd", h, C[..., t]))
    return torch.stack(outputs, dim=2) + u * D[:, None]


def tight_loop(u, delta, A, B, C, D, delta_bias, delta_softplus) -> Tensor:
    """Time outermost, so that a step works on one piece of memory; the states overwrite what drives them."""
    K = B.shape[1]
    dt = F.softplus(delta + delta_bias[:, None]) if delta_softplus else delta + delta_bias[:, None]
    dt, product = (x.permute(2, 0, 1).unflatten(2, (K, -1)).contiguous() for x in (dt, dt * u))  # (L, B, K, D)
    decay = torch.exp(dt[..., None] * A.unflatten(0, (K, -1)))  # (L, B, K, D, N)
    h = product[..., None] * B.permute(3, 0, 1, 2)[:, :, :, None]
    for before, now, factor in zip(h[:-1].unbind(0), h[1:].unbind(0), decay[1:].unbind(0), strict=True):
        now.addcmul_(factor, before)
    y = torch.matmul(h, C.permute(3, 0, 1, 2)[..., None])[..., 0]
    return y.flatten(2).permute(1, 2, 0) + u * D[:, None]


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


def doubled(arguments: dict) -> dict:
    return {name: x.double() if torch.is_tensor(x) else x for name, x in arguments.items()}


def median(call: Callable[[], object], seconds: float) -> float:
    """Median milliseconds of a call in a series of about `seconds`, and of at least three after the first."""
    call()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)


def measure(shape: tuple[int, ...], seconds: float) -> list:
    full, one = inputs(*shape)
    expected = naive.selective_scan(**doubled(full))
    calls: dict[str, Callable[..., Tensor]] = {"official loop": official_loop, "tight loop": tight_loop, "selective_scan": scan}
    for name, call in calls.items():
        require(name, error(call(**full), expected), shape)
    require("linear_scan", error(one_channel_scan(**one), naive.linear_scan(**doubled(one))), shape)
    official, tight, ours = (median(partial(call, **full), seconds / 4) for call in calls.values())
    single = median(partial(one_channel_scan, **one), seconds / 4)
    return [*shape, official, tight, ours, official / ours, tight / ours, single, f"{single / ours:.1%}"]


def require(name: str, difference: float, shape: tuple[int, ...]) -> None:
    if not difference < TOLERANCE:
        raise SystemExit(f"{name} is wrong by {difference:.1e} at {shape}; no speed is printed")


def growth(states: int, seconds: float) -> list[list]:
    """Time per state of the full scan, of the one-channel scan, and of the product of u and delta, for growing lengths.

    PyTorch's product reads what the scan of one state reads and has an output of the same size: its new pages cost as much.
    """
    rows = []
    for length in LENGTHS:
        full, one = inputs(1, 4, 96, states, length)
        if length <= 1024:
            require("selective_scan", error(scan(**full), naive.selective_scan(**doubled(full))), (length,))
        full_ms = median(partial(scan, **full), seconds)
        one_ms = median(partial(one_channel_scan, **one), seconds)
        product_ms = median(partial(torch.mul, full["u"], full["delta"]), seconds)
        rows.append([states, length, full_ms, 1e6 * full_ms / (4 * 96 * states * length), one_ms, product_ms])
    return rows


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def conditions(threads: int) -> str:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    widths = [name for name in ("amx_tile", "avx512f", "avx2") if name in flags]
    compiled = "no Numba" if cpu_jit._kernels() is None else "Numba kernels"
    day = datetime.date.today().isoformat()
    return f"{processor()} ({', '.join(widths)}), {threads} threads, torch {torch.__version__}, {compiled}, {day}"


def write(folder: Path, title: str, threads: int, text: str) -> None:
    """A file whose name carries the conditions."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.]+", "-", f"{title}_torch{torch.__version__.split('+')[0]}_{threads}threads.md")
    (folder / name).write_text(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads(), help="intra-op threads of PyTorch")
    parser.add_argument("--seconds", type=float, default=4.0, help="measuring time for each shape")
    parser.add_argument("--out", type=Path, help="folder that the tables are written to as well")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    with torch.inference_mode():
        rows = [measure(shape, options.seconds) for shape in SHAPES]
        longer = [row for states in (1, 16) for row in growth(states, options.seconds / 16)]
    headers = ["batch", "K", "D", "N", "L", "official ms", "tight ms", "scan ms", "ratio", "ratio", "D=1 ms", "D=1 share"]
    formats = ("d", "d", "d", "d", "d", ".1f", ".1f", ".2f", ".1f", ".1f", ".3f", "")
    tables = [
        tabulate(rows, headers, tablefmt="github", floatfmt=formats),
        tabulate(
            longer,
            ["N", "L", "scan ms", "ns per state", "D=1 ms", "u * delta ms"],
            tablefmt="github",
            floatfmt=("d", "d", ".3f", ".2f", ".3f", ".3f"),
        ),
    ]
    text = "\n\n".join([conditions(options.threads) + ", float32", tables[0], "Batch 1, K = 4, D = 96:", tables[1]]) + "\n"
    print(text, end="")
    if options.out:
        write(options.out, f"cpu_scan_{processor()}", options.threads, text)


if __name__ == "__main__":
    main()
