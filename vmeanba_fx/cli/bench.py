"""bench: the model against its rewritten forms, its scans, and its kernels, on this machine.

Numbers are checked before anything is timed. Three parts: ``model`` end to end, ``kernels`` the scans alone, ``profile``
what one block spends its time in (the paper's Figure 1).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn
from torch.utils.benchmark import Timer

from ..calibration.calibrate import calibrate
from ..capturing.copies import device_of
from ..exporting.export import relative_error
from ..plan import Plan
from ..report import report
from ..sites import Site
from .arguments import CommandError, DataSpec, at_least, build_model
from .bench_kernels import kernel_rows, kernel_table
from .bench_profile import block_of, profile_plot, profile_rows, profile_table
from .commands import Outcome

_SCORED = 4
_PARTS = ("model", "kernels", "profile")
_HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_DTYPES = {"float32": torch.float32, **_HALF}
# Rounding of a whole network. On a GPU float32 convolutions run in TF32, and not the same ones before and after.
_TOLERANCE = {("cpu", torch.float32): 1e-4, ("cuda", torch.float32): 1e-2}


@dataclass(frozen=True)
class Row:
    """One timed form of the model. ``k`` is None for the model as given; ``flops``: of all its scans, per image."""

    name: str
    k: int | None
    milliseconds: float
    spread: float
    images_per_second: float
    speedup: float
    flops: int


def add_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--data", type=DataSpec.parse, help="the first batch of it is run (default: random images)")
    sub.add_argument("--batch", type=at_least(1), help="batch size (default: 8 on a GPU, 1 on the CPU)")
    sub.add_argument("--dtype", choices=sorted(_DTYPES), default="float32", help="default: float32")
    sub.add_argument("--autocast", choices=sorted(_HALF), help="time everything under torch.autocast to this dtype")
    sub.add_argument("--compile", action="store_true", help="time torch.compile(model) throughout")
    sub.add_argument("-k", type=at_least(0), nargs="+", help="how many sites to replace (default: 0, half, all)")
    sub.add_argument("--plan", metavar="PLAN.json", help=f"rank sites by it (default: by KL on {_SCORED} of the images)")
    sub.add_argument("--parts", choices=_PARTS, nargs="+", default=list(_PARTS), help="what to time (default: all)")
    sub.add_argument("--block", metavar="PATH", help="module to profile (default: the block of the first scan)")
    sub.add_argument("--out", metavar="FOLDER", help="save JSON, CSV, the text, and a plot if matplotlib is there")
    sub.add_argument("--min-time", type=float, default=1.0, metavar="S", help="seconds to time each form (default: 1)")


def bench(args: argparse.Namespace) -> Outcome:
    """Time the model and, for every k, its rewritten form; its scans; the kernels of a block.

    Raises:
        CommandError: the graph with k = 0 computes something else than the model, compiling changes an output, or a
            scan is wrong.
        GraphCheckError: an exact pass changed an output.
    """
    out = None if args.out is None else Path(args.out)
    if out is not None and out.exists() and not out.is_dir():
        raise CommandError(f"--out {out}: is not a folder")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # nobody wants to hear of it after the measuring
    model = build_model(args.model, args.weights, seed=args.seed, device=args.device).to(_DTYPES[args.dtype])
    device = device_of(model)
    args.batch = args.batch or (8 if device.type == "cuda" else 1)
    images = _images(args, model).to(device)
    scans_wanted = args.block is None or any(part != "profile" for part in args.parts)
    sites, graphs = _graphs(args, model, images) if scans_wanted else ([], {})
    where = _environment(args, device, images)
    title = _title(where)
    data: dict[str, Any] = {"environment": where}
    texts = [title]
    block = args.block if args.block is not None else block_of(sites[0])
    plotted: list[Any] = []
    compute = _HALF.get(args.autocast, images.dtype)
    with torch.no_grad(), torch.autocast(device.type, compute, enabled=args.autocast is not None):
        if "model" in args.parts:
            tolerance = _TOLERANCE.get((device.type, compute), 5e-2)
            data["rows"] = rows = _model_rows(args, model, graphs, images, tolerance)
            texts.append(_text(rows))
        if "kernels" in args.parts:
            data["kernels"] = found = kernel_rows(sites, len(images), compute, device, args.min_time / 10)
            texts.append(kernel_table(found))
        if "profile" in args.parts:
            data["block"], data["profile"] = block, (plotted := profile_rows(model, images, block))
            texts.append(profile_table(plotted, block))
    data = {name: [asdict(r) for r in part] if isinstance(part, list) else part for name, part in data.items()}
    text = "\n\n".join(texts)
    if out is not None:
        stem = _save(out, where, data, text)
        if plotted:
            profile_plot(plotted, title, out / f"{stem}_profile.png")
        text += f"\n\nsaved as {out / stem}.*"
    return Outcome(text, data)


def _model_rows(
    args: argparse.Namespace, model: nn.Module, graphs: dict[int, fx.GraphModule], images: Tensor, tolerance: float
) -> list[Row]:
    forms: list[tuple[str, int | None, Callable[[Tensor], Any]]] = [("original", None, model)]
    forms += [(f"k = {k}", k, gm) for k, gm in graphs.items()]
    plain = next(iter(graphs.values()))
    if 0 in graphs:
        _compare(graphs[0](images), model(images), tolerance, "the graph with k = 0")
    rows: list[Row] = []
    for name, k, form in forms:
        run = torch.compile(form, fullgraph=k is not None) if args.compile else form
        if args.compile:
            _compare(run(images), form(images), tolerance, f"{name}, compiled,")
        run(images)
        threads = torch.get_num_threads()
        timing = Timer("run(images)", globals={"run": run, "images": images}, num_threads=threads)
        measured = timing.blocked_autorange(min_run_time=args.min_time)
        found = report(plain if k is None else graphs[k])
        median, spread = 1e3 * measured.median, 1e3 * measured.iqr
        speedup = rows[0].milliseconds / median if rows else 1.0
        flops = found.flops_before if k is None else found.flops_after
        rows.append(Row(name, k, median, spread, 1e3 * len(images) / median, speedup, flops))
    return rows


def _images(args: argparse.Namespace, model: nn.Module) -> Tensor:
    if args.data is None:
        channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
        size = args.size or 224
        shape = (args.batch, channels, size, size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(args.seed)).to(_DTYPES[args.dtype])
    loader = args.data.loader(batch=args.batch, size=args.size, seed=args.seed, batches=1, like=model)
    first = next(iter(loader))
    images = first if isinstance(first, Tensor) else first[0]
    return images[torch.arange(args.batch) % len(images)]


def _graphs(
    args: argparse.Namespace, model: nn.Module, images: Tensor
) -> tuple[list[Site], dict[int, fx.GraphModule]]:
    """The sites, and the rewritten graph for every k. ``verify`` proves the exact passes on the way."""
    if "model" not in args.parts:
        return list(calibrate(model, [images], score_sites=False).sites), {}
    if args.plan is not None:
        plan, applied_to = Plan.load(args.plan), {"model": model}
    else:
        plan, applied_to = calibrate(model, [images[:_SCORED]], metric="kl", held_out=False, seed=args.seed), {}
    n = len(plan.sites)
    wanted = sorted(set(args.k if args.k is not None else (0, n // 2, n)))
    return list(plan.sites), {k: plan.apply(k, verify=True, **applied_to) for k in wanted}


def _compare(found: Any, expected: Any, tolerance: float, what: str) -> None:
    pairs = zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True)
    for f, e in pairs:
        if isinstance(e, Tensor) and e.is_floating_point():
            error = relative_error(f, e)
            if not error <= tolerance:
                raise CommandError(
                    f"{what} is off by {error:.1e} (relative; allowed {tolerance:.0e}): nothing was timed"
                )


def _environment(args: argparse.Namespace, device: torch.device, images: Tensor) -> dict[str, Any]:
    gpu = device.type == "cuda"
    return {
        "model": args.model.text, "input": list(images.shape), "dtype": args.dtype, "autocast": args.autocast,
        "compiled": args.compile, "device": torch.cuda.get_device_name(device) if gpu else _cpu(),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def _cpu() -> str:
    """The processor's name; Python itself does not know it on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _title(where: dict[str, Any]) -> str:
    how = f" under {where['autocast']} autocast" if where["autocast"] else ""
    how += ", torch.compile" if where["compiled"] else ""
    return (
        f"{where['model']}, input {'x'.join(map(str, where['input']))} {where['dtype']}{how}; {where['device']}, "
        f"{where['threads']} threads, torch {where['torch']}, {where['date']}"
    )


