"""What stays one node: which functions, ``autograd.Function`` classes and modules are leaves, and where scans hide."""

from __future__ import annotations

import functools
import gc
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from ..capturing.codeswap import CodeSwap, is_original
from ..capturing.registry import find_spec, looks_like_scan, names_in_code, parameter_names, registered_scans
from .guards import SymbolicTraceError, check_guard
from .values import run_scan

_APPLY = torch.autograd.Function.__dict__["apply"]


def _native_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
    return _APPLY.__get__(None, cls)(*args, **kwargs)


# A Python classmethod until torch 2.13: one code object for all classes, also behind a captured `SomeFunction.apply`.
# Compiled since 2.14: there the attribute is replaced, and a captured `.apply` is not seen.
APPLY: Any = _APPLY.__func__ if isinstance(_APPLY, classmethod) else _native_apply
# Recomputes activations in the backward pass; what it computes is the function it is given.
CHECKPOINT: Any = torch.utils.checkpoint.checkpoint
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def is_scan_signature(candidate: object) -> bool:
    """Whether a function, method, partial or ``autograd.Function`` class has the parameters of a selective scan."""
    while isinstance(candidate, (functools.partial, types.MethodType)):
        candidate = candidate.func if isinstance(candidate, functools.partial) else candidate.__func__
    described = candidate
    if isinstance(candidate, type):
        if not issubclass(candidate, torch.autograd.Function):
            return False
        described = candidate.forward
    if not callable(described):
        return False
    names = parameter_names(described)
    return _is_known(candidate, names) or looks_like_scan(names)


def _is_known(candidate: object, names: tuple[str, ...]) -> bool:
    """Whether a signature alone says that this is a scan."""
    spec = find_spec(candidate, names)
    return spec is not None and not spec.proof


def loaded_scan_functions() -> set[types.FunctionType]:
    """Every scan function that exists in this process: global, method, closure, or held by nothing but an attribute."""
    found = {spec.target for spec in registered_scans().values() if isinstance(spec.target, types.FunctionType)}
    verdicts: dict[tuple[str, ...], bool] = {}  # there are tens of thousands of functions, and few signatures
    for fn in _functions():
        names = names_in_code(fn)
        if len(names) < 5 or names[0] == "ctx":  # a Function's forward is reached through `apply`
            continue
        if names not in verdicts:
            own = names[1:] if names[0] == "self" else names
            verdicts[names] = _is_known(None, own) or looks_like_scan(own)
        if verdicts[names] and not is_original(fn) and not _is_internal(fn):
            found.add(fn)
    return found


def _functions() -> list[types.FunctionType]:
    """Every function of this process, those included that ``gc.freeze()`` keeps from being listed.

    Objects made since then are frozen with the rest: the collector cannot tell them apart.
    """
    frozen = gc.get_freeze_count() > 0
    if frozen:
        gc.unfreeze()
    try:
        return [obj for obj in gc.get_objects() if type(obj) is types.FunctionType]
    finally:
        if frozen:
            gc.freeze()


def _is_internal(fn: types.FunctionType) -> bool:
    """Whether ``fn`` is a part of this package that no model calls."""
    module = fn.__module__ or ""
    return module.startswith("vmeanba_fx.") and module not in ("vmeanba_fx.ops", "vmeanba_fx.ops.naive")


def _functions_of_einops() -> set[types.FunctionType]:
    module = sys.modules.get("einops")  # its functions inspect their arguments' types, which a proxy does not survive
    names = ("rearrange", "reduce", "repeat", "einsum", "pack", "unpack")
    return {f for n in names if isinstance(f := getattr(module, n, None), types.FunctionType)}


def _functions_of_our_ops() -> set[types.FunctionType]:
    module = sys.modules.get("vmeanba_fx.ops")
    names = getattr(module, "__all__", ())
    return {f for n in names if isinstance(f := getattr(module, n, None), types.FunctionType)}


