"""Does a function with the signature of a scan compute that scan? Found out on a few steps of its own call.

Public code is full of helpers ``scan(u, delta, A, B, C)`` that add a bias of their own, scale the result or cast it.
Taking them for the scan would give a graph with silently wrong numbers, so the capture's warm-up forward tries each
function once on several inputs: those of the call, small numbers in their place, and these with one argument zero, which
shows what the others do (a skip of 1.1 D is a rounding error beside a scan that is large).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

_STEPS = 8
# Functions may compute in a lower precision than ours, but not something else.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.05
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
    """Why ``original(*bound)`` is not what ``ours(arguments)`` computes; empty where it is, None where it does not run."""
    if any(type(t) not in (Tensor, nn.Parameter) for t in _tensors(bound.arguments)):
        return ""  # fake tensors: the call is being traced, its kind was tried in the warm-up
    for axis in (-1, 1, None):
        given = _mapped(bound, _cut(bound, axis))
        found = _compared(original, given, ours)
        if found is None:  # a CUDA kernel, or a layout that cannot be cut there
            continue
        if found or not any(t.dtype in _HALVES for t in _tensors(given.arguments)):
            return found
        # In half precision, rounding hides a bias or skip of the function's own. One made for its own dtype alone gives None.
        wide = _mapped(given, lambda t: t.float() if t.dtype in _HALVES else t)
        return _compared(original, wide, ours, _WIDE_TOLERANCE) or ""
    return None


def _compared(
    original: Callable[..., Any], given: inspect.BoundArguments, ours: Callable[[Mapping[str, Any]], Any],
    tolerance: float = 0.0,
) -> str | None:  # fmt: skip
    """:func:`disagreement` on variants of ``given``; None where ``original`` does not run."""
    finite = False
    for index, inputs in enumerate(_inputs(given)):
        try:
            expected = _tensors(original(*inputs.args, **inputs.kwargs))
        except Exception:  # user code may raise anything
            if index < 2:
                return None
            continue
        if not all(bool(t.isfinite().all()) for t in expected):  # nothing to compare with
            continue
        finite = finite or index < 2
        try:
            found = _tensors(ours(inputs.arguments))
        except (RuntimeError, ValueError, TypeError) as error:
            return f"its arguments do not fit: {error}"
        if difference := _difference(expected, found, tolerance):
            return difference
    return "" if finite else "it gives values that are not finite, on its own inputs and on small ones"


def _inputs(given: inspect.BoundArguments) -> Iterator[inspect.BoundArguments]:
    """The call with noise added (zeros would hide every difference), with small noise instead, and with one zero each."""

    def noise(t: Tensor) -> Tensor:
        return 0.5 * torch.rand(t.shape, generator=generator).to(t)

    def varies(t: Tensor) -> bool:
        return t.dim() != 2 and t.is_floating_point()  # A must stay negative

    def cleared(zero: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(t) if t is zero else t

    generator = torch.Generator().manual_seed(0)
    yield _mapped(given, lambda t: t + noise(t) if varies(t) else t)
    small = _mapped(given, lambda t: noise(t) if varies(t) else t)
    yield small
    for zero in _tensors(small.arguments):
        if zero.is_floating_point():
            yield _mapped(small, partial(cleared, zero))


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _mapped(bound: inspect.BoundArguments, change: Callable[[Tensor], Tensor]) -> inspect.BoundArguments:
    """The same call with every tensor changed."""
    given = inspect.BoundArguments(bound.signature, type(bound.arguments)(bound.arguments))
    given.arguments = pytree.tree_map_only(Tensor, change, given.arguments)
    return given


def _cut(bound: inspect.BoundArguments, axis: int | None) -> Callable[[Tensor], Tensor]:
    """To the first steps where ``axis`` is the sequence: as long as that of the first tensor, of three axes or more."""
    shape = next(t.shape for t in _tensors(bound.arguments))
    if axis is None or len(shape) < 2:
        return lambda t: t
    return lambda t: t.narrow(axis, 0, min(_STEPS, shape[axis])) if t.dim() >= 3 and t.shape[axis] == shape[axis] else t


def _difference(expected: list[Tensor], found: list[Tensor], tolerance: float) -> str:
    """``tolerance``: for a call in another dtype than its own, whose outputs may have either; 0 for that of the dtype."""
    if len(expected) != len(found):
        return f"it returns {len(expected)} tensors, the scan {len(found)}"
    for theirs, mine in zip(expected, found, strict=True):
        if theirs.shape != mine.shape or (theirs.dtype != mine.dtype and not tolerance):
            return f"it returns {theirs.dtype} {tuple(theirs.shape)}, the scan {mine.dtype} {tuple(mine.shape)}"
        error = (theirs.double() - mine.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30)
        if not error <= (tolerance or _TOLERANCE.get(theirs.dtype, _HALF_TOLERANCE)):  # a scan that overflows differs, too
            return f"on its own inputs it differs from the scan by {float(error):.1e} (relative)"
    return ""
