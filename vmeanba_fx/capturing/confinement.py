"""What a capture changes in PyTorch while it runs: undone at its end, and seen by no other thread.

Captures wait for each other, because interception and ``torch.export`` itself change the whole process. Other threads go
on with models of their own meanwhile, so what can be told apart by thread is.
"""

from __future__ import annotations

import contextlib
import functools
import io
import linecache
import logging
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sympy.core.cache import clear_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import _symbolic_trace, graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

from .codeswap import CodeSwap

LOCK = threading.RLock()


def one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator for what handles symbolic sizes: those of one thread end up in the trace of another."""

    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with LOCK, _sources_that_go():
            return function(*args, **kwargs)

    return alone


@contextlib.contextmanager
def _sources_that_go() -> Iterator[None]:
    """Let the source of a graph's code go with the code: ``torch.fx`` keeps every one it ever made, for tracebacks.

    A transform makes some twenty graphs on its way. The code holds the names it uses in a dictionary of its own; an object
    put there tells when that is gone.
    """
    loader: Any = graph_module._loader  # private to torch, unchanged since 1.12
    thread = threading.get_ident()
    if "cache" in vars(loader):  # already so, in a call around this one
        yield
        return
    cache = loader.cache

    def cache_while_used(src: str, names: dict[str, Any], *args: Any, **kwargs: Any) -> str:
        key = cache(src, names, *args, **kwargs)
        if threading.get_ident() == thread:
            names["__source__"] = held = _Held()
            weakref.finalize(held, _drop_source, loader, key).atexit = False
        return key

    loader.cache = cache_while_used
    try:
        yield
    finally:
        del loader.cache


class _Held:
    """An object that can be watched."""


def _drop_source(loader: Any, key: str) -> None:
    loader.eval_cache.pop(key, None)
    linecache.cache.pop(key, None)


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Everything that a capture needs around it: alone, silent, in plain mode, and out of the way of other threads."""
    with contextlib.ExitStack() as stack:
        for context in (LOCK, _quiet(), _plain_mode(), _own_module_calls(), _own_compiler_flags(), _forgetting()):
            stack.enter_context(context)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.no_grad())
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings; and of a model that cannot be exported torch logs and prints the whole graph, where a sentence will do."""
    torch_log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = torch_log.level
    torch_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(_OtherThreads(sys.stderr)):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch_log.setLevel(level)


class _OtherThreads(io.TextIOBase):
    """A stream that passes on what other threads than this one write."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self.thread else self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


@contextlib.contextmanager
def _plain_mode() -> Iterator[None]:
    """Trace the model as it is, not as autocast, inference mode or ``torch.compile`` around it would make it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for device_type in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextlib.contextmanager
def _own_module_calls() -> Iterator[None]:
    """Let a trace see this thread's modules only.

    ``torch.fx`` replaces ``__call__`` and ``__getattr__`` of all modules while it traces. A model that another thread runs
    would be traced along with ours, and both would fail ("Unexpected key ...").
    """
    patcher: Any = _symbolic_trace._Patcher  # private to torch, unchanged since 1.9
    patch_method, thread = patcher.patch_method, threading.get_ident()

    def patch_for_this_thread(self: Any, cls: type, name: str, new: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        old = getattr(cls, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            return (new if threading.get_ident() == thread else old)(*args, **kwargs)

        patch_method(self, cls, name, method if threading.get_ident() == thread else new, *args, **kwargs)

    patcher.patch_method = patch_for_this_thread
    try:
        yield
    finally:
        patcher.patch_method = patch_method


@contextlib.contextmanager
def _own_compiler_flags() -> Iterator[None]:
    """Let ``torch.compiler.is_compiling()`` and ``is_exporting()`` be true in this thread only."""
    before: dict[Any, bool] = {fn: fn() for fn in (torch.compiler.is_compiling, torch.compiler.is_exporting)}
    with CodeSwap(before, lambda fn, original, *_: original(), elsewhere=lambda fn, *_: before[fn]):
        yield


class _CudaIsTheCpu(TorchFunctionMode):
    """Makes code that names CUDA (``x.cuda()``, ``device="cuda"``) stay on the CPU; modes are for one thread anyway."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        return func(*map(self._on_cpu, args), **{name: self._on_cpu(value) for name, value in (kwargs or {}).items()})

    @staticmethod
    def _on_cpu(value: Any) -> Any:
        named = isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] == "cuda")
        return torch.device("cpu") if named and torch.device(value).type == "cuda" else value


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """Run a model's code on the CPU, in this thread, also where it says that it wants to be elsewhere."""
    original, thread = torch.cuda.device, threading.get_ident()

    class Guard(contextlib.nullcontext[None]):
        def __new__(cls, device: Any) -> Any:  # of tensors on the CPU; would raise
            return super().__new__(cls) if threading.get_ident() == thread else original(device)

    torch.cuda.device = Guard  # type: ignore[misc]
    try:
        with _CudaIsTheCpu():
            yield
    finally:
        torch.cuda.device = original  # type: ignore[misc]


def forget_sizes() -> None:
    """Empty torch's and SymPy's caches of symbolic sizes: they stay for good and hold what traces were made of."""
    FakeTensorMode.cache_clear()
    for member in vars(ShapeEnv).values():
        if hasattr(member, "cache_clear"):
            member.cache_clear()
    clear_cache()


@contextlib.contextmanager
def _forgetting() -> Iterator[None]:
    try:
        yield
    finally:
        forget_sizes()
