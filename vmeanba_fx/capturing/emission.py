"""What a traced scan call becomes, and in which module it was made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.last_state import last_state
from .registry import ScanCall, compute_dtype


def emit_scan(call: ScanCall) -> Any:
    """One scan call as graph nodes: the bare recurrence as one op, the skip, the gate and the cast as plain nodes."""
    compute = compute_dtype(call.u.dtype)
    y = ops.selective_scan(
        call.u, call.delta, call.A, call.B, call.C, None, None, call.delta_bias, call.delta_softplus, compute
    )
    if call.D is not None:
        y = y + _cast(call.D, compute).unsqueeze(-1) * call.u
    if call.z is not None:
        y = y * torch.nn.functional.silu(_cast(call.z, compute))
    y = _cast(y, call.out_dtype or call.u.dtype)
    return call.result(
        y, lambda: last_state(call.u, call.delta, call.A, call.B, call.delta_bias, call.delta_softplus)
    )


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)  # export would record a cast that does nothing


@contextlib.contextmanager
def module_stack(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep ``stack`` at the paths of the modules whose forward is running."""

    def leave(*_: object) -> None:
        stack.pop()

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: stack.append(path)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        stack.clear()
        for handle in handles:
            handle.remove()
