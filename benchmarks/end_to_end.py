"""Whole models on a GPU: the official VMamba against the same weights rewritten, eager, compiled and as CUDA graphs.

Numbers are checked first; a variant whose outputs are wrong is reported as wrong and not timed. Times are medians of CUDA
events; memory is the peak that the forward allocates beyond the weights, of CUDA graphs what they reserve.

    python benchmarks/end_to_end.py --official vmamba.py --scan-extension selective_scan_cuda_oflex.so \\
        --model vmamba_tiny_s1l8 --batch 128 --precision amp16 --compile --out benchmarks/results

Without ``--official`` the baseline is this package's own VMamba, whose outputs equal the official ones.

Most of the time goes into compiling. With ``--jobs N`` that many variants build and compile beside each other and use the card
one at a time, as do several runs with the same ``--lock FILE``; each row replaces its predecessor in the table.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import csv
import fcntl
import json
import os
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a process that has asked CUDA itself cannot be forked

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vmeanba_fx
from benchmarks.official import load_official, scan_as_op
from benchmarks.running import (
    GraphReplay,
    Jobs,
    Turn,
    compiled_out_of_turn,
    need_gpu,
    relative,
    reserved,
    slowest_kernels,
    timed,
)
from tests.helpers import make_scan_matter
from vmeanba_fx import models

PRECISIONS = {"fp32": None, "amp16": torch.float16, "ampbf16": torch.bfloat16}
# Error of a whole network against the same function in fp32 without TF32, relative in the 2-norm. The rounding step of
# bfloat16 is 8 times that of float16.
LIMITS = {"fp32": 1e-2, "amp16": 2e-2, "ampbf16": 16e-2}
FIELDS = ("model", "precision", "batch", "variant", "mode", "ms", "images/s", "peak MiB", "error")
FORMATS = ("", "", "", "", "", ".2f", ".0f", ".0f", ".1e")


def main() -> None:
    args = parse()
    need_gpu()
    module = load_official(args.official, args.scan_extension) if args.official else models
    jobs = Jobs(args.jobs)
    with tempfile.NamedTemporaryFile() as lock:
        args.lock = args.lock or (lock.name if args.jobs > 1 else None)
        for name in args.model:
            variants = build(args, module, name)
            for precision in args.precision:
                for v in at_precision(variants, PRECISIONS[precision], args.ours):
                    for batch in args.batch:
                        jobs.start(work, args, module, v, {"model": name, "precision": precision, "batch": batch})
        jobs.wait()


def work(args: argparse.Namespace, module: types.ModuleType, v: Variant, of: dict[str, Any]) -> None:
    """One row after the other, so that a run that is cut short has written what it measured."""
    for row in measure(args, module, v, of):
        print(json.dumps(row), flush=True)
        if args.out:
            write(row, Path(args.out), args.tag)


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--official", help="path of the official vmamba.py")
    p.add_argument("--scan-extension", help="path of the official selective_scan_cuda_oflex shared object")
    p.add_argument("--model", nargs="+", default=["vmamba_tiny_s1l8"])
    p.add_argument("--batch", nargs="+", type=int, default=[128])
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["amp16"])
    p.add_argument("--fractions", nargs="*", type=float, default=[0.0, 0.25, 0.5, 1.0], help="shares of sites replaced")
    p.add_argument("--compile", action="store_true", help="time torch.compile as well")
    p.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE",
                   help="options of torch.compile, for the official model and for ours")  # fmt: skip
    p.add_argument("--graph", action="store_true", help="time the replay of each as a CUDA graph as well")
    p.add_argument("--ours", nargs="+", choices=("autocast", "baked", "half", "unrolled"), default=["baked"],
                   help="how our graphs run in 16 bits: under autocast, with it baked in, or all in half; unrolled: baked in, "
                        "and depthwise convolutions as sums, for compilers")  # fmt: skip
    p.add_argument("--rank", nargs="*", type=int, default=[], help="replace sites by a scan of this rank as well")
    p.add_argument("--skip-official", action="store_true")
    p.add_argument("--skip-official-compile", action="store_true")
    p.add_argument("--skip-eager", action="store_true")
    p.add_argument("--seconds", type=float, default=1.0, help="timing budget of each variant")
    p.add_argument("--jobs", type=int, default=1, help="variants that are built and compiled beside each other")
    p.add_argument("--lock", help="file that several runs on one GPU share, so that they use it one at a time")
    p.add_argument("--profile", action="store_true", help="print the ten slowest kernels of every timed variant")
    p.add_argument("--out", help="folder of the table (CSV and Markdown)")
    p.add_argument("--tag", default="", help="added to the file names")
    return p.parse_args()


@dataclass
class Variant:
    """A model to time; ``reference`` is the same function in fp32, ``dtype`` what the model takes."""

    label: str
    model: nn.Module
    reference: nn.Module
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    ours: bool = True


def measure(args: argparse.Namespace, module: types.ModuleType, v: Variant, of: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a variant: ``of``, with the mode and what was measured."""
    dtype, turn = PRECISIONS[of["precision"]] or torch.float16, Turn(args.lock)
    turn.take()
    images = torch.randn(of["batch"], 3, args.size, args.size).cuda()
    allow_tf32(False)
    with torch.inference_mode():
        expected = v.reference.cuda()(images)
    allow_tf32(True)
    v.model.cuda()
    for mode, run in modes(args, v, module, turn):
        # A cache of cast weights must not be filled in a graph's capture; compiled models have none.
        autocast = torch.autocast("cuda", dtype, v.autocast, cache_enabled=mode == "eager")
        row = of | {"variant": v.label, "mode": mode}
        try:
            with torch.inference_mode(), autocast:
                row |= one_row(args, run, images.to(v.dtype), expected, LIMITS[of["precision"]], "graph" in mode)
        except RuntimeError as error:
            row["images/s"] = f"failed: {str(error).splitlines()[0][:60]}"
        turn.give()
        yield row


