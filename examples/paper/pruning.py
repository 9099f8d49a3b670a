"""The pruning table: unstructured magnitude pruning and replaced scans, alone and together.

    python examples/paper/pruning.py --device cuda

Weights of convolutions and linear layers (all parameters of at least two dimensions but A) are set to zero by magnitude,
over the whole model or layer by layer. Sites are scored and fitted on the pruned model.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import SHORT, TASKS, VARIANTS, Study, pick
from results import parser, read_by_task, write_csv, write_tables
from torch import nn
from torch.nn.utils import prune

SHARES = (0.0, 0.4, 0.6, 0.2)  # in order of interest
SCOPES = ("global", "per layer")


def prune_model(model: nn.Module, share: float, scope: str) -> float:
    """Prunes in place; returns the share of zeros among the weights that may be pruned."""
    weights = [
        (module, name)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if p.ndim >= 2 and name != "A_logs"
    ]
    if share:
        if scope == "global":
            prune.global_unstructured(weights, prune.L1Unstructured, amount=share)
        else:
            for module, name in weights:
                prune.l1_unstructured(module, name, amount=share)
        for module, name in weights:
            prune.remove(module, name)
    tensors = [getattr(module, name) for module, name in weights]
    return sum(int((t == 0).sum()) for t in tensors) / sum(t.numel() for t in tensors)


def run(study: Study, args: argparse.Namespace, path: Path) -> None:
    """Measures and writes as it goes."""
    rows: list[dict[str, Any]] = []
    until = time.perf_counter() + args.seconds
    n = len(study.sites)
    unpruned = study.task.model("cpu").state_dict()
    for share, scope in itertools.product(SHARES[:2] if args.quick else args.shares, args.scopes):
        if time.perf_counter() > until:
            break
        model = study.task.build()
        model.load_state_dict(unpruned)
        zeros = prune_model(model, share, scope)
        study.use_weights(model.state_dict())
        pruned = study.measure(study.model)
        row = {"task": study.task.name, "scope": scope, "pruned": share, "zeros": round(zeros, 4)}
        rows.append(row | {"variant": "original", "k": 0, "value": round(pruned, 3), "drop": round(study.base - pruned, 3)})
        for name in args.variants:
            for k in (n // 2, n):
                value = study.measure(study.apply(VARIANTS[name], k))
                rows.append(row | {"variant": name, "k": k, "value": round(value, 3), "drop": round(study.base - value, 3)})
                write_csv(path, rows)
        print(*rows[-1 - 2 * len(args.variants) :], sep="\n", flush=True)


def tables(folder: Path) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """A task each: one line per scope and variant, one column per share; cells are drops against the unpruned original."""
    for name, (rows, origins) in read_by_task(folder / "pruning", TASKS).items():
        shares = sorted({float(r["pruned"]) for r in rows})
        lines: dict[tuple[str, str, int], dict[float, str]] = {}
        for r in sorted(rows, key=lambda r: SCOPES.index(r["scope"])):
            lines.setdefault((r["scope"], r["variant"], int(r["k"])), {})[float(r["pruned"])] = f"{float(r['drop']):.2f}"
        text = [
            [scope, "nothing" if not k else f"{k} sites, {SHORT[variant]}", *(cells.get(s, "") for s in shares)]
            for (scope, variant, k), cells in lines.items()
        ]
        base = float(rows[0]["value"]) + float(rows[0]["drop"])
        title = f"{TASKS[name].title}: {base:.2f} % {TASKS[name].measure}"
        yield title, ["pruning", "replaced", *(f"{100 * s:.0f} % pruned" for s in shares)], text, ["\n".join(origins)]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["v05", "v0", "deep"])
    p.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["mean", "rank4_refit"])
    p.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the weights that are pruned")
    p.add_argument("--scopes", nargs="+", choices=SCOPES, default=SCOPES)
    p.add_argument("--seconds", type=float, default=1e9, help="start nothing new after this time")
    p.add_argument("--tag", default="", help="added to the names of the files")
    p.add_argument("--plot-only", action="store_true", help="only make the tables from the files that are there")
    args = p.parse_args()
    if not args.plot_only:
        for task in pick(args.tasks):
            run(Study(task, args), args, args.out / "pruning" / f"{task.name}{args.tag}.csv")
    note = "Drop against the unpruned original in points, on the test split."
    write_tables(args.out / "pruning.md", tables(args.out), [note])


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    main()