class LeafFunctions:
    """The functions and ``autograd.Function`` classes a trace keeps as one node each."""

    def __init__(self, extra: Iterable[object] = ()) -> None:
        self.scans = loaded_scan_functions()
        self.others: set[Any] = _functions_of_einops() | _functions_of_our_ops() | {check_guard}
        self.classes: set[type] = set()
        for leaf in extra:
            self._add(leaf)

    def _add(self, leaf: object) -> None:
        owner = getattr(leaf, "__self__", None)
        if isinstance(leaf, functools.partial):
            self._add(leaf.func)
        elif isinstance(owner, type) and issubclass(owner, torch.autograd.Function):  # `SomeFunction.apply`
            self.classes.add(owner)
        elif isinstance(leaf, types.MethodType):
            self._add(leaf.__func__)
        elif isinstance(leaf, types.FunctionType):
            self.others.add(leaf)
        elif isinstance(leaf, type) and issubclass(leaf, torch.autograd.Function):
            self.classes.add(leaf)
        elif not isinstance(leaf, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):  # ops are leaves anyway
            raise SymbolicTraceError(
                f"leaf_functions takes Python functions, autograd.Function classes and torch ops; {leaf!r} is none "
                "of them. A module class goes into leaf_modules=(...)."
            )

    def is_leaf(self, obj: object) -> bool:
        """Whether calls of ``obj`` become one node."""
        return isinstance(obj, types.FunctionType) and (obj in self.scans or obj in self.others)

    @contextmanager
    def intercepted(self, listener: Listener) -> Iterator[None]:
        """Context in which calls of the leaves go to ``listener``."""

        def handle(fn: types.FunctionType, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if fn is APPLY:
                return listener.apply_called(args[0], original, args[1:], kwargs)
            if fn is CHECKPOINT:
                return listener.checkpoint_called(original, args, kwargs)
            return listener.leaf_called(fn, original, args, kwargs)

        with CodeSwap(self.scans | self.others | {APPLY, CHECKPOINT}, handle):
            if APPLY is not _native_apply:
                yield
                return
            torch.autograd.Function.apply = classmethod(APPLY)  # type: ignore[assignment,method-assign]
            try:
                yield
            finally:
                torch.autograd.Function.apply = _APPLY  # type: ignore[method-assign]


class Listener:
    """Is told of every call of a leaf function; this one lets them run."""

    def leaf_called(self, fn: types.FunctionType, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """``fn`` was called, which ``original`` runs."""
        return original(*args, **kwargs)

    def apply_called(self, cls: type, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """``cls.apply(*args)`` was called for an ``autograd.Function``."""
        return original(cls, *args, **kwargs)

    def checkpoint_called(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """``torch.utils.checkpoint.checkpoint`` was called."""
        return original(*args, **kwargs)


class ScanObserver(Listener):
    """Watches one eager forward and remembers which modules and ``autograd.Function`` classes have a scan inside.

    Those must be traced into: as leaves they would hide it.
    """

    def __init__(self, leaves: LeafFunctions) -> None:
        self.modules: set[int] = set()  # ids of modules
        self.classes: set[type] = set()
        self._leaves = leaves
        self._open_modules: list[int] = []
        self._open_classes: list[type] = []
        self._inside = False

    def leaf_called(self, fn: types.FunctionType, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Remember what is open around a scan."""
        return self._scan(fn, original, args, kwargs) if fn in self._leaves.scans else original(*args, **kwargs)

    def apply_called(self, cls: type, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A Function that is a scan, or one in which a scan may be called."""
        if is_scan_signature(cls):
            return self._scan(cls, functools.partial(original, cls), args, kwargs)
        self._open_classes.append(cls)
        try:
            return original(cls, *args, **kwargs)
        finally:
            self._open_classes.pop()

    def _scan(self, scan: object, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not self._inside:
            self.modules.update(self._open_modules)
            self.classes.update(self._open_classes)
        outer, self._inside = self._inside, True
        try:
            return run_scan(scan, original, args, kwargs)
        finally:
            self._inside = outer

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context of the forward to watch."""
        enter = nn.modules.module.register_module_forward_pre_hook(lambda m, _: self._open_modules.append(id(m)))
        leave = nn.modules.module.register_module_forward_hook(
            lambda *_: void(self._open_modules.pop()), always_call=True
        )
        try:
            with self._leaves.intercepted(self):
                yield
        finally:
            enter.remove()
            leave.remove()


def void(_: object) -> None:
    """Nothing: a forward hook that returns something replaces the module's output."""


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a layer, shown as one ``call_module`` node where it hides no scan.

    Layers are the modules of ``torch.nn`` (except containers) and einops, and any module without submodules that has
    weights or derives from such a layer. Modules without weights (a permutation, a patch merge) are traced into.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if isinstance(module, _CONTAINERS):
        return False
    if type(module).__module__.startswith(("torch.nn.", "torch.ao.", "einops.")):
        return True
    if next(module.children(), None) is not None:
        return False
    derived = any(c is not nn.Module and c.__module__.startswith("torch.nn.") for c in type(module).__mro__)
    return derived or bool(module._parameters or module._buffers)
