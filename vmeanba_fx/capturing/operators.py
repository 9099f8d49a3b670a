"""Scans that are operators, of ``torch.library`` or of a C++ extension: no code to swap, but all calls pass a function mode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode

_NAMESPACES = frozenset({"aten", "prim", "prims", "quantized", "vmeanba_fx"})  # thousands, no scan of others among them

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def foreign_schemas() -> Iterator[torch.FunctionSchema]:
    """The schemas of all operators of this process that are neither PyTorch's nor ours."""
    for name in torch._C._dispatch_get_all_op_names():
        if name.partition("::")[0] not in _NAMESPACES:
            operator, _, overload = name.partition(".")
            try:
                yield torch._C._get_schema(operator, overload)
            except RuntimeError:  # an implementation without a definition
                continue


def operator_of(schema: torch.FunctionSchema) -> OpOverload:
    """The operator that a schema belongs to."""
    namespace, _, name = schema.name.partition("::")
    return getattr(getattr(getattr(torch.ops, namespace), name), schema.overload_name or "default")


def gives_one_tensor(schema: torch.FunctionSchema) -> bool:
    """Whether the operator returns a tensor, not several."""
    return [str(result.type) for result in schema.returns] == ["Tensor"]


def signature_of(schema: torch.FunctionSchema) -> inspect.Signature:
    """The signature as of a Python function."""
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature([
        inspect.Parameter(
            a.name, kinds[a.kwarg_only], default=a.default_value if a.has_default_value() else inspect.Parameter.empty
        )
        for a in schema.arguments
    ])  # fmt: skip


class Intercepted(TorchFunctionMode):
    """Sends the calls of some operators, in this thread, to their handlers."""

    def __init__(self, handlers: Mapping[OpOverload, Handler]) -> None:
        super().__init__()
        self._handlers = handlers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = getattr(func, "default", None) if isinstance(func, OpOverloadPacket) else func
        handler = self._handlers.get(operator) if isinstance(operator, OpOverload) else None
        return func(*args, **(kwargs or {})) if handler is None else handler(func, args, dict(kwargs or {}))
