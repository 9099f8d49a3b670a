"""Speed against accuracy: time on a GPU of every variant, joined with the drops that curves.py measured.

    python examples/paper/frontier.py --device cuda
    python examples/paper/frontier.py --plot-only

Times are of the fully rewritten graphs under fp16 autocast, eager and as one CUDA graph (which is what is left where launches
cost nothing). Refitting changes weights, not time. `vmamba_tiny_s1l8` has no accuracy here (random weights): it shows what
the rank costs at full size.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import SHORT, TASKS, VARIANTS, parser, pick, read_csv, write_csv, write_markdown
from curves import collected
from torch import Tensor, nn

import vmeanba_fx
from vmeanba_fx import models

REDUCTIONS = ("mean", "rank1", "rank4", "rank16")
# Published on other data: (speed-up, points lost at most).
PUBLISHED = {"QuarterMap, published on ImageNet: 11 %, < 0.9 points": (1.11, 0.9),
             "VMeanba, published on ImageNet: 12 %, < 3 points": (1.12, 3.0)}  # fmt: skip


def replayed(model: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], None]:
    """One forward pass as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(images)
    return graph.replay


def milliseconds(run: Callable[[], Any], on_gpu: bool, seconds: float = 0.4) -> float:
    """Median time of a call."""
    run()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 5:
        if on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)


def timed(model: nn.Module, images: Tensor) -> dict[str, float]:
    on_gpu = images.is_cuda
    with torch.inference_mode(), torch.autocast(images.device.type, torch.float16, enabled=on_gpu, cache_enabled=False):
        row = {"eager_ms": milliseconds(functools.partial(model, images), on_gpu)}
        row["graph_ms"] = milliseconds(replayed(model, images), on_gpu) if on_gpu else row["eager_ms"]
    return {key: round(value, 4) for key, value in row.items()}


def measure(name: str, model: nn.Module, calibration: Tensor, images: Tensor, ks: list[int], path: Path) -> None:
    """Times the model and its forms, and writes as it goes."""
    rows: list[dict[str, Any]] = [{"task": name, "variant": "original", "k": 0} | timed(model, images)]
    graph = vmeanba_fx.capture(model, (calibration[:2],))
    for reduction in REDUCTIONS:
        rank = reduction.removeprefix("rank")
        options = {} if reduction == "mean" else {"reduce": "rank", "rank": int(rank)}
        plan = vmeanba_fx.calibrate(graph, [calibration], metric="kl", progress=False, **options)
        for k in ks:
            if k or reduction == "mean":
                rows.append({"task": name, "variant": reduction, "k": k} | timed(plan.apply(k), images))
                print(rows[-1], flush=True)
                write_csv(path, rows)


def run(args) -> None:
    on_gpu = args.device != "cpu"
    if args.full_size:
        torch.manual_seed(0)
        model = models.vmamba_tiny_s1l8().eval().to(args.device)
        images = torch.randn(128 if on_gpu else 2, 3, 224, 224, device=args.device)
        measure(
            "vmamba_tiny_s1l8", model, images[:16], images, [0, 7, 14], args.out / "frontier" / "vmamba_tiny_s1l8.csv"
        )
    for task in pick(args.tasks):
        calibration, _ = task.load(args.data, True, 16 if args.quick else 64, 0, args.device)
        images, _ = task.load(args.data, False, 4 if args.quick else 500, 0, args.device)
        n = len(vmeanba_fx.find_sites(vmeanba_fx.capture(task.model("cpu"), (calibration[:2].cpu(),)), probe=False))
        ks = [0, n] if args.quick else [k for k in (0, 5, 7, 14) if k < n] + [n]
        measure(task.name, task.model(args.device), calibration, images, ks, args.out / "frontier" / f"{task.name}.csv")


def tabulated(args) -> None:
    parts = []
    drops, *_ = collected(args.out)
    for path in sorted((args.out / "frontier").glob("*.csv")):
        rows, origin = read_csv(path)
        base = float(rows[0]["graph_ms"])
        rank1 = {r["k"]: float(r["graph_ms"]) for r in rows if r["variant"] == "rank1"}
        text = []
        for r in rows:
            found = [
                f"{v.name}: {statistics.fmean(of[int(r['k'])]):.2f}"
                for v, of in ((VARIANTS[name], of) for name, of in drops.get(path.stem, {}).items())
                if v.name.split("_")[0] == r["variant"] and int(r["k"]) in of
            ]
            ratio = float(r["graph_ms"]) / rank1[r["k"]] if r["k"] in rank1 and r["variant"] != "original" else None
            text.append([
                r["variant"], r["k"], r["eager_ms"], r["graph_ms"], f"{base / float(r['graph_ms']):.2f}",
                f"{ratio:.3f}" if ratio else "", "; ".join(found),
            ])  # fmt: skip
        head = ["variant", "K", "eager, ms", "CUDA graph, ms", "speed-up", "time / rank 1", "drop, points"]
        title = TASKS[path.stem].title if path.stem in TASKS else path.stem
        write_markdown(args.out / "frontier.md", title, head, text, [origin])
        parts.append((args.out / "frontier.md").read_text(encoding="utf-8"))
    (args.out / "frontier.md").write_text("\n".join(parts), encoding="utf-8")
    plot(args.out, drops)


def plot(folder, drops) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paths = [p for p in sorted((folder / "frontier").glob("*.csv")) if p.stem in drops]
    if not paths:
        return
    fig, axes = plt.subplots(1, len(paths), figsize=(5.4 * len(paths), 4.4), squeeze=False)
    for path, ax in zip(paths, axes[0], strict=True):
        rows, _ = read_csv(path)
        base = float(rows[0]["graph_ms"])
        times = {(r["variant"], int(r["k"])): base / float(r["graph_ms"]) for r in rows}
        kept = times.get(("mean", 0))
        for name, variant in VARIANTS.items():
            points = [
                (times[name.split("_")[0], k], -statistics.fmean(values))
                for k, values in sorted(drops[path.stem].get(name, {}).items())
                if (name.split("_")[0], k) in times
            ]
            if points:
                ax.plot(*zip(*([(kept, 0.0)] if kept else []) + points, strict=True), variant.line, label=SHORT[name], ms=5)
        for (label, (speed, lost)), colour in zip(PUBLISHED.items(), ("tab:purple", "tab:red"), strict=True):
            ax.axvline(speed, color=colour, lw=0.8, ls=":")
            ax.axhline(-lost, color=colour, lw=0.8, ls=":", label=label)
        ax.set(title=TASKS[path.stem].title, xlabel="speed-up over the model as given (CUDA graph, fp16)", ylabel="points")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=6)
    fig.tight_layout()
    fig.savefig(folder / "frontier.png", dpi=110)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--tasks", nargs="*", choices=list(TASKS), default=["v05", "v0", "deep"])
    p.add_argument("--full-size", action="store_true", help="time vmamba_tiny_s1l8 at 224 px as well")
    p.add_argument("--plot-only", action="store_true", help="tabulate and draw the files that are there")
    args = p.parse_args()
    if not args.plot_only:
        run(args)
    try:
        tabulated(args)
    except ImportError:
        print("no matplotlib here: draw with --plot-only where it is installed")


if __name__ == "__main__":
    main()
