"""The pruning table: unstructured magnitude pruning and replaced scans, alone and together.

    python examples/paper/pruning.py --device cuda

Weights of convolutions and linear layers (all parameters of at least two dimensions but A) are set to zero by magnitude,
over the whole model or layer by layer. Sites are scored and fitted on the pruned model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import SHORT, TASKS, VARIANTS, Study, parser, pick, read_csv, write_csv, write_markdown
from torch import nn
from torch.nn.utils import prune

SHARES = (0.0, 0.2, 0.4, 0.6)
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


def run(study: Study, variants: list[str], quick: bool, path: Path) -> None:
    """Measures and writes as it goes."""
    rows: list[dict[str, Any]] = []
    n = len(study.sites)
    unpruned = study.task.model("cpu").state_dict()
    for scope in SCOPES:
        for share in SHARES[::2] if quick else SHARES:
            model = study.task.build()
            model.load_state_dict(unpruned)
            zeros = prune_model(model, share, scope)
            study.use_weights(model.state_dict())
            pruned = study.measure(study.model)
            row = {"task": study.task.name, "scope": scope, "pruned": share, "zeros": round(zeros, 4)}
            rows.append(row | {"variant": "original", "k": 0, "value": round(pruned, 3), "drop": round(study.base - pruned, 3)})
            for name in variants:
                for k in (n // 2, n):
                    value = study.measure(study.apply(VARIANTS[name], k))
                    rows.append(row | {"variant": name, "k": k, "value": round(value, 3), "drop": round(study.base - value, 3)})
            print(*rows[-1 - 2 * len(variants) :], sep="\n", flush=True)
            write_csv(path, rows)


def table(rows: list[dict[str, str]], task: str) -> tuple[list[str], list[list[str]]]:
    """One line per scope and variant, one column per share; cells are drops against the unpruned original."""
    mine = [r for r in rows if r["task"] == task]
    shares = sorted({float(r["pruned"]) for r in mine})
    lines: dict[tuple[str, str, int], dict[float, str]] = {}
    for r in mine:
        lines.setdefault((r["scope"], r["variant"], int(r["k"])), {})[float(r["pruned"])] = f"{float(r['drop']):.2f}"
    head = ["pruning", "replaced", *(f"{100 * s:.0f} % pruned" for s in shares)]
    text = [
        [scope, "nothing" if not k else f"{k} sites, {SHORT[variant]}", *(found.get(s, "") for s in shares)]
        for (scope, variant, k), found in lines.items()
    ]
    return head, text


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["v05", "v0", "deep"])
    p.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["mean", "rank4_refit"])
    p.add_argument("--plot-only", action="store_true", help="only make the tables from the files that are there")
    args = p.parse_args()
    if not args.plot_only:
        for task in pick(args.tasks):
            run(Study(task, args), args.variants, args.quick, args.out / "pruning" / f"{task.name}.csv")
    parts = []
    for path in sorted((args.out / "pruning").glob("*.csv")):
        rows, origin = read_csv(path)
        task = TASKS[path.stem]
        base = next(float(r["value"]) + float(r["drop"]) for r in rows)
        title = f"{task.title}: {base:.2f} % {task.measure}"
        write_markdown(args.out / "pruning.md", title, *table(rows, path.stem), [origin])
        parts.append((args.out / "pruning.md").read_text(encoding="utf-8"))
    note = "Drop against the unpruned original in points, on the test split.\n"
    (args.out / "pruning.md").write_text("\n".join([*parts, note]), encoding="utf-8")


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    main()