def build(args: argparse.Namespace, module: types.ModuleType, name: str) -> list[Variant]:
    """The variants in fp32, on the CPU: another run may have its turn on the card."""
    torch.manual_seed(0)
    own = make_scan_matter(getattr(models, name)()).eval()
    baseline = getattr(module, name)().eval()
    baseline.load_state_dict(own.state_dict())
    official = Variant("official" if args.official else "own model", baseline, baseline, ours=False)
    variants = [] if args.skip_official else [official]
    if not args.fractions:
        return variants
    own = vmeanba_fx.capture(own, (torch.randn(2, 3, args.size, args.size),))
    for reduction in [{"reduce": "mean"}, *({"reduce": "rank", "rank": r} for r in args.rank)]:
        # The ranking needs no data here: sites are replaced from the last backwards, as deep sites matter least.
        plan = vmeanba_fx.calibrate(own, [torch.randn(2, 3, args.size, args.size)], score_sites=False, **reduction)
        sites = [s.name for s in plan.sites]
        for fraction in args.fractions:
            k = round(fraction * len(sites))
            if not k and "rank" in reduction:
                continue
            gm = plan.apply(sites=sites[len(sites) - k :]) if k else plan.apply(0)
            label = f"ours k={k}" + (f" rank {reduction['rank']}" if "rank" in reduction else "")
            variants.append(Variant(label, gm, gm if k else baseline))
    return variants


def at_precision(variants: list[Variant], dtype: torch.dtype | None, ours: list[str]) -> Iterator[Variant]:
    """The variants as they run at a precision; None: in fp32."""
    for v in variants:
        if dtype is None or not isinstance(v.model, fx.GraphModule):
            yield replace(v, autocast=dtype is not None)
            continue
        if "autocast" in ours:
            yield replace(v, autocast=True)
        baked = vmeanba_fx.bake_autocast(v.model, dtype)
        if "baked" in ours:
            yield replace(v, label=f"{v.label}, baked", model=baked)
        if "unrolled" in ours:
            yield replace(v, label=f"{v.label}, baked, unrolled", model=vmeanba_fx.unroll_depthwise(baked))
        if "half" in ours:
            yield replace(v, label=f"{v.label}, half", model=copy.deepcopy(v.model).to(dtype), dtype=dtype)


def allow_tf32(allowed: bool) -> None:
    """What is timed may use TF32; what it is compared with may not."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def one_row(
    args: argparse.Namespace, run: Callable[[Tensor], Tensor], images: Tensor, expected: Tensor, limit: float, graph: bool
) -> dict[str, Any]:
    """Check, then time."""
    before = reserved()
    error = relative(run(images).float(), expected)
    if not error <= limit:
        return {"error": error, "ms": float("nan"), "images/s": "WRONG NUMBERS"}
    ms, peak = timed(run, images, args.seconds)
    if args.profile:
        print(slowest_kernels(run, images), flush=True)
    # A CUDA graph allocates nothing when it runs: it keeps what it reserved when it was captured.
    peak = reserved() - before if graph else peak
    return {"error": error, "ms": ms, "images/s": f"{1e3 * len(images) / ms:.0f}", "peak MiB": peak}


def modes(
    args: argparse.Namespace, v: Variant, module: types.ModuleType, turn: Turn
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The ways to run a variant; with ``--graph`` each is timed replayed as a CUDA graph as well.

    Each has the turn on the card when it runs there. What is compiled takes it once it is compiled, before its first kernel
    runs: inductor times configurations of a kernel on its first run.
    """
    if not args.skip_eager:
        turn.take()
        yield "eager", v.model
        if args.graph:
            turn.take()
            yield "eager, CUDA graph", GraphReplay(v.model)
    turn.give()
    if not args.compile or (args.skip_official_compile and not v.ours):
        return
    options = {name: ast.literal_eval(value) for name, value in (o.split("=") for o in args.options)}
    with scan_as_op(module) if args.official and not v.ours else contextlib.nullcontext():
        mode = ", ".join(["compiled", *args.options])
        compiled = compiled_out_of_turn(v.model, turn, options, fullgraph=v.ours)
        yield mode, compiled
        if args.graph:
            turn.take()
            yield f"{mode}, CUDA graph", GraphReplay(compiled)
        torch._dynamo.reset()


def write(row: dict[str, Any], folder: Path, tag: str) -> None:
    """Put a row into the table of this card and version, in the place of its predecessor if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name().replace(" ", "-")
    stem = f"end_to_end_{gpu}_torch{torch.__version__.split('+')[0]}{'_' + tag if tag else ''}"
    with open(folder / f"{stem}.csv", "a+", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        rows = {key(old): old for old in [*csv.DictReader(file), row]}
        file.truncate(0)
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows[k] for k in sorted(rows))
        shown = [[rows[k].get(f, "") for f in FIELDS] for k in sorted(rows)]
        page = folder / f"{stem}.md"
        about = page.read_text().partition("| model")[0] if page.exists() else ""  # written by hand
        page.write_text(about + tabulate(shown, FIELDS, tablefmt="github", floatfmt=FORMATS) + "\n")


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is of, in the order of the table."""
    k = re.search(r"k=(\d+)", row["variant"])
    of = row["model"], list(PRECISIONS).index(row["precision"]), -int(row["batch"]), row["mode"]
    return *of, int(k[1]) if k else -1, row["variant"]


if __name__ == "__main__":
    main()
