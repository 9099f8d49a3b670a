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
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .registry import (
    Refusal,
    ScanCall,
    ScanSpec,
    canonical,
    compute_dtype,
    find_spec,
    looks_like_scan,
    parameter_names,
    registered_scans,
)
from .trial import case_of, disagreement

# Packages that contain no selective scan; not walking them keeps discovery fast and away from foreign lazy modules.
_FOREIGN = frozenset(
    {"torch", "numpy", "einops", "functools", "math", "typing", "vmeanba_fx", "torchvision", "sklearn", "matplotlib",
     "scipy", "PIL", "triton", "cupy", "tqdm", "safetensors", "builtins", "collections", "copy", "abc"}
)  # fmt: skip
_PYBIND = {
    "selective_scan_cuda": ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus"),
    "selective_scan_cuda_core": ("u", "delta", "A", "B", "C", "D", "delta_bias", "delta_softplus", "nrows"),
    "selective_scan_cuda_oflex": ("u", "delta", "A", "B", "C", "D", "delta_bias", "delta_softplus", "nrows", "oflex"),
}
# mamba-ssm's functions by the names they are imported under. Much code swallows the ImportError, so that on a machine
# without mamba-ssm the name is simply missing; then, and only then, it is supplied while tracing.
_MAMBA_SSM = ("selective_scan_fn", "selective_scan_ref")
_MAX_CONTAINER = 512  # a registry of scan variants is small; a longer container is data

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


def _is_foreign(module: str | None) -> bool:
    root = (module or "").partition(".")[0]
    return root in _FOREIGN or (root in sys.stdlib_module_names and root != "__main__")


def _code_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names |= _code_names(const)
    return names


class Discovery:
    """What :func:`discover` found: ``functions`` and ``classes`` with their spec, pybind users, look-alikes."""

    def __init__(self) -> None:
        self.functions: dict[types.FunctionType, ScanSpec] = {}
        self.classes: dict[type, ScanSpec] = {}
        self.missing_pybind: list[tuple[dict[str, Any], str]] = []
        self.missing_functions: list[tuple[dict[str, Any], str]] = []
        self.lookalikes: set[str] = set()

    def consider(self, obj: types.FunctionType | type) -> None:
        """Record ``obj``, a function or an ``autograd.Function`` class, if its signature is that of a scan."""
        fn = obj.__dict__.get("forward", None) if isinstance(obj, type) else obj
        fn = getattr(fn, "__func__", fn)
        if not callable(fn):
            return
        parameters = parameter_names(fn)
        spec = find_spec(obj, parameters)
        if spec is None:
            return
        if isinstance(obj, type):
            self.classes[obj] = spec
        else:
            self.functions[obj] = spec

    def consider_lookalike(self, fn: types.FunctionType) -> None:
        """Record ``fn``, code of the model itself, if it might be a scan of a signature that nobody registered."""
        parameters = parameter_names(fn)
        letters = {name.lower() for name in parameters}
        parts = {"a", "b", "c"} <= letters and bool({"delta", "deltas", "dt", "dts"} & letters)
        if (parts or looks_like_scan(parameters)) and find_spec(fn, parameters) is None:
            self.lookalikes.add(f"{fn.__module__}.{fn.__qualname__}({', '.join(parameters)})")


def _children(obj: object, found: Discovery) -> Iterable[object]:
    """Objects one step away from ``obj`` that may hold a scan."""
    if isinstance(obj, nn.Module):
        skip = {"_parameters", "_buffers", "_modules"}
        graph = getattr(obj, "graph", None)
        targets = [n.target for n in graph.nodes if callable(n.target)] if isinstance(graph, torch.fx.Graph) else []
        return [type(obj), *(v for k, v in vars(obj).items() if k not in skip), *obj.children(), *targets]
    if isinstance(obj, (functools.partial, functools.partialmethod)):
        return [obj.func, *obj.args, *obj.keywords.values()]
    if isinstance(obj, types.MethodType):
        return [obj.__func__]
    if isinstance(obj, types.BuiltinMethodType):  # a captured `SomeFunction.apply`
        return [obj.__self__] if isinstance(obj.__self__, type) else []
    if isinstance(obj, (staticmethod, classmethod)):
        return [obj.__func__]
    if isinstance(obj, property):
        return [f for f in (obj.fget, obj.fset) if f is not None]
    if isinstance(obj, type):
        if _is_foreign(obj.__module__):
            return []
        members = [(k, v) for c in obj.__mro__ if not _is_foreign(c.__module__) for k, v in vars(c).items()]
        if issubclass(obj, torch.autograd.Function):  # its forward is swapped on the class; look behind it
            methods = [getattr(v, "__func__", v) for k, v in members if k != "backward"]
            return [child for method in methods for child in _function_children(method, found)]
        return [v for _, v in members]
    if isinstance(obj, Mapping) and not isinstance(obj, types.MappingProxyType):
        return list(obj.values()) if len(obj) <= _MAX_CONTAINER else []
    if isinstance(obj, (list, tuple, set, frozenset)):
        return list(obj) if len(obj) <= _MAX_CONTAINER else []
    if isinstance(obj, types.FunctionType):
        return _function_children(obj, found)
    if isinstance(obj, types.SimpleNamespace) or (hasattr(obj, "__dict__") and not _is_foreign(type(obj).__module__)):
        return [type(obj), *vars(obj).values()]
    return []


