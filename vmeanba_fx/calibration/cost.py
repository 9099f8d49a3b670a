"""What scoring will cost, printed before it starts: forward passes of the model, and seconds estimated from one batch."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from tabulate import tabulate

from .gradient import PROBES
from .metrics import Batch
from .scoring import Runner


def cost_table(runner: Runner, batch: Batch, batches: int | None, chosen: Sequence[str], held_out: bool) -> str:
    """Runs of one batch and estimated seconds for each way of scoring.

    Seconds are runs times the measured time of one forward pass, shortened by the share of the graph below the replaced
    site; a backward pass counts as two forward ones. ``chosen``: the ways that this calibration takes.
    """
    seconds = _forward_seconds(runner, batch)
    sites, count = len(runner.sites), batches or 1
    below = [runner.executor.share_below(point.node) for point in runner.replacer.points]
    mean = sum(below) / sites
    half = count if count == 1 else (count + 1) // 2
    ranked = half if held_out else count
    rounds = sites * (sites + 1) // 2
    rows = {  # name: runs, runs in units of a whole forward pass
        "measured": (count * (1 + sites), count * (1 + sum(below))),
        "gradient": (count * (3 + PROBES), count * (2 + 2 * (1 + PROBES))),
        "greedy": (ranked * (sites + rounds), ranked * (sites + rounds * max(below, default=mean))),
        "held out": (half * (1 + sites), half * (1 + sites * max(below, default=mean))),
    }
    table = [
        [name, runs, f"{units * seconds:.1f}", "yes" if name in chosen else ""] for name, (runs, units) in rows.items()
    ]
    per = "" if batches else " of each batch (the loader does not tell how many there are)"
    return (
        tabulate(table, ["scoring", "runs", "about s", "now"], disable_numparse=True,
                 colalign=("left", "right", "right", "left"))
        + f"\n{sites} sites, {count} batches{per}; one forward pass took {seconds:.3g} s"
    )  # fmt: skip


def _forward_seconds(runner: Runner, batch: Batch) -> float:
    runner.base(0, batch)  # compiles kernels
    start = time.perf_counter()
    runner.base(0, batch)
    if runner.executor.device.type == "cuda":
        torch.cuda.synchronize(runner.executor.device)
    return time.perf_counter() - start
