"""Speed of the CUDA scan kernels on this GPU, against the memory floor and, if there is one, the official kernel.

    python benchmarks/kernels.py [--dtype float16] [--official selective_scan_cuda_oflex] [--path DIR] [--sweep]
    python benchmarks/kernels.py --plot benchmarks/results/sweep_....csv      (draws what --sweep measured elsewhere)

Numbers first: every kernel is compared with a float64 reference on the benchmark's own inputs, and a failure prints no
speed. Times are medians of CUDA-graph replays, each over enough input sets to defeat the L2 cache. The floor is the
bytes that must move (each input read once, the output written once) over the bandwidth of a large device-to-device copy
measured in the same run; "floor/time" is the share of it that a kernel reaches. `--official` names the importable
extension of VMamba's own scan (`fwd`, `bwd`); its time is that of the full scan, also in the rows of the one-channel
scan, whose factor is the paper's claim. "rank" is the number of channels that share one decay. Writes
benchmarks/results/kernels_<gpu>_<torch>_<dtype>.csv and .md (and sweep_... with --sweep).
"""

import argparse
import csv
import importlib
import importlib.util
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.running import need_gpu
from benchmarks.scan_problems import DIRECTIONS, K, full_inputs, full_reference, one_inputs, one_reference
from benchmarks.ss2d import copy_speed
from vmeanba_fx import ops

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
# (batch, channels per direction, height, width, states): VMamba at 224 px, then ADE20k's 512 px.
FULL = [(128, 96, 56, 56, 1), (128, 128, 56, 56, 1), (128, 256, 28, 28, 1), (128, 512, 14, 14, 1), (128, 1024, 7, 7, 1)]
FULL += [(128, 192, 56, 56, 16), (1, 96, 56, 56, 1), (1, 96, 128, 128, 16)]
BACKWARD = [(128, 128, 56, 56, 1), (128, 512, 14, 14, 1), (64, 192, 56, 56, 16)]
ONE = [
    (128, 128, 56, 56, 1),
    (128, 256, 28, 28, 1),
    (128, 512, 14, 14, 1),
    (128, 1024, 7, 7, 1),
    (128, 192, 56, 56, 16),
]
ONE += [
    (16, 128, 128, 128, 1),
    (16, 256, 64, 64, 1),
    (16, 512, 32, 32, 1),
    (16, 1024, 16, 16, 1),
    (16, 192, 128, 128, 16),
]
ONE += [(128, 0, 128, 128, 1), (512, 0, 56, 56, 1), (1, 128, 56, 56, 1), (1, 192, 56, 56, 16)]
RANKS = [((128, 0, 56, 56, 1), rank) for rank in (1, 2, 4, 8, 16)]
RANKS += [((128, 0, 28, 28, 1), 4), ((128, 0, 14, 14, 1), 4), ((128, 0, 7, 7, 1), 4), ((128, 0, 56, 56, 16), 4)]


@dataclass
class Row:
    op: str
    batch: int
    D: int
    L: int
    N: int
    rank: int
    megabytes: float
    floor_us: float
    time_us: float
    floor_share: float
    official_us: float | None = None
    factor: float | None = None


class Failed(RuntimeError):
    """A kernel's numbers are wrong."""


def check(name, out, expected, tolerance):
    error = ((out.double() - expected).norm() / expected.norm()).item()
    if not error < tolerance:
        raise Failed(f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}")


def graph_time(calls) -> float:
    """Microseconds per call: the median replay of a CUDA graph that makes all `calls`, over their number."""
    for function in calls:
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in calls:
            function()
    times = []
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    del graph
    return statistics.median(times[3:]) / len(calls)


def run_full(inputs):
    u, delta, A, B, C, bias = inputs
    return ops.selective_scan(u, delta, A, B, C, None, None, bias, True, torch.float32)


def run_one(inputs, merge=True):
    u, delta, A, B, C, bias = inputs
    return ops.shared_scan2d(u, delta, A, B, C, bias, DIRECTIONS, None, True, merge, torch.float32)


