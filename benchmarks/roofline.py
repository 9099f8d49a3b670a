"""Where the time of a compiled model goes, kernel by kernel, beside what the card allows.

    python benchmarks/roofline.py --model vmamba_base_s1l20 --fractions 0 1 --batch 128 --out benchmarks/results

Kernels come from a profiler trace, those of one operator together. What each moves and computes: of matrix products and
convolutions from the sizes of their operands, of Inductor's own kernels from Inductor's count, of `ss2d` as ss2d.py counts it.
The floor of a kernel is the larger of its bytes at the speed of a device-to-device copy and of its operations at the speed of
a large square matrix product, both measured in the same run. A kernel whose operands are still in the cache can be faster than
its floor.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a process that has asked CUDA itself cannot be forked

import torch
from tabulate import tabulate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import ss2d
from benchmarks.end_to_end import LIMITS, PRECISIONS, Variant, allow_tf32, at_precision, build
from benchmarks.running import GraphReplay, Jobs, Turn, compiled_out_of_turn, need_gpu, relative, timed
from vmeanba_fx import models

BYTES = {"c10::Half": 2, "c10::BFloat16": 2, "float": 4, "double": 8, "long int": 8, "bool": 1}
HEAD = ("kernels", "calls", "ms", "GB", "TFLOP", "floor, ms", "floor / time")
FORMATS = ("", "", ".3f", ".2f", ".3f", ".3f", ".2f")


@dataclass
class Card:
    """What the card was measured to do: bytes and floating-point operations a second, and its clock in Hz."""

    copy: float
    product: float
    clock: float
    processors: int


@dataclass
class Kernel:
    """What one operator launched: its kind, seconds, bytes moved, operations, and seconds that it takes at least."""

    kind: str
    name: str
    seconds: float
    moved: float
    operations: float
    floor: float


def main() -> None:
    args = parse()
    need_gpu()
    jobs = Jobs(args.jobs)
    with tempfile.NamedTemporaryFile() as lock:
        for name in args.model:
            for v in at_precision(build(args, models, name), PRECISIONS[args.precision], [args.ours]):
                jobs.start(account, args, name, v, args.lock or lock.name)
        jobs.wait()


def account(args: argparse.Namespace, name: str, v: Variant, lock: str) -> None:
    """The page of one variant."""
    turn = Turn(lock)
    turn.take()
    card = measured_card(PRECISIONS[args.precision] or torch.float32)
    images = torch.randn(args.batch, 3, args.size, args.size).cuda()
    allow_tf32(False)
    with torch.inference_mode():
        expected = v.reference.cuda()(images)
        allow_tf32(True)
        # With ``benchmark_kernel`` Inductor notes how much each of its kernels moves.
        run = compiled_out_of_turn(v.model.cuda(), turn, {"benchmark_kernel": True}, fullgraph=True)
        if not relative(run(images).float(), expected) <= LIMITS[args.precision]:
            raise SystemExit(f"{name}, {v.label}: wrong numbers")
        ms = timed(run, images, args.seconds)[0]
        kernels = [*of_trace(trace(run, images), card)]
        graph = timed(GraphReplay(run), images, args.seconds)[0]
    turn.give()
    write(args, name, v, card, page(kernels, ms, graph))


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", nargs="+", default=["vmamba_tiny_s1l8"])
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--precision", choices=PRECISIONS, default="amp16")
    p.add_argument("--fractions", nargs="+", type=float, default=[0.0, 1.0], help="shares of sites replaced")
    p.add_argument("--ours", choices=("baked", "unrolled"), default="baked", help="as in end_to_end.py")
    p.add_argument("--seconds", type=float, default=1.0, help="timing budget of each variant")
    p.add_argument("--jobs", type=int, default=1, help="variants that are compiled beside each other")
    p.add_argument("--lock", help="file that several runs on one GPU share, so that they use it one at a time")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the tables")
    p.set_defaults(skip_official=True, official=None, rank=[])
    return p.parse_args()


def measured_card(dtype: torch.dtype) -> Card:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    allow_tf32(True)
    product = 2 * 8192**3 / ss2d.median_time(lambda x: x @ b, [a])
    return Card(ss2d.copy_speed(), product, ss2d.clock_hz(), torch.cuda.get_device_properties(0).multi_processor_count)


def trace(run: Any, images: Tensor) -> list[dict[str, Any]]:
    """The profiler's events of one forward."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as recorded:
        run(images)
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        recorded.export_chrome_trace(file.name)
        return json.loads(Path(file.name).read_text())["traceEvents"]


