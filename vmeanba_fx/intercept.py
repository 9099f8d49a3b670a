"""Redirect every selective scan a model can reach to one registered op, for the time of a trace.

Public code refers to its scan in many ways: module globals, from-imports, ``self.selective_scan = fn``,
``functools.partial``, closures, default arguments, dictionaries of variants, ``autograd.Function.apply``, pybind
modules. Patching names misses most of them. So the *code object* of the Python function is swapped in place (every
reference sees that), ``forward`` is swapped on ``autograd.Function`` classes (a captured ``.apply`` sees that), and
``fwd`` is swapped or injected on the pybind modules. Everything is put back when the context ends, whatever happened.

A signature alone does not prove what a function computes: a helper ``scan(u, delta, A, B, C)`` may add its own bias.
So a function is tried once on its own first call (:mod:`vmeanba_fx.trial`), and left alone where it computes something
else; the scan it calls is found as well. Threads other than the one that captures run the original code throughout.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .discovery import PYBIND, Discovery, discover
from .registry import Refusal, ScanCall, ScanSpec, canonical, compute_dtype, registered_scans
from .trial import case_of, disagreement

Emit = Callable[[ScanCall], Any]

log = logging.getLogger(__name__)

# One capture at a time: the swaps are visible to the whole process.
_LOCK = threading.RLock()
_HANDLERS: dict[int, Callable[..., Any]] = {}
_KEYS = itertools.count()


def _dispatch(key: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _HANDLERS[key](*args, **kwargs)


def _trampoline(key: int, n_free: int) -> types.CodeType:
    """Code with ``n_free`` free variables (a function only takes code with as many as its own) that calls _dispatch."""
    free = [f"_free{i}" for i in range(n_free)]
    lines = [
        "def outer():",
        *(f"    {name} = None" for name in free),
        "    def trampoline(*args, **kwargs):",
        *(f"        {name}" for name in free),
        "        from vmeanba_fx.intercept import _dispatch",
        f"        return _dispatch({key}, args, kwargs)",
        "    return trampoline",
    ]
    scope: dict[str, Any] = {}
    exec("\n".join(lines), scope)
    return scope["outer"]().__code__


def _bind(
    parameters: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> inspect.BoundArguments:
    try:
        bound = parameters.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}(): {error}") from None
    bound.apply_defaults()
    return bound


def _mamba_ssm_signature(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
) -> Any:  # fmt: skip
    """The signature of mamba-ssm's function; only its parameters are used."""