def size(*tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def sets_for(bytes_moved: int, make):
    """Enough input sets that a round over them does not fit in the cache (at most 24)."""
    return [make() for _ in range(max(1, min(24, -(-(200 << 20) // bytes_moved))))]


class Bench:
    def __init__(self, dtype, official):
        self.dtype, self.official = dtype, official
        self.speed = copy_speed() / 1e6
        self.rows: list[Row] = []

    def add(self, op, shape, moved, time_us, official_us=None, rank=1):
        batch, D, height, width, states = shape
        floor = moved / self.speed
        factor = None if official_us is None else official_us / time_us
        self.rows.append(
            Row(
                *(op, batch, D, height * width, states, rank, moved / 1e6),
                *(floor, time_us, floor / time_us, official_us, factor),
            )
        )

    def official_full(self, inputs):
        u, delta, A, B, C, bias = inputs
        return self.official.fwd(u, delta, A, B, C, None, bias, True, 1, True)

    def full(self, shape):
        batch, D, height, width, states = shape
        inputs = full_inputs(batch, D, height * width, states, self.dtype)
        out = run_full(inputs)
        u, delta, A, B, C, bias = inputs
        for b in {0, batch - 1}:
            item = slice(b, b + 1)
            expected = full_reference(u[item], delta[item], A, B[item], C[item], bias)
            check(f"selective_scan {shape}", out[item], expected, TOLERANCE[self.dtype])
        moved = size(*inputs, out)
        del out
        copies = sets_for(moved, lambda: tuple(t.clone() for t in inputs))
        official = self.official and graph_time([lambda i=i: self.official_full(i) for i in copies])
        self.add("selective_scan", shape, moved, graph_time([lambda i=i: run_full(i) for i in copies]), official)

    def backward(self, shape):
        batch, D, height, width, states = shape
        u, delta, A, B, C, bias = full_inputs(batch, D, height * width, states, self.dtype)
        grad = torch.randn(u.shape, device="cuda")

        def ours():
            return torch.ops.vmeanba_fx.selective_scan_backward(grad, u, delta, A, B, C, None, None, bias, True)

        # The gradient of u alone, from its own adjoint scan, for one batch item.
        leaves = [t[:1].clone().double().requires_grad_() for t in (u, delta)]
        full_reference(leaves[0], leaves[1], A, B[:1], C[:1], bias).backward(grad[:1].double())
        gradients = ours()
        for name, got, leaf in zip(("du", "ddelta"), gradients, leaves, strict=False):
            tolerance = max(3e-5, TOLERANCE[self.dtype])
            check(f"selective_scan_backward {name} {shape}", got[:1], leaf.grad, tolerance)
        moved = size(grad, u, delta, A, B, C, *gradients)
        del gradients, leaves
        time_us = graph_time([ours])
        official = None
        if self.official:
            states_kept = self.official_full((u, delta, A, B, C, bias))[1]
            official = graph_time(
                [lambda: self.official.bwd(u, delta, A, B, C, None, bias, grad, states_kept, True, 1)]
            )
        self.add("selective_scan_backward", shape, moved, time_us, official)

    def one(self, shape, rank=1, merge=True):
        """The one-channel or rank-r scan; the official kernel runs the full scan with D channels (D = 0: not compared).

        Without `merge` every direction has its own u and output, as `fuse_shared` emits it.
        """
        batch, D, height, width, states = shape

        def make():
            return one_inputs(batch, height, width, states, self.dtype, rank, own=not merge)

        inputs = make()
        out = run_one(inputs, merge)
        u, delta, A, B, C, bias = inputs
        for b in {0, batch - 1}:
            item = slice(b, b + 1)
            merged = out[item] if merge else out[item].sum(1)
            expected = one_reference(u[item], delta[item], A, B[item], C[item], bias)
            check(f"shared_scan2d {shape} rank {rank}", merged, expected, TOLERANCE[self.dtype])
        moved = size(*inputs, out)
        copies = sets_for(moved, make)
        time_us = graph_time([lambda i=i: run_one(i, merge) for i in copies])
        del copies
        official = None
        if self.official and D:
            full = full_inputs(batch, D, height * width, states, self.dtype)
            official = graph_time([lambda: self.official_full(full)])
        self.add("shared_scan2d (merged)" if merge else "shared_scan2d", shape, moved, time_us, official, rank)

    def tail(self, shape):
        batch, D, height, width, _ = shape
        length = height * width
        y = torch.randn(batch, K, 1, length, device="cuda")
        u = torch.randn(batch, K * D, length, device="cuda", dtype=self.dtype)
        scale = torch.randn(K * D, device="cuda")
        out = ops.broadcast_add(y, u, scale)
        expected = y[:1].double().expand(-1, -1, D, -1).reshape(u[:1].shape) + scale.double()[:, None] * u[:1].double()
        check(f"broadcast_add {shape}", out[:1], expected, TOLERANCE[self.dtype])
        self.add("broadcast_add", shape, size(y, u, out), graph_time([lambda: ops.broadcast_add(y, u, scale)]))


def launch_overhead(dtype) -> str:
    """Host time of one call, and device time of one launch inside a graph, on a problem too small to matter."""
    inputs = one_inputs(1, 4, 4, 1, dtype)
    full = full_inputs(1, 1, 16, 1, dtype)
    lines = []
    for name, function in (
        ("shared_scan2d", lambda: run_one(inputs)),
        ("selective_scan", lambda: run_full(full)),
        ("torch.add", lambda: torch.add(inputs[0], 1)),
    ):
        for _ in range(50):
            function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(1000):
            function()
        host = (time.perf_counter() - start) * 1000
        torch.cuda.synchronize()
        lines.append(f"{name}: {host:.1f} us of host time a call, {graph_time([function] * 50):.1f} us in a graph")
    return "\n".join(lines)


def sweep(bench: Bench, stem: Path) -> None:
    """Time of the merged one-channel scan over length (batch 16) and batch (length 256), each 2^8 to 2^16."""
    rows = []
    for exponent in range(8, 17):
        width = 2 ** (exponent // 2)
        for name, shape in (
            ("length", (16, 0, 2**exponent // width, width, 1)),
            ("batch", (2**exponent, 0, 16, 16, 1)),
        ):
            bench.one(shape)
            row = bench.rows.pop()
            rows.append({"axis": name, "size": 2**exponent, "time_us": row.time_us, "floor_us": row.floor_us})
    write_csv(stem.parent / f"{stem.name}.csv", rows)
    table = [(r["axis"], r["size"], r["time_us"], r["floor_us"]) for r in sorted(rows, key=lambda r: r["axis"])]
    text = tabulate(table, ("axis", "size", "time us", "floor us"), floatfmt=".1f", tablefmt="github")
    (stem.parent / f"{stem.name}.md").write_text(f"{__doc__.splitlines()[0]}\n\n{text}\n")
    print(text)
    if importlib.util.find_spec("matplotlib"):
        plot(rows, stem.parent / f"{stem.name}.png")


def plot(rows, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for axis, name in zip(axes, ("length", "batch"), strict=True):
        own = [r for r in rows if r["axis"] == name]
        for key, label in (("time_us", "measured"), ("floor_us", "memory floor")):
            axis.loglog([int(r["size"]) for r in own], [float(r[key]) for r in own], "o-", base=2, label=label)
        axis.set_xlabel(name)
        axis.set_ylabel("microseconds")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write_csv(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--official", help="module of the official kernel, e.g. selective_scan_cuda_oflex")
    parser.add_argument("--path", help="folder to import that module from")
    parser.add_argument("--sweep", action="store_true", help="also time length and batch from 2^8 to 2^16")
    parser.add_argument("--plot", type=Path, metavar="CSV", help="draw a sweep's CSV, measure nothing")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder of the result files"
    )
    options = parser.parse_args()
    if options.plot:
        if not options.plot.is_file():
            parser.error(f"--plot {options.plot}: no such file")
        with options.plot.open(newline="") as file:
            plot(list(csv.DictReader(file)), options.plot.with_suffix(".png"))
        return 0
    need_gpu()
    if options.path:
        sys.path.insert(0, options.path)
    official = importlib.import_module(options.official) if options.official else None
    torch.manual_seed(0)
    bench = Bench(getattr(torch, options.dtype), official)
    try:
        for shape in FULL:
            bench.full(shape)
        for shape in BACKWARD:
            bench.backward(shape)
        for shape in ONE:
            bench.one(shape)
        for shape, rank in RANKS:
            bench.one(shape, rank, merge=False)
        for shape in FULL[1:3]:
            bench.tail(shape)
    except Failed as failure:
        print(f"The numbers are wrong, so there are no speeds. {failure}")
        return 1
    gpu = torch.cuda.get_device_name().replace(" ", "-")
    conditions = f"{gpu}_{torch.__version__.replace('+', '-')}_{options.dtype}"
    write_csv(options.out / f"kernels_{conditions}.csv", [asdict(row) for row in bench.rows])
    headers = ("op", "batch", "D", "L", "N", "rank", "MB", "floor us", "time us", "floor/time", "official us", "factor")
    table = tabulate([tuple(asdict(r).values()) for r in bench.rows], headers, floatfmt=".2f", tablefmt="github")
    speed = f"copy bandwidth {bench.speed / 1e6:.2f} TB/s"
    head = f"{gpu}, torch {torch.__version__}, {options.dtype} in, float32 out; {speed}"
    text = f"{head}\n\n{table}\n\n{launch_overhead(bench.dtype)}\n"
    (options.out / f"kernels_{conditions}.md").write_text(text)
    print(text)
    if options.sweep:
        sweep(bench, options.out / f"sweep_{conditions}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