def of_trace(events: list[dict[str, Any]], card: Card) -> Iterator[Kernel]:
    """The kernels, each with the operator that launched it."""
    ops = [e for e in events if e.get("cat") == "cpu_op" and ("::" in e["name"] or e["name"].startswith("triton"))]
    outermost: dict[int, dict[str, Any] | None] = {}
    outer: dict[str, Any] | None = None
    end = -math.inf
    for op in sorted(ops, key=lambda e: (e["ts"], -e["dur"])):
        if op["ts"] >= end:
            end, outer = op["ts"] + op["dur"], op
        outermost[op["args"]["External id"]] = outer
    launched = defaultdict(list)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            launcher = outermost.get(event["args"].get("External id"))
            launched[id(launcher or event)].append((event["dur"] / 1e6, event["name"], launcher))
    for group in launched.values():
        _, name, launcher = max(group, key=lambda launch: launch[0])
        yield kernel(name, sum(seconds for seconds, *_ in group), launcher, card)


def kernel(name: str, seconds: float, op: dict[str, Any] | None, card: Card) -> Kernel:
    called, args = (op["name"], op["args"]) if op else ("", {})
    moved, operations, floor, of = 0.0, 0.0, 0.0, ""
    if called in ("aten::mm", "aten::addmm", "aten::bmm"):
        kind = "matrix products"
        first = 1 if called == "aten::addmm" else 0
        a, b = args["Input Dims"][first : first + 2]
        out = [*a[:-1], b[-1]]
        moved = sum(map(math.prod, (a, b, out))) * BYTES[args["Input type"][1]]
        operations, of = 2 * math.prod(out) * a[-1], f" {a} {b}"
    elif called == "aten::convolution":
        x, weight = args["Input Dims"][:2]
        stride, padding = (json.loads(args["Concrete Inputs"][i]) for i in (3, 4))
        sides = ((x[i + 2] + 2 * padding[i] - weight[i + 2]) // stride[i] + 1 for i in range(len(stride)))
        out = [x[0], weight[0], *sides]
        kind = "depthwise convolutions" if weight[1] == 1 else "other convolutions"
        moved = sum(map(math.prod, (x, weight, out))) * BYTES[args["Input type"][0]]
        operations, of = 2 * math.prod(out) * math.prod(weight[1:]), f" {x} {weight}"
    elif called.endswith("::ss2d"):
        kind = "ss2d"
        (batch, D, side, _), feats, (_, _, R), (_, N) = args["Input Dims"][:4]
        itemsize, of = BYTES[args["Input type"][0]], f" {args['Input Dims'][0]}"
        moved = itemsize * (2 * batch * D * side * side + math.prod(feats))
        floor = ss2d.floors(batch, D, side, R, N, itemsize, card.processors, card.clock, card.copy)[0]
    elif called.startswith("triton"):
        kind = next((k for k in ("layer_norm", "gelu") if k in called), "other") + " passes"
        moved = 1e9 * float(args.get("kernel_num_gb", 0))
    else:
        kind = "other"
    floor = max(floor, moved / card.copy, operations / card.product)
    return Kernel(kind, (called or name) + of, seconds, moved, operations, floor)


def page(kernels: list[Kernel], ms: float, graph: float) -> str:
    """The groups, and the ten kernels that are furthest above their floors; times in ms."""
    kinds, names = (grouped(kernels, of) for of in ("kind", "name"))
    busy = sum(k.seconds for k in kernels) * 1e3
    kinds = [*sorted(kinds, key=lambda row: -row[2]), line("all", kernels)]
    names = sorted(names, key=lambda row: row[5] - row[2])[:10]
    lines = [tabulate(rows, HEAD, tablefmt="github", floatfmt=FORMATS) for rows in (kinds, names)]
    times = f"A forward takes {ms:.2f} ms, {ms - busy:.2f} of it between kernels; replayed as a CUDA graph {graph:.2f} ms."
    return f"{lines[0]}\n\n{times} Furthest above their floors:\n\n{lines[1]}\n"


def grouped(kernels: list[Kernel], of: str) -> list[list[Any]]:
    groups = defaultdict(list)
    for k in kernels:
        groups[getattr(k, of)].append(k)
    return [line(name, group) for name, group in groups.items()]


def line(name: str, kernels: list[Kernel]) -> list[Any]:
    seconds, moved, operations, floor = (
        sum(getattr(k, of) for k in kernels) for of in ("seconds", "moved", "operations", "floor")
    )
    return [name, len(kernels), 1e3 * seconds, moved / 1e9, operations / 1e12, 1e3 * floor, floor / seconds]


def write(args: argparse.Namespace, name: str, v: Variant, card: Card, tables: str) -> None:
    gpu = torch.cuda.get_device_name().replace(" ", "-")
    of = f"{name}_{v.label.removeprefix('ours ').replace(', ', '_')}_{args.precision}_batch{args.batch}"
    heading = (
        f"{name}, {v.label}: batch {args.batch}, {args.size} px, {args.precision}, compiled by default; {gpu}, torch "
        f"{torch.__version__}: copy {card.copy / 1e12:.2f} TB/s, matrix product {card.product / 1e12:.0f} TFLOP/s."
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"roofline_{of}_{gpu}_torch{torch.__version__.split('+')[0]}.md").write_text(f"{heading}\n\n{tables}")
    print(f"{heading}\n\n{tables}", flush=True)


if __name__ == "__main__":
    main()
