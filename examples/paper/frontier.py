"""Speed against accuracy: time on a GPU of every variant, joined with the drops that curves.py measured.

    python examples/paper/frontier.py --device cuda --official vmamba.py --scan-extension selective_scan_cuda_oflex.so
    python examples/paper/frontier.py --plot-only

Times are in fp16 (autocast, baked into our graphs), eager and as one CUDA graph, which is what is left where launches cost
nothing; with `--compile` of compiled models. The baseline is the official file with its own CUDA scan; without `--official`,
this package's VMamba as it is. "lossy pass alone" leaves the exact passes out, as the paper's authors do, who average the
inputs of the scan where they go for speed. Refitting changes weights, not time. `vmamba_tiny_s1l8` has random weights and
thus no accuracy: it shows what a rank costs at full size.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import SHORT, TASKS, VARIANTS, pick
from curves import collected
from results import ROOT, drawn, legend_below, panels, parser, read_csv, show_points_lost, write_csv, write_tables
from torch import Tensor, nn

import vmeanba_fx
from vmeanba_fx import models
from vmeanba_fx.models import factories
from vmeanba_fx.timing import timed as timed_on_cpu

sys.path.insert(0, str(ROOT))  # for benchmarks, and the tests that they use
from benchmarks.end_to_end import LIMITS
from benchmarks.official import load_official, scan_as_op
from benchmarks.running import GraphReplay, Turn, compiled_out_of_turn, relative, timed
from tests.helpers import make_scan_matter

FULL_SIZE = "vmamba_tiny_s1l8"
REDUCTIONS = ("mean", "rank1", "rank2", "rank4", "rank16")
ALL, ALONE = "all passes", "lossy pass alone"
# Of several modes that were timed, the first is drawn.
MODES = ("compiled, CUDA graph", "CUDA graph", "eager")
DRAWN = ("mean", "mean_refit", "rank1_refit", "rank4_refit", "rank16_refit", "best")
DRAWN_ALONE = ("mean", "rank4_refit")
# Published on other data: (speed-up, points lost at most).
PUBLISHED = {"QuarterMap": (1.11, 0.9), "VMeanba": (1.12, 3.0)}


# -- times ------------------------------------------------------------------------------------------------------------


def times(
    model: nn.Module, images: Tensor, expected: Tensor | None, compiled: bool, amp: bool, official: Any, turn: Turn
) -> Iterator[dict[str, Any]]:
    """Rows of mode and milliseconds. ``expected``: outputs, where the function is the same; wrong ones are not timed.

    amp: run under autocast; our rewritten graphs hold its casts. official: the official module, where ``model`` is its.
    turn: whose it is on the card, where several runs share it.
    """
    if not images.is_cuda:
        yield {"mode": "eager", "ms": round(1e3 * statistics.median(timed_on_cpu([model], (images,), {})[0]), 4)}
        return

    def measured(mode: str, run: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        autocast = torch.autocast("cuda", torch.float16, enabled=amp, cache_enabled=False)
        try:
            with torch.inference_mode(), autocast:
                error = 0.0 if expected is None else relative(run(images).float(), expected)
                ms = round(timed(run, images, 0.3)[0], 4) if error <= LIMITS["amp16"] else f"wrong outputs ({error:.1e})"
        except RuntimeError as error:
            ms = f"failed: {str(error).splitlines()[0][:60]}"
        return {"mode": mode, "ms": ms}

    turn.take()
    yield measured("eager", model)
    yield measured("CUDA graph", GraphReplay(model))
    if compiled:
        turn.give()
        with scan_as_op(official) if official else contextlib.nullcontext():
            yield measured("compiled, CUDA graph", GraphReplay(compiled_out_of_turn(model, turn)))
        torch._dynamo.reset()
    turn.give()


def measure(name: str, build: Callable[[], nn.Module], data: list, images: Tensor, ks: list[int] | None, args) -> None:
    """Times a model and its forms, and writes as it goes. ``data``: batches that choose the sites; without labels, the last."""
    path = args.out / "frontier" / f"{name}{args.tag}.csv"
    rows: list[dict[str, Any]] = []
    until, turn = time.perf_counter() + args.seconds, Turn(args.lock)

    def add(variant: str, k: int, passes: str, model: nn.Module, expected: Tensor | None, official: Any = None) -> None:
        whole = passes == ALL
        if whole and images.is_cuda and isinstance(model, torch.fx.GraphModule):
            model = vmeanba_fx.bake_autocast(model, torch.float16)
        for row in times(model, images, expected, args.compile and (whole or not rows), not whole, official, turn):
            rows.append({"task": name, "variant": variant, "k": k, "passes": passes} | row)
            print(rows[-1], flush=True)
            write_csv(path, rows)

    turn.take()
    model = build().eval().to(images.device)
    with torch.inference_mode(), torch.autocast("cuda", torch.float16, enabled=images.is_cuda):
        expected = model(images).float()
    if args.official:
        module = load_official(args.official, args.scan_extension)
        with mock.patch.object(factories, "VSSM", module.VSSM):
            baseline = build_like(name).eval().to(images.device)
        baseline.load_state_dict(model.state_dict())
        add("official", 0, "", baseline, expected, module)
    graph = vmeanba_fx.capture(model, (data[0][0][:2],))
    add("captured, no pass", 0, "", graph, expected)
    scored = len(data[0]) > 1
    turn.take()
    # Of the ways to take the mean the fastest, for where it is run literally; behind a LayerNorm the outputs are the same.
    cheaper = vmeanba_fx.calibrate(graph, data, mean="input", score_sites=False)
    for reduction in args.reductions:
        rank = reduction.removeprefix("rank")
        options: dict[str, Any] = {} if reduction == "mean" else {"reduce": "rank", "rank": int(rank)}
        metric = "loss" if scored else "kl"
        turn.take()
        plan = vmeanba_fx.calibrate(graph, data, metric=metric, held_out=False, score_sites=scored, progress=False, **options)
        names = [s.name for s in plan.sites]
        exact = [r.name for r in vmeanba_fx.report(plan.apply(0)).passes if r.exact]
        for k in ks or range(len(names) + 1):
            if time.perf_counter() > until:
                return
            if k == 0 and reduction != "mean":
                continue
            choice = {"k": k} if scored or not k else {"sites": names[len(names) - k :]}
            add(reduction, k, ALL, plan.apply(**choice), None if k else expected)
            if k and reduction in ("mean", "rank4"):
                literal = cheaper if reduction == "mean" else plan
                add(reduction, k, ALONE, literal.apply(sites=plan.choose(**choice), skip_passes=exact), None)


def build_like(name: str) -> nn.Module:
    return TASKS[name].build() if name in TASKS else getattr(models, name)()


def run(args) -> None:
    on_gpu = args.device != "cpu"
    for task in pick(args.tasks):
        count = 16 if args.quick else 256
        data = [task.load(args.data, True, count, 0, args.device)]
        images, _ = task.load(args.data, False, 4 if args.quick else 500, 0, args.device)
        measure(task.name, functools.partial(task.model, args.device), data, images, [0, 1] if args.quick else args.ks, args)
    if args.full_size:
        torch.manual_seed(0)
        images = torch.randn(128 if on_gpu else 2, 3, 224, 224, device=args.device)
        measure(FULL_SIZE, lambda: make_scan_matter(getattr(models, FULL_SIZE)()), [(images[:16],)], images, [0, 7, 14], args)


# -- tables and plots -------------------------------------------------------------------------------------------------


def joined(rows: list[dict[str, str]]) -> tuple[str, dict[tuple[str, int, str], float]]:
    """The mode that is drawn, and its times by variant, k and passes."""
    first = rows[0]["variant"]  # the baseline
    mode = next(m for m in MODES if any(r["mode"] == m and r["variant"] == first for r in rows))
    return mode, {
        (r["variant"], int(r["k"]), r["passes"]): float(r["ms"])
        for r in rows if r["mode"] == mode and r["ms"].replace(".", "").isdigit()
    }  # fmt: skip


def reduction_of(variant: str) -> str:
    """What is timed for a variant of curves.py: how sites are scored and refitted makes no difference."""
    options = VARIANTS[variant].calibrate
    return f"rank{options['rank']}" if "rank" in options else "mean"


def points(ms: dict, drops: dict[str, dict[int, list[float]]], name: str, passes: str) -> list[tuple[float, float]]:
    """(speed-up over the baseline, points lost) of a variant of curves.py, by k, from k = 0 on."""
    base, reduction = baseline_of(ms), reduction_of(name)
    start = [(base / ms["mean", 0, ALL], 0.0)] if passes == ALL and ("mean", 0, ALL) in ms else []
    found = [
        (base / ms[reduction, k, passes], statistics.fmean(values))
        for k, values in sorted(drops.get(name, {}).items()) if (reduction, k, passes) in ms
    ]  # fmt: skip
    return start + found if found else []


def baseline_of(ms: dict) -> float:
    return ms.get(("official", 0, ""), ms["captured, no pass", 0, ""])


def tables(folder: Path) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    drops, *_ = collected(folder)
    for path in sorted((folder / "frontier").glob("*.csv")):
        rows, origin = read_csv(path)
        modes = [m for m in reversed(MODES) if any(r["mode"] == m for r in rows)]
        cells: dict[tuple[str, int, str], dict[str, str]] = {}
        for r in rows:
            cells.setdefault((r["variant"], int(r["k"]), r["passes"]), {})[r["mode"]] = r["ms"]
        mode, ms = joined(rows)
        of = drops.get(rows[0]["task"], {})
        text = []
        for (variant, k, passes), found in cells.items():
            lost = [
                f"{SHORT[n]}: {statistics.fmean(of[n][k]):.2f}"
                for n in VARIANTS if reduction_of(n) == variant and k in of.get(n, {})
            ]  # fmt: skip
            speed = f"{baseline_of(ms) / ms[variant, k, passes]:.2f}" if (variant, k, passes) in ms else ""
            rank1 = ms.get(("rank1", k, passes))
            ratio = f"{ms[variant, k, passes] / rank1:.3f}" if rank1 and variant.startswith("rank") else ""
            text.append([variant, str(k), passes, *(found.get(m, "") for m in modes), speed, ratio, "; ".join(lost)])
        head = ["variant", "K", "passes", *(f"{m}, ms" for m in modes), f"speed-up ({mode})", "time / rank 1", "points lost"]
        title = TASKS[rows[0]["task"]].title if rows[0]["task"] in TASKS else f"{rows[0]['task']}, 224 px, random weights"
        yield title, head, text, [origin]


def plot(plt, folder: Path) -> None:
    drops, *_ = collected(folder)
    files = [rows for rows, _ in map(read_csv, (folder / "frontier").glob("*.csv")) if rows[0]["task"] in drops]
    if not files:
        return
    files.sort(key=lambda rows: list(TASKS).index(rows[0]["task"]))
    fig, axes = panels(plt, len(files), 1.4)
    for rows, ax in zip(files, axes, strict=True):
        task, (mode, ms) = rows[0]["task"], joined(rows)
        for passes, names, faded in ((ALL, DRAWN, 1.0), (ALONE, DRAWN_ALONE, 0.4)):
            for name in names:
                if found := points(ms, drops[task], name, passes):
                    label = SHORT[name] + ("" if passes == ALL else ", without the exact passes")
                    ax.plot(*zip(*found, strict=True), VARIANTS[name].line, label=label, ms=6, alpha=faded)
        ax.plot(1.0, 0.0, "ks", ms=6, label="official model" if ("official", 0, "") in ms else "model as given")
        if ("mean", 0, ALL) in ms:
            ax.plot(baseline_of(ms) / ms["mean", 0, ALL], 0.0, "k*", ms=11, label="k = 0: exact passes only", zorder=3)
        for (who, (speed, lost)), colour in zip(PUBLISHED.items(), ("tab:purple", "tab:red"), strict=True):
            ax.axhline(lost, color=colour, lw=1, ls=":")
            ax.axvline(speed, color=colour, lw=1, ls=":")
            percent = f"{100 * (speed - 1):.0f} % faster, < {lost:g} points"
            ax.plot(speed, lost, "v", color=colour, ms=7, label=f"{who}, {percent}: published, other data (ImageNet)")
        show_points_lost(ax, 10.0)
        ax.set(title=TASKS[task].title, xlabel=f"times as fast as the official model ({mode}, fp16)")
    legend_below(fig, min(len(files), 3))
    fig.savefig(folder / "frontier.png", dpi=110)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--tasks", nargs="*", choices=list(TASKS), default=["v05", "v0", "deep"])
    p.add_argument("--full-size", action="store_true", help=f"time {FULL_SIZE} at 224 px as well")
    p.add_argument("--reductions", nargs="+", choices=REDUCTIONS, default=list(REDUCTIONS))
    p.add_argument("--ks", nargs="+", type=int, help="which k (default: all)")
    p.add_argument("--official", help="path of the official vmamba.py")
    p.add_argument("--scan-extension", help="path of the official selective_scan_cuda_oflex shared object")
    p.add_argument("--compile", action="store_true", help="time compiled models as well")
    p.add_argument("--lock", help="file that several runs on one GPU share, so that they time one at a time")
    p.add_argument("--seconds", type=float, default=1e9, help="stop after this time; what is measured is kept")
    p.add_argument("--tag", default="", help="added to the names of the files")
    p.add_argument("--plot-only", action="store_true", help="tabulate and draw the files that are there")
    args = p.parse_args()
    if not args.plot_only:
        run(args)
    note = "Points lost: on the test split, from the curves; mean over the seeds."
    write_tables(args.out / "frontier.md", tables(args.out), [note])
    drawn(plot, args.out)


if __name__ == "__main__":
    main()
