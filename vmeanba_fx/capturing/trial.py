"""Does a function with the signature of a scan compute that scan? Found out on a few steps of its own call.

Public code is full of helpers ``scan(u, delta, A, B, C)`` that add a bias of their own, scale the result or cast it.
Taking them for the scan would give a graph with silently wrong numbers, so the capture's warm-up forward tries each
function once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

_STEPS = 8
# Functions may compute in a lower precision than ours, but not something else.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1
_WIDE_TOLERANCE = 0.02  # of a call in half precision that is tried in float32: the function may round to half itself
_HALVES = (torch.bfloat16, torch.float16)


def case_of(arguments: Mapping[str, Any]) -> tuple[object, ...]:
    """What tells one kind of call of a function from another: its options, and which tensors it gets in which dtype."""
    return tuple(
        (name, (v.dtype, v.dim()) if isinstance(v, Tensor) else repr(v)) for name, v in sorted(arguments.items())
    )


def disagreement(
    original: Callable[..., Any], bound: inspect.BoundArguments, ours: Callable[[Mapping[str, Any]], Any]
) -> str | None:
    """Why ``original(*bound)`` is not what ``ours(arguments)`` computes; empty where it is, None where it does not run.

    Both get the first steps of the call with some noise added (zeros would hide every difference).
    """
    if any(type(t) not in (Tensor, nn.Parameter) for t in _tensors(bound.arguments)):
        return ""  # fake tensors: the call is being traced, its kind was tried in the warm-up
    for length in (_STEPS, None):
        given = _first_steps(bound, length)
        try:
            expected = _tensors(original(*given.args, **given.kwargs))
        except Exception:  # a CUDA kernel, or a layout that cannot be cut: user code may raise anything
            continue
        try:
            found = _tensors(ours(given.arguments))
        except (RuntimeError, ValueError, TypeError) as error:
            return f"its arguments do not fit: {error}"
        return _difference(expected, found) or _wide_difference(original, given, ours)
    return None


def _wide_difference(
    original: Callable[..., Any], given: inspect.BoundArguments, ours: Callable[[Mapping[str, Any]], Any]
) -> str:
    """The same in float32 for a call in half precision, whose rounding hides a bias or skip of the function's own."""
    if not any(t.dtype in _HALVES for t in _tensors(given.arguments)):
        return ""
    wide = inspect.BoundArguments(given.signature, type(given.arguments)(given.arguments))
    wide.arguments = pytree.tree_map_only(Tensor, lambda t: t.float() if t.dtype in _HALVES else t, wide.arguments)
    try:
        expected = _tensors(original(*wide.args, **wide.kwargs))
        found = _tensors(ours(wide.arguments))
    except Exception:  # made for its own dtype alone
        return ""
    return _difference([t.to(f.dtype) for t, f in zip(expected, found, strict=False)], found, _WIDE_TOLERANCE)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _first_steps(bound: inspect.BoundArguments, length: int | None) -> inspect.BoundArguments:
    """The same call with noise added and, with ``length``, cut along the last axis where that is the sequence."""
    whole = next(t.shape[-1] for t in _tensors(bound.arguments))
    generator = torch.Generator().manual_seed(0)

    def change(t: Tensor) -> Tensor:
        if length is not None and t.dim() >= 3 and t.shape[-1] == whole:
            t = t[..., :length]
        if t.dim() == 2 or not t.is_floating_point():  # A must stay negative
            return t
        return t + 0.5 * torch.rand(t.shape, generator=generator).to(t)

    given = inspect.BoundArguments(bound.signature, type(bound.arguments)(bound.arguments))
    given.arguments = pytree.tree_map_only(Tensor, change, given.arguments)
    return given


def _difference(expected: list[Tensor], found: list[Tensor], tolerance: float = 0.0) -> str:
    if len(expected) != len(found):
        return f"it returns {len(expected)} tensors, the scan {len(found)}"
    for theirs, mine in zip(expected, found, strict=True):
        if theirs.shape != mine.shape or theirs.dtype != mine.dtype:
            return f"it returns {theirs.dtype} {tuple(theirs.shape)}, the scan {mine.dtype} {tuple(mine.shape)}"
        if not theirs.isfinite().all():  # nothing to compare with
            continue
        error = (theirs.double() - mine.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30)
        if not error <= (tolerance or _TOLERANCE.get(theirs.dtype, _HALF_TOLERANCE)):  # a scan that overflows differs, too
            return f"on its own inputs it differs from the scan by {float(error):.1e} (relative)"
    return ""