def _function_children(fn: object, found: Discovery) -> list[object]:
    if not isinstance(fn, types.FunctionType) or _is_foreign(fn.__module__):
        return []
    out: list[object] = [*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
    for cell in fn.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            out.append(cell.cell_contents)
    if (wrapped := getattr(fn, "__wrapped__", None)) is not None:
        out.append(wrapped)
    names = _code_names(fn.__code__)
    for name in names:
        if name in fn.__globals__:
            value = fn.__globals__[name]
            if isinstance(value, types.ModuleType):
                if not _is_foreign(value.__name__):
                    out += [vars(value)[n] for n in names if n in vars(value)]
            else:
                out.append(value)
        elif name in _PYBIND and name not in sys.modules:
            found.missing_pybind.append((fn.__globals__, name))
        elif name in _MAMBA_SSM:
            found.missing_functions.append((fn.__globals__, name))
    return out


def discover(model: nn.Module) -> Discovery:
    """Every selective scan that code of ``model`` can reach, and every one in a loaded module that is no library."""
    found = Discovery()
    seen: set[int] = set()
    stack: list[object] = [model]
    keep: list[object] = []  # temporaries stay alive, or ids would be reused
    while stack:
        obj = stack.pop()
        if id(obj) in seen or isinstance(obj, (Tensor, str, bytes, int, float, types.ModuleType, type(None))):
            continue
        seen.add(id(obj))
        keep.append(obj)
        if isinstance(obj, types.FunctionType):
            found.consider(obj)
            found.consider_lookalike(obj)
        elif _is_autograd_function(obj):
            found.consider(obj)
        # A scan is walked into as well: it may be a wrapper that does more, around the scan proper.
        stack.extend(_children(obj, found))
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType) and not _is_foreign(module.__name__):
            for value in list(vars(module).values()):
                # The number of arguments first: reading a signature is slow, and there are thousands of functions.
                if _is_autograd_function(value) or (
                    isinstance(value, types.FunctionType) and _argument_count(value) >= 5
                ):
                    found.consider(value)
    return found


def _argument_count(fn: types.FunctionType) -> int:
    inner = getattr(fn, "__wrapped__", fn)
    code = getattr(inner, "__code__", fn.__code__)
    return code.co_argcount + code.co_kwonlyargcount


def _is_autograd_function(obj: object) -> bool:
    return isinstance(obj, type) and issubclass(obj, torch.autograd.Function)


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
        self._thread = threading.get_ident()
        self._verdicts: dict[tuple[object, ...], str] = {}
        self._undo: list[Callable[[], None]] = []

    def _call(
        self, spec: ScanSpec, signature: inspect.Signature, name: str, original: Callable[..., Any],
        args: tuple[Any, ...], kwargs: dict[str, Any],
    ) -> Any:  # fmt: skip
        """One call of a swapped function: our op, or ``original`` where this is not a scan that the op computes."""
        if threading.get_ident() != self._thread:
            return original(*args, **kwargs)
        bound = _bind(signature, args, kwargs, name)
        try:
            call = spec.adapt(bound.arguments)
        except Refusal as refusal:
            self.refused.append((self.where(), str(refusal)))
            return original(*args, **kwargs)
        case = (id(signature), *case_of(bound.arguments))
        if case not in self._verdicts:
            self._verdicts[case] = disagreement(original, bound, lambda given: self.emit(spec.adapt(given)))
            if self._verdicts[case]:
                log.info("%s has the signature of a scan but is none: %s", name, self._verdicts[case])
        return original(*args, **kwargs) if self._verdicts[case] else self.emit(call)

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
        for name, parameters in _PYBIND.items():
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


class CpuDeviceGuard:
    """Stand-in for ``torch.cuda.device`` while tracing on the CPU, where ``torch.cuda.device(x.device)`` raises."""

    def __init__(self, device: Any) -> None:
        del device

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        return None


@contextlib.contextmanager
def cpu_device_guard() -> Iterator[None]:
    """Replace ``torch.cuda.device`` by a guard that does nothing, as captures always run on the CPU."""
    original = torch.cuda.device
    torch.cuda.device = CpuDeviceGuard  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.cuda.device = original  # type: ignore[misc]
