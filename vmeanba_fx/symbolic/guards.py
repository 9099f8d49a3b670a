"""The error of the symbolic tracer, and the run-time check of what a trace took for granted."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import fx
from torch.fx.node import has_side_effect

from ..errors import GuardError, VMeanbaError


class SymbolicTraceError(VMeanbaError, RuntimeError):
    """The model could not be traced into a module-level graph; the message names the module and the operation."""


@has_side_effect  # fx's dead code elimination must keep a check although nothing uses its result
def check_guard(value: Any, expected: Any, where: str) -> None:
    """Raise :class:`GuardError` unless ``value`` is what it was while tracing.

    The tracer inserts this call wherever Python code decided something from a traced value. ``expected`` as a bool
    means that only the truth of ``value`` mattered. ``where`` names the expression, the module and the source line.
    """
    if isinstance(value, fx.Proxy):  # plain fx traces the graph again
        value.tracer.create_proxy("call_function", check_guard, (value, expected, where), {})
        return
    if isinstance(expected, bool):
        # A branch, not a comparison: the value may be a tensor, or a SymBool while the graph is exported or compiled.
        if value:
            same = expected
        else:
            same = not expected
    elif expected is None:
        same = value is None
    else:
        same = bool(value == expected)
    if not same:
        _refuse(value, expected, where)


@torch.compiler.disable  # PyTorch 2.11 cannot raise an error in what it compiles after a branch on data
def _refuse(value: Any, expected: Any, where: str) -> NoReturn:
    raise GuardError(
        f"this graph does not hold for this input. {where} was {expected!r} when the graph was traced and is {value!r} now, so "
        "the model would take another way. Trace again with an input like this one, or use vmeanba_fx.capture, which follows "
        "the model through torch.export."
    )


# Printed graphs call it by the public path, which stays valid when files move.
check_guard.__module__ = "vmeanba_fx.symbolic"
