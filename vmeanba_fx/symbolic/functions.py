"""``autograd.Function`` classes as graph nodes."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch


@functools.cache
def function_for(cls: type) -> types.FunctionType:
    """A plain function that calls ``cls.apply``, with the name of ``cls`` and the signature of its ``forward``.

    fx cannot print a node whose target is ``cls.apply`` itself: it takes the bound method for ``torch.autograd.function
    .apply``, which does not exist.
    """

    def apply(*args: Any) -> Any:
        return cls.apply(*args)  # type: ignore[attr-defined]

    from_torch = cls.__module__.split(".")[0] == "torch"  # fx would print such a name without importing it
    apply.__module__ = "vmeanba_fx.symbolic" if from_torch else cls.__module__
    apply.__name__, apply.__qualname__, apply.__doc__ = cls.__name__, cls.__qualname__, cls.__doc__
    signature = signature_of_apply(cls)
    if signature is not None:
        apply.__signature__ = signature  # type: ignore[attr-defined]
    return apply  # type: ignore[return-value]  # a def is one


def signature_of_apply(cls: type) -> Any:
    """Signature of ``forward`` as ``apply`` takes it (without ``ctx``), or None where it cannot be read."""
    try:
        signature = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return None
    parameters = list(signature.parameters.values())
    return signature.replace(parameters=parameters if has_setup_context(cls) else parameters[1:])


def has_setup_context(cls: type) -> bool:
    """Whether ``forward`` takes no ``ctx`` because a separate ``setup_context`` gets it."""
    return cls.setup_context is not torch.autograd.Function.setup_context  # type: ignore[attr-defined]
