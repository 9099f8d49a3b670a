"""Whole models on a GPU: the official VMamba against the same weights rewritten, eager, compiled and as CUDA graphs.

Numbers are checked first; a variant whose outputs are wrong is reported as wrong and not timed. Times are medians of CUDA
events; memory is the peak that the forward allocates beyond the weights.

    python benchmarks/end_to_end.py --official vmamba.py --scan-extension selective_scan_cuda_oflex.so \\
        --model vmamba_tiny_s1l8 --batch 128 --precision amp16 --compile --out benchmarks/results

Without ``--official`` the baseline is this package's own VMamba, whose outputs equal the official ones.

Most of the time goes into compiling. Several runs, with a part of the variants each, can share a card and a table: with
``--lock FILE`` they build and compile beside each other and use the card one at a time; each row replaces its predecessor in
the table.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import csv
import fcntl
import importlib.util
import json
import os
import re
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vmeanba_fx
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
    for name in args.model:
        for precision in args.precision:
            for row in measure(args, name, precision):
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
    p.add_argument("--ours", nargs="+", choices=("autocast", "baked", "half"), default=["baked"],
                   help="how our graphs run in 16 bits: under autocast, with it baked in, or all in half")  # fmt: skip
    p.add_argument("--rank", nargs="*", type=int, default=[], help="replace sites by a scan of this rank as well")
    p.add_argument("--skip-official", action="store_true")
    p.add_argument("--skip-official-compile", action="store_true")
    p.add_argument("--skip-eager", action="store_true")
    p.add_argument("--seconds", type=float, default=1.0, help="timing budget of each variant")
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


class Turn:
    """Whose turn it is on the card, where several runs share it: one holds a lock on a file, and goes before on the CPU too."""

    def __init__(self, path: str | None) -> None:
        self.file = open(path, "w") if path else None

    def take(self) -> None:
        if self.file:
            fcntl.flock(self.file, fcntl.LOCK_EX)
            self._priority(-10)

    def give(self) -> None:
        if self.file:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self._priority(0)
            fcntl.flock(self.file, fcntl.LOCK_UN)

    def _priority(self, nice: int) -> None:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, nice)


def measure(args: argparse.Namespace, name: str, precision: str) -> Iterator[dict[str, Any]]:
    """One row after the other, so that a run that is cut short has written what it measured."""
    dtype = PRECISIONS[precision]
    module = load_official(args.official, args.scan_extension) if args.official else models
    variants = build(args, module, name, dtype)
    turn = Turn(args.lock)
    for batch in args.batch:
        for v in variants:
            turn.take()
            images = torch.randn(batch, 3, args.size, args.size).cuda()
            allow_tf32(False)
            with torch.inference_mode():
                expected = v.reference.cuda()(images)
            allow_tf32(True)
            v.model.cuda()
            for mode, run in modes(args, v, module, turn):
                # A cache of cast weights must not be filled in a graph's capture; compiled models have none.
                autocast = torch.autocast("cuda", dtype or torch.float16, v.autocast, cache_enabled=mode == "eager")
                row = {"model": name, "precision": precision, "batch": batch, "variant": v.label, "mode": mode}
                try:
                    with torch.inference_mode(), autocast:
                        row |= one_row(args, run, images.to(v.dtype), expected, LIMITS[precision])
                except RuntimeError as error:
                    row["images/s"] = f"failed: {str(error).splitlines()[0][:60]}"
                turn.give()
                yield row


def build(args: argparse.Namespace, module: types.ModuleType, name: str, dtype: torch.dtype | None) -> list[Variant]:
    """The variants, on the CPU: another run may have its turn on the card."""
    torch.manual_seed(0)
    own = make_scan_matter(getattr(models, name)()).eval()
    baseline = getattr(module, name)().eval()
    baseline.load_state_dict(own.state_dict())
    half = dtype is not None
    official = Variant("official" if args.official else "own model", baseline, baseline, autocast=half, ours=False)
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
            reference = gm if k else baseline
            label = f"ours k={k}" + (f" rank {reduction['rank']}" if "rank" in reduction else "")
            if not half or "autocast" in args.ours:
                variants.append(Variant(label, gm, reference, autocast=half))
            if half and "baked" in args.ours:
                variants.append(Variant(f"{label}, baked", vmeanba_fx.bake_autocast(gm, dtype), reference))
            if half and "half" in args.ours:
                variants.append(Variant(f"{label}, half", copy.deepcopy(gm).to(dtype), reference, dtype))
    return variants


def allow_tf32(allowed: bool) -> None:
    """What is timed may use TF32; what it is compared with may not."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def one_row(
    args: argparse.Namespace, run: Callable[[Tensor], Tensor], images: Tensor, expected: Tensor, limit: float
) -> dict[str, Any]:
    """Check, then time."""
    error = relative(run(images).float(), expected)
    if not error <= limit:
        return {"error": error, "ms": float("nan"), "images/s": "WRONG NUMBERS"}
    ms, peak = timed(run, images, args.seconds)
    if args.profile:
        print(slowest_kernels(run, images), flush=True)
    row = {"error": error, "ms": ms, "images/s": f"{1e3 * len(images) / ms:.0f}"}
    # A graph has allocated everything beforehand.
    return row if isinstance(run, GraphReplay) else row | {"peak MiB": peak}


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


