"""What the process looks like to the model while it is traced; everything is put back afterwards."""

from __future__ import annotations

import builtins
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from . import source
from .guards import SymbolicTraceError
from .proxy import ShadowProxy, ShadowSize, has_proxy
from .tracer import ShadowTracer

# Functions that torch does not offer to proxies when they get sizes only: `torch.zeros(B, 4)`.
_FACTORIES = (
    "zeros ones empty full eye arange linspace logspace rand randn randint randperm normal tensor as_tensor "
    "scalar_tensor tril_indices triu_indices cartesian_prod broadcast_shapes"
).split()
# Modes a model may branch on; they are no values of the graph, so they are read and guarded.
_STATES = ("is_autocast_enabled", "is_grad_enabled", "is_inference_mode_enabled")


@contextmanager
def _replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)


class _SendToTracer(TorchFunctionMode):
    """Brings calls without any proxy to the tracer as well: factories, and arithmetic on the model's own tensors."""

    def __init__(self, tracer: ShadowTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._tracer.torch_function(func, args, kwargs or {})


def _isinstance(obj: Any, cls: Any, *, real: Callable[[Any, Any], bool] = isinstance) -> bool:
    """``isinstance`` that takes a proxy for what its shadow is.

    Not through ``__class__``: torch's C++ code would then take a proxy for a real tensor and read past its end.
    """
    if real(obj, cls):
        return True
    if type(obj) is ShadowProxy:
        return real(obj.shadow, cls)
    return type(obj) is ShadowSize and issubclass(torch.Size, cls)


def _factory(tracer: ShadowTracer, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if tracer.recording and has_proxy((args, kwargs)):
            return tracer.torch_function(function, args, kwargs)
        return function(*args, **kwargs)

    return call


def _state(tracer: ShadowTracer, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def read(*args: Any, **kwargs: Any) -> Any:
        # torch asks itself all the time; only a question of the model's own code is a decision of the model.
        if tracer.recording and source.asked_by_user():
            return tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)

    return read


def _autocast_enter(tracer: ShadowTracer, enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def checked(self: Any) -> Any:
        if tracer.recording:
            raise SymbolicTraceError("an autocast region is opened, which a module-level graph cannot hold")
        return enter(self)

    return checked


@contextmanager
def traced_world(tracer: ShadowTracer) -> Iterator[None]:
    """Context in which the model's Python runs on the proxies of ``tracer``."""
    with ExitStack() as stack:
        for name in _FACTORIES:
            stack.enter_context(_replaced(torch, name, _factory(tracer, getattr(torch, name))))
        for name in _STATES:
            stack.enter_context(_replaced(torch, name, _state(tracer, getattr(torch, name))))
        stack.enter_context(_replaced(torch.autocast, "__enter__", _autocast_enter(tracer, torch.autocast.__enter__)))
        stack.enter_context(_SendToTracer(tracer))
        stack.enter_context(_replaced(builtins, "isinstance", _isinstance))
        yield


@contextmanager
def same_random_numbers(devices: list[int]) -> Iterator[Callable[[], bool]]:
    """Context that starts from one fixed random state and leaves the caller's as it was.

    Gives a function that tells whether Python's and NumPy's generators are still where they were at the start; torch's
    may be used, for its random functions are nodes. (NumPy's global generator is the one a model would use.)
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(0)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        start = _numbers_ahead()
        try:
            yield lambda: _numbers_ahead() == start
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _numbers_ahead() -> tuple[object, ...]:
    state: Any = np.random.get_state()  # noqa: NPY002
    _, keys, position, *rest = state
    return random.getstate(), keys.tobytes(), position, *rest
