"""Times `ss2d` on the GPU at the sizes of the VMamba models, beside what the hardware allows.

    python benchmarks/ss2d.py --models T S B --batches 128 1 --dtype float16

Each size is first checked against the float64 loops of `naive`; a size that fails prints no time and ends the run. A
time is the median over replays of a CUDA graph of several calls, each on its own inputs, so that a map larger than the
cache is read from device memory. Two floors are given. Arithmetic: per element, direction and state the exponentials of
decay (and one of softplus) at 16 a clock and multiprocessor, or the float32 instructions that the recurrence cannot do
without at 128, whichever takes longer; the rank features' GEMM is left out. Memory: x, feats and the output moved once,
at the speed of a device-to-device copy measured in the same run.
"""

import argparse
import csv
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.running import need_gpu
from vmeanba_fx import ops
from vmeanba_fx.ops import cuda_ss2d, naive

DEPTHS = {"T": (2, 2, 8, 2), "S": (2, 2, 20, 2), "B": (2, 2, 20, 2), "v0-T": (2, 2, 9, 2)}
WIDTHS = {"T": 96, "S": 96, "B": 128, "v0-T": 192}
STATES = {"T": 1, "S": 1, "B": 1, "v0-T": 16}
DIRECTIONS = [0, 1, 2, 3]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def stages(model, resolution):
    """(sites, D, side, R, N) of each stage."""
    for stage, sites in enumerate(DEPTHS[model]):
        width = WIDTHS[model] << stage
        rank = -(-(width // (2 if model.startswith("v0") else 1)) // 16)
        yield sites, width, resolution // 4 >> stage, rank, STATES[model]


def make_inputs(batch, D, side, R, N, dtype, channels_last):
    K, count = len(DIRECTIONS), R + 2 * N
    x = torch.randn(batch, D, side, side, device="cuda", dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    # As one GEMM writes them: the features of a position together, each direction's padded to a multiple of 8.
    feats = torch.randn(batch, side, side, K, -(-count // 8) * 8, device="cuda", dtype=dtype)
    return x, feats[..., :count].permute(0, 3, 4, 1, 2)


def make_parameters(D, R, N, dtype):
    K = len(DIRECTIONS)
    weight = (torch.randn(K, D, R, device="cuda") / R**0.5).to(dtype)
    A = -torch.arange(1, N + 1, device="cuda", dtype=torch.float32).expand(K * D, N).contiguous()
    return weight, A, torch.ones(D, device="cuda"), torch.randn(K * D, device="cuda") - 3


def check(inputs, parameters, out, dtype):
    """Relative error of one batch item; raises if it is too large."""
    x, feats = (t[-1:].double() for t in inputs)
    weight, A, D, bias = (t.double() for t in parameters)
    expected = naive.ss2d(x, feats, weight, A, D, bias, DIRECTIONS, None, True)
    error = ((out[-1:].double() - expected).norm() / expected.norm()).item()
    if not error < TOLERANCE[dtype]:
        raise SystemExit(f"ss2d is wrong at {tuple(out.shape)}: relative error {error:.2e}")
    return error


def measure(batch, D, side, R, N, dtype, channels_last):
    """Seconds of a call, and its relative error."""
    parameters = make_parameters(D, R, N, dtype)
    weight, A, skip, bias = parameters
    count = 4 if batch * D * side * side * dtype.itemsize < 2**28 else 2
    sets = [make_inputs(batch, D, side, R, N, dtype, channels_last) for _ in range(count)]

    def call(inputs):
        x, feats = inputs
        return ops.ss2d(x, feats, weight, A, skip, bias, DIRECTIONS, None, True)

    error = check(sets[0], parameters, call(sets[0]), dtype)
    return median_time(call, sets), error


def median_time(call, sets, replays=25):
    """Median seconds of one call over graph replays that go through all input sets."""
    repeats = 2
    for inputs in sets:
        call(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for inputs in sets:
                call(inputs)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    graph.replay()
    for event in events[:-1]:
        event.record()
        graph.replay()
    events[-1].record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in pairwise(events))
    return times[len(times) // 2] / 1e3 / (repeats * len(sets))


def copy_speed():
    """Bytes a second, read and written, of the fastest of three ways to copy a gigabyte."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    ways = (target.copy_, lambda x: torch.mul(x, 2, out=target), lambda x: torch.abs(x, out=target))
    return 2 * source.nbytes / min(median_time(way, [source], replays=10) for way in ways)


def clock_hz():
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) * 1e6


def floors(batch, D, side, R, N, itemsize, processors, clock, bandwidth):
    """Seconds: arithmetic, memory."""
    elements = batch * D * side * side * len(DIRECTIONS)
    # float32: softplus 7, dt x 1; for each state dt A, B dt x, h, C h, and decay and h again for the parallel scan.
    clocks = max((1 + N) / 16, (8 + 6 * N + 1 + N) / 128)
    moved = batch * side * side * itemsize * (2 * D + len(DIRECTIONS) * (R + 2 * N))
    return elements * clocks / (processors * clock), moved / bandwidth


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["T", "S", "B"], choices=sorted(DEPTHS))
    parser.add_argument("--batches", nargs="+", type=int, default=[128, 32, 1])
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--channels-last", action="store_true", help="x in channels-last memory format")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    need_gpu()
    dtype, properties = getattr(torch, arguments.dtype), torch.cuda.get_device_properties(0)
    processors, clock, bandwidth = properties.multi_processor_count, clock_hz(), copy_speed()
    torch.manual_seed(0)

    rows, sums, measured = [], [], {}
    for model in arguments.models:
        for batch in arguments.batches:
            total = 0.0
            for sites, D, side, R, N in stages(model, arguments.resolution):
                case = (batch, D, side, R, N)
                if case not in measured:  # models share sizes
                    measured[case] = measure(*case, dtype, arguments.channels_last)
                seconds, error = measured[case]
                arithmetic, memory = floors(*case, dtype.itemsize, processors, clock, bandwidth)
                total += sites * seconds
                floor = max(arithmetic, memory)
                rows.append(
                    {
                        "model": model,
                        "batch": batch,
                        "sites": sites,
                        "D": D,
                        "HxW": f"{side}x{side}",
                        "R": R,
                        "N": N,
                        "us": round(seconds * 1e6, 1),
                        "arithmetic us": round(arithmetic * 1e6, 1),
                        "memory us": round(memory * 1e6, 1),
                        "floor/time": round(floor / seconds, 2),
                        "rel. error": f"{error:.1e}",
                    }
                )
            sums.append(
                {"model": model, "batch": batch, "sites": sum(DEPTHS[model]), "ms in ss2d": round(total * 1e3, 3)}
            )

    heading = (
        f"{properties.name}, torch {torch.__version__}, {arguments.dtype}, x "
        f"{'channels-last' if arguments.channels_last else 'channel-first'}, {arguments.resolution} px; "
        f"copy {bandwidth / 1e12:.2f} TB/s, clock {clock / 1e6:.0f} MHz, {len(cuda_ss2d._launches)} kernel plans"
    )
    text = f"{heading}\n\n{tabulate(rows, 'keys', 'pipe')}\n\n{tabulate(sums, 'keys', 'pipe', floatfmt='.3f')}\n"
    print(text)
    arguments.results.mkdir(parents=True, exist_ok=True)
    gpu = properties.name.replace("NVIDIA ", "").replace(" ", "-")
    layout = "_channels-last" if arguments.channels_last else ""
    stem = f"ss2d_{gpu}_torch{torch.__version__.split('+')[0]}_{arguments.dtype}{layout}"
    (arguments.results / f"{stem}.md").write_text(text, encoding="utf-8")
    with open(arguments.results / f"{stem}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