def compiled_out_of_turn(
    model: nn.Module, turn: Turn, options: dict[str, Any] | None = None, fullgraph: bool = False
) -> Callable[..., Any]:
    """``torch.compile`` that leaves the card to other runs while inductor works, and has the turn from then on."""

    def inductor(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        turn.give()
        compiled = compile_fx(gm, inputs, config_patches=options)
        turn.take()
        return compiled

    return torch.compile(model, backend=inductor, fullgraph=fullgraph, dynamic=False)


class GraphReplay:
    """A model captured as one CUDA graph on one input."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self.model = model
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if self.graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.model(images)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = self.model(images)
        self.graph.replay()
        return self.out


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def timed(run: Callable[[Tensor], Tensor], images: Tensor, seconds: float) -> tuple[float, float]:
    """(median ms, peak MiB beyond what was allocated before)."""
    for _ in range(3):
        run(images)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 10:
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        run(images)
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return sorted(times)[len(times) // 2], peak


def slowest_kernels(run: Callable[[Tensor], Tensor], images: Tensor) -> str:
    """Table of the kernels of one forward by their share of GPU time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(images)
        torch.cuda.synchronize()
    kernels = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels)
    rows = [[e.key[:80], e.count, e.self_device_time_total / 1e3, e.self_device_time_total / total] for e in kernels[:10]]
    return tabulate([*rows, ["all", "", total / 1e3, 1.0]], ["kernel", "calls", "ms", "share"], floatfmt=".3f")


def load_official(path: str, extension: str | None) -> types.ModuleType:
    """The official file with its own CUDA scan; timm and fvcore, needed for training and counting, are stand-ins."""
    if "official_vmamba" in sys.modules:
        return sys.modules["official_vmamba"]
    stand_ins = {n: types.ModuleType(n) for n in ("timm", "timm.models", "timm.models.layers", "fvcore", "fvcore.nn")}
    stand_ins["timm.models"].register_model = lambda f: f
    stand_ins["timm.models.layers"].DropPath = type("DropPath", (nn.Identity,), {"__init__": _drop_path})
    stand_ins["timm.models.layers"].trunc_normal_ = nn.init.trunc_normal_
    for n in ("FlopCountAnalysis", "flop_count_str", "flop_count", "parameter_count"):
        setattr(stand_ins["fvcore.nn"], n, None)
    import triton  # noqa: F401  before the patch, which forgets every module imported while it lasts

    with mock.patch.dict(sys.modules, stand_ins):
        spec = importlib.util.spec_from_file_location("official_vmamba", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    sys.modules["official_vmamba"] = module
    if extension:
        spec = importlib.util.spec_from_file_location("selective_scan_cuda_oflex", extension)
        scan = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(scan)
        module.selective_scan_cuda_oflex = scan

        def fast(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, oflex=True, backend=None):
            return module.SelectiveScanCuda.apply(u, delta, A, B, C, D, delta_bias, delta_softplus, oflex, "oflex")

        module.selective_scan_fn = fast
    return module


def _drop_path(self: nn.Module, drop_prob: float = 0.0) -> None:
    nn.Identity.__init__(self)
    self.drop_prob = drop_prob


@contextlib.contextmanager
def scan_as_op(module: types.ModuleType) -> Iterator[None]:
    """The official module with its CUDA scan as one registered op, as its compiled baseline needs it."""
    if not hasattr(torch.ops, "official_scan") or not hasattr(torch.ops.official_scan, "fwd"):
        scan = module.selective_scan_cuda_oflex

        @torch.library.custom_op("official_scan::fwd", mutates_args=())
        def fwd(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
            return scan.fwd(u, delta, A, B, C, D, bias, True, 1, True)[0]

        @fwd.register_fake
        def _(u, delta, A, B, C, D, bias):
            return torch.empty_like(u, dtype=torch.float32)

    def as_op(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, oflex=True, backend=None):
        return torch.ops.official_scan.fwd(u, delta, A, B, C, D, delta_bias)

    # Raw Triton launches inside autograd.Function break the graph.
    with mock.patch.multiple(module, selective_scan_fn=as_op, WITH_TRITON=False):
        yield


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
