"""The one-line form: calibrate, choose, apply."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from . import passes
from .calibration.calibrate import calibrate
from .capturing.capture import capture_info
from .graph import REPORT, copy_graph, refresh_from_weights
from .passes import Pass, run_passes
from .plan import Plan
from .report import attach_report

__all__ = ["apply_plan", "bake_autocast", "pack_weights", "transform"]

_CHOICE = ("max_drop", "speedup", "sites", "exclude", "group_by")
_APPLY = ("refit", "skip_passes", "verify", "dump")


def transform(
    model: nn.Module | fx.GraphModule | ExportedProgram,
    calib_loader: Iterable[Any],
    k: int | None = None,
    **options: Any,
) -> fx.GraphModule:
    """Replace the ``k`` selective scans that matter least by VMeanba, without training. Lossy for ``k > 0``.

    Exactly ``plan = calibrate(model, calib_loader, ...)`` followed by ``plan.apply(k=k, ...)``; where nothing has to
    be ranked (``k=0``, or ``sites=``) the sites are not scored.

    Args:
        model: an ``nn.Module``, a traced ``torch.fx.GraphModule`` or an ``ExportedProgram``; it is not changed.
        calib_loader: batches of inputs, with labels or without.
        k: how many sites to replace; or choose with ``max_drop=``, ``speedup=`` or ``sites=`` (see :meth:`Plan.choose`).
        **options: of :func:`calibrate` (``metric``, ``score``, ``greedy``, ``mean``, ``reduce``, ``rank``,
            ``transform_fn``, ``seed``, ``resume``, ...) and of :meth:`Plan.apply` (``exclude``, ``refit``,
            ``skip_passes``, ``verify``, ``dump``, ...).

    Returns:
        A ``GraphModule`` on the model's device, in eval mode. ``print(vmeanba_fx.report(gm))`` tells what was done.

    Raises:
        Everything :func:`calibrate` and :meth:`Plan.apply` raise; the model and files stay as they were.
    """
    choice = {name: options.pop(name) for name in _CHOICE if name in options}
    apply_options = {name: options.pop(name) for name in _APPLY if name in options}
    options.setdefault("held_out", choice.get("max_drop") is not None)
    plan = calibrate(
        model,
        calib_loader,
        exclude=choice.get("exclude", ()),
        group_by=choice.get("group_by"),
        score_sites=k != 0 and choice.get("sites") is None,
        # Do not score for minutes to refuse afterwards.
        before_scoring=lambda unscored: unscored.check_choice(k, **choice),
        **options,
    )
    return plan.apply(k, **choice, **apply_options)


def bake_autocast(gm: fx.GraphModule, dtype: torch.dtype = torch.float16) -> fx.GraphModule:
    """A copy of a rewritten float32 model that does by itself what ``torch.autocast("cuda", dtype)`` does around it.

    Weights of convolutions and matrix products are held in ``dtype`` (half the memory, no cast at run time), norms and the
    residual stream stay in float32. Lossy as autocast is: outputs differ from autocast's by rounding only. For inference: the
    half-precision weights are buffers.

    Compile the result with ``torch.compile(gm, options={"realize_reads_threshold": 2})``: VMamba then runs in two thirds of the
    memory, no slower. As it is, Inductor keeps up to five terms of the residual stream instead of their sum; and it counts an
    MLP's hidden map twice, before and after its GELU, which are one buffer, so that keeping another one seems to cost nothing.

    Raises:
        PassError: ``dtype`` is not a 16-bit float.
        GraphCheckError: the model has autocast or checkpoint regions of its own.
        CaptureError: ``gm`` is not a rewritten model.
    """
    return _one_more(gm, Pass("bake_autocast", partial(passes.bake_autocast, dtype=dtype), exact=False))


def pack_weights(gm: fx.GraphModule, batch: int = 1) -> fx.GraphModule:
    """A copy of a rewritten model on the CPU, for inference alone: oneDNN's weight layouts, fewer and larger operations.

    Exact. The last step: the result runs (for any batch, fastest for about ``batch`` items), but cannot be trained, copied,
    exported, compiled or moved to another device.

    Raises:
        GraphCheckError: this PyTorch has no oneDNN, or the model has autocast or checkpoint regions of its own.
    """
    return _one_more(gm, Pass("pack_weights", partial(passes.pack_weights, batch=batch), exact=True))


def unroll_depthwise(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a rewritten model for ``torch.compile`` on a GPU: its depthwise convolutions are sums of shifted maps.

    Exact. A compiler fuses such a sum with the activation and the LayerNorm behind it into one pass over memory instead of
    two. In 16 bits, after :func:`bake_autocast`. Uncompiled the result is slow.

    Raises:
        CaptureError: ``gm`` is not a rewritten model.
    """
    return _one_more(gm, Pass("unroll_depthwise", passes.unroll_depthwise, exact=True))


def _one_more(gm: fx.GraphModule, step: Pass) -> fx.GraphModule:
    """A copy of ``gm`` after one more pass, which its report then lists as well."""
    capture_info(gm)  # raises where it is no graph of ours
    result, records = run_passes(refresh_from_weights(copy_graph(gm)), [step])
    if (found := result.meta.get(REPORT)) is not None:
        attach_report(result, replace(found, passes=(*found.passes, *records)))
    return result


def apply_plan(
    model: nn.Module | fx.GraphModule | ExportedProgram,
    plan: str | os.PathLike[str] | Plan,
    k: int | None = None,
    **options: Any,
) -> fx.GraphModule:
    """Replay a plan on a fresh model with the same weights; nothing is scored.

    Args:
        model: the model the plan was made from, or ``capture(model, example_inputs)`` where its inputs are nested.
        plan: the file that ``Plan.save`` wrote, or the plan itself.
        k: how many sites to replace, or another choice, as for :meth:`Plan.apply`.
        **options: of :meth:`Plan.apply`.

    Raises:
        PlanError: the file is damaged, or the plan is of another model.
        SiteError: see :meth:`Plan.choose`.
    """
    found = plan if isinstance(plan, Plan) else Plan.load(plan)
    return found.apply(k, model=model, **options)
