"""Speed of the scan ops on this CPU, against a Python loop over time.

    python benchmarks/cpu_scan.py [--threads 2] [--seconds 2] [--json FILE]

The loop is `vmeanba_fx.ops.naive.selective_scan`: discretise the whole tensor, then one step after another, as the
reference functions of public code do it. "D=1" is `linear_scan` with one channel, the recurrence that is left of a site
after VMeanba's mean, at the same batch, groups, state and length; its share is of the full scan's time. Numbers first:
every op is compared with the loop in float64 on the benchmark's own inputs, and a failure prints no speed. Times are
medians in milliseconds, taken in turns so that a busy moment of the machine hits all alike.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate

from vmeanba_fx import ops
from vmeanba_fx.ops import naive

# (batch, groups K, channels per group D, states N, length L)
SHAPES = [(8, 4, 96, 16, 576), (8, 4, 96, 1, 576), (1, 4, 96, 16, 3136), (1, 4, 96, 1, 3136), (1, 4, 96, 1, 65536)]
TOLERANCE = 1e-5


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


def error(op: Callable, reference: Callable, arguments: dict) -> float:
    """Largest difference from the loop in float64, relative to the largest value."""
    doubled = {name: x.double() if torch.is_tensor(x) else x for name, x in arguments.items()}
    expected = reference(**doubled)
    return float((op(**arguments).double() - expected).abs().max() / expected.abs().max())


def times(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Median milliseconds of each call, measured in turns for about `seconds` in all and at least three rounds."""
    for call in calls:
        call()
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 3 or time.perf_counter() < end:
        row = []
        for call in calls:
            start = time.perf_counter()
            call()
            row.append(1e3 * (time.perf_counter() - start))
        rounds.append(row)
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def measure(shape: tuple[int, ...], seconds: float) -> dict:
    full, one = inputs(*shape)
    pairs = ((ops.selective_scan, naive.selective_scan, full), (ops.linear_scan, naive.linear_scan, one))
    for op, reference, arguments in pairs:
        difference = error(op, reference, arguments)
        if not difference < TOLERANCE:
            raise SystemExit(f"{op.__name__} is wrong by {difference:.1e} at {shape}; no speed is printed")
    loop, ours, single = times(
        [
            lambda: naive.selective_scan(**full),
            lambda: ops.selective_scan(**full),
            lambda: ops.linear_scan(**one),
        ],
        seconds,
    )
    names = dict(zip(("batch", "K", "D", "N", "L"), shape, strict=True))
    return names | {
        "loop_ms": loop,
        "scan_ms": ours,
        "ratio": loop / ours,
        "one_ms": single,
        "one_share": single / ours,
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="intra-op threads of PyTorch")
    parser.add_argument("--seconds", type=float, default=4.0, help="measuring time for each shape")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    conditions = {"cpu": processor(), "threads": options.threads, "torch": torch.__version__, "dtype": "float32"}
    with torch.inference_mode():
        rows = [measure(shape, options.seconds) for shape in SHAPES]
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    headers = ["batch", "K", "D", "N", "L", "loop ms", "scan ms", "ratio", "D=1 ms", "D=1 share"]
    table = [[*list(row.values())[:-1], f"{row['one_share']:.1%}"] for row in rows]
    print(tabulate(table, headers, floatfmt=("d", "d", "d", "d", "d", ".1f", ".2f", ".1f", ".3f", "")))
    if options.json:
        options.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