class Interception:
    """The swaps of one capture. ``refused`` collects (where, sentence) of scans that were left as they are."""

    def __init__(self, emit: Emit, where: Callable[[], str]) -> None:
        self.emit = emit
        self.where = where
        self.refused: list[tuple[str, str]] = []
        self.untried: list[str] = []
        self._thread = threading.get_ident()
        self._entered = 0
        self._verdicts: dict[tuple[object, ...], str] = {}
        self._undo: list[Callable[[], None]] = []

    def _call(
        self, spec: ScanSpec, signature: inspect.Signature, name: str, original: Callable[..., Any],
        args: tuple[Any, ...], kwargs: dict[str, Any],
    ) -> Any:  # fmt: skip
        """One call of a swapped function: our op, or ``original`` where this is not a scan that the op computes."""
        if threading.get_ident() != self._thread:
            return original(*args, **kwargs)
        self._entered += 1
        bound = _bind(signature, args, kwargs, name)
        try:
            call = spec.adapt(bound.arguments)
        except Refusal as refusal:
            self.refused.append((self.where(), str(refusal)))
            return original(*args, **kwargs)
        case = (id(signature), *case_of(bound.arguments))
        if case not in self._verdicts:
            self._verdicts[case] = self._verdict(spec, name, original, bound)
            if self._verdicts[case]:
                log.info("%s has the signature of a scan but is none: %s", name, self._verdicts[case])
        return original(*args, **kwargs) if self._verdicts[case] else self.emit(call)

    def _verdict(self, spec: ScanSpec, name: str, original: Callable[..., Any], bound: inspect.BoundArguments) -> str:
        """Why a function is not the scan its signature says; empty where it is, or where that has to be believed."""
        entered = self._entered
        verdict = disagreement(original, bound, lambda given: self.emit(spec.adapt(given)))
        if verdict is not None:
            return verdict
        if self._entered > entered or "self" in bound.signature.parameters:
            # A wrapper around another scan, or a method with values of its own: believing it could be silently wrong.
            return "it fails"
        self.untried.append(name)  # a kernel for another device, presumably
        return ""

    def swap_function(self, fn: types.FunctionType, spec: ScanSpec) -> None:
        signature = inspect.signature(fn)
        saved = (fn.__code__, fn.__defaults__, fn.__kwdefaults__)
        original = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
        original.__kwdefaults__ = fn.__kwdefaults__
        key = next(_KEYS)

        def handle(*args: Any, **kwargs: Any) -> Any:
            return self._call(spec, signature, fn.__qualname__, original, args, kwargs)

        _HANDLERS[key] = handle
        # Defaults first: code without positional parameters must not meet leftover defaults.
        fn.__defaults__, fn.__kwdefaults__ = None, None
        fn.__code__ = _trampoline(key, len(fn.__code__.co_freevars))

        def undo() -> None:
            fn.__code__, fn.__defaults__, fn.__kwdefaults__ = saved
            # Another thread may be inside the trampoline still.
            _HANDLERS[key] = original

        self._undo.append(undo)

    def swap_class(self, cls: type, spec: ScanSpec) -> None:
        raw = cls.__dict__["forward"]
        forward = getattr(raw, "__func__", raw)
        signature = inspect.signature(forward)
        first = next(iter(signature.parameters), "")
        if first == "ctx":
            signature = signature.replace(parameters=list(signature.parameters.values())[1:])

        def handle(*args: Any, **kwargs: Any) -> Any:
            return self._call(spec, signature, cls.__qualname__, forward, args, kwargs)

        def handle_with_ctx(ctx: Any, *args: Any, **kwargs: Any) -> Any:
            return self._call(spec, signature, cls.__qualname__, functools.partial(forward, ctx), args, kwargs)

        cls.forward = staticmethod(handle_with_ctx if first == "ctx" else handle)  # type: ignore[attr-defined]
        self._undo.append(lambda: setattr(cls, "forward", raw))

    def swap_pybind(self, found: Discovery) -> None:
        for name, parameters in PYBIND.items():
            forward = self._pybind_forward(name, parameters)
            module = sys.modules.get(name)
            if module is not None and hasattr(module, "fwd"):
                original = module.fwd
                module.fwd = forward  # type: ignore[attr-defined]
                self._undo.append(functools.partial(setattr, module, "fwd", original))
            stub = types.SimpleNamespace(fwd=forward)
            for namespace, missing in found.missing_pybind:
                if missing == name and name not in namespace:
                    namespace[name] = stub
                    self._undo.append(functools.partial(namespace.pop, name, None))

    def supply_missing(self, found: Discovery) -> None:
        """Give code that failed to import mamba-ssm its scan, under mamba-ssm's own signature."""
        signature = inspect.signature(_mamba_ssm_signature)
        adapt = registered_scans()["selective_scan"].adapt

        def supplied(*args: Any, **kwargs: Any) -> Any:
            return self.emit(adapt(_bind(signature, args, kwargs, "selective_scan_fn").arguments))

        for namespace, name in found.missing_functions:
            if name not in namespace:
                namespace[name] = supplied
                self._undo.append(functools.partial(namespace.pop, name, None))

    def _pybind_forward(self, name: str, parameters: tuple[str, ...]) -> Callable[..., Any]:
        signature = inspect.Signature(
            [inspect.Parameter(p, inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in parameters]
        )

        def forward(*args: Any, **kwargs: Any) -> list[Tensor]:
            a = _bind(signature, args, kwargs, f"{name}.fwd").arguments
            out_dtype = compute_dtype(a["u"].dtype) if a.get("oflex") else None
            call = canonical(
                a["u"], a["delta"], a["A"], a["B"], a["C"], a["D"], None, a["delta_bias"], a["delta_softplus"],
                out_dtype, return_last_state=True,
            )  # fmt: skip
            out, last_state = self.emit(call)
            # Callers read the last state as x[:, :, -1, 1::2].
            states = [out, last_state.repeat_interleave(2, dim=-1).unsqueeze(2)]
            if a.get("z") is not None:
                states.append((out * torch.nn.functional.silu(a["z"].to(out.dtype))).to(out.dtype))
            return states

        return forward

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()


@contextlib.contextmanager
def intercept(model: nn.Module, emit: Emit, where: Callable[[], str]) -> Iterator[tuple[Interception, Discovery]]:
    """Send every scan that ``model`` can reach to ``emit`` while the context is open; restore all of it at the end."""
    with _LOCK:
        interception = Interception(emit, where)
        try:
            found = discover(model)
            for fn, spec in found.functions.items():
                interception.swap_function(fn, spec)
            for cls, spec in found.classes.items():
                interception.swap_class(cls, spec)
            interception.swap_pybind(found)
            interception.supply_missing(found)
            yield interception, found
        finally:
            interception.undo()


@contextlib.contextmanager
def cpu_device_guard() -> Iterator[None]:
    """Make ``torch.cuda.device(...)`` do nothing in this thread: captures run on the CPU, where it would raise."""
    original, thread = torch.cuda.device, threading.get_ident()

    class Guard(contextlib.nullcontext[None]):
        def __new__(cls, device: Any) -> Any:
            return super().__new__(cls) if threading.get_ident() == thread else original(device)

    torch.cuda.device = Guard  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.cuda.device = original  # type: ignore[misc]