def _text(rows: list[Row]) -> str:
    return tabulate(
        [
            [r.name, f"{r.milliseconds:.2f}", f"{r.spread:.2f}", f"{r.images_per_second:.1f}", f"{r.speedup:.2f}x",
             f"{r.flops / 1e6:.2f}"]
            for r in rows
        ],
        ["form", "ms (median)", "iqr", "images/s", "speed-up", "scan MFLOPs per image"],
        disable_numparse=True, colalign=("left", *["right"] * 5),
    )  # fmt: skip


def _save(folder: Path, where: dict[str, Any], data: dict[str, Any], text: str) -> str:
    """Write the JSON, the text and one CSV per part; the start of their names, which holds the conditions."""
    dtype = where["autocast"] or where["dtype"]
    named = (where["model"].rpartition("/")[2], where["device"], f"torch{where['torch']}", dtype, f"batch{where['input'][0]}")
    stem = "_".join(["bench", *(re.sub(r"[^\w.]+", "-", name).strip("-") for name in named)])
    (folder / f"{stem}.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / f"{stem}.txt").write_text(text + "\n")
    for part in ("rows", "kernels", "profile"):
        if data.get(part):
            with (folder / f"{stem}_{'model' if part == 'rows' else part}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, data[part][0].keys())
                writer.writeheader()
                writer.writerows(data[part])
    return stem
