"""The example inputs that a model is traced with."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..errors import CaptureError


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The first size of the first tensor."""
    sizes = [t.shape[0] for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 0]
    if not sizes:
        raise CaptureError("no example input with a batch dimension: give at least one tensor")
    if sizes[0] == 0:
        raise CaptureError("the example input has batch size 0")
    return sizes[0]


def with_batch(
    args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, wanted: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs at batch ``wanted``: the first rows, repeated where there are too few."""

    def resize(t: Tensor) -> Tensor:
        if t.dim() == 0 or t.shape[0] != batch:
            return t
        rows = torch.arange(wanted) % batch
        return t[rows].clone()

    return pytree.tree_map_only(Tensor, resize, (args, kwargs))


def shapes_of(inputs: Any) -> str:
    """Shapes of the tensors in ``inputs``, for messages."""
    return ", ".join(str(tuple(t.shape)) for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor))


def name_keywords(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Give the ``forward(..., **kwargs)`` of ``model``, a private copy, parameters of these names: ``torch.export`` takes no
    dynamic sizes for inputs in ``**kwargs``."""
    forward, signature = model.forward, inspect.signature(model.forward)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    further = kwargs.keys() - {p.name for p in named}
    if len(named) == len(signature.parameters) or not further:
        return

    def explicit(*args: Any, **given: Any) -> Any:
        return forward(*args, **given)

    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs if name in further]
    explicit.__signature__ = signature.replace(parameters=[*named, *own])  # type: ignore[attr-defined]
    model.forward = explicit  # type: ignore[method-assign]
