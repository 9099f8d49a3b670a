"""Find every selective scan that a model's code can reach, however it refers to it.

From the model the search follows attributes, partials, bound methods, closures, default arguments, containers, class
members, and the globals that functions name. Scans at the top of other loaded modules, libraries aside, are taken too.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .operators import foreign_schemas, gives_one_tensor
from .registry import ScanSpec, find_spec, looks_like_scan, names_in_code, parameter_names
from .standins import PYBIND_CONVOLUTION, StandIn, find_stand_in

# Packages that contain no selective scan; not walking them keeps discovery fast and away from foreign lazy modules.
_FOREIGN = frozenset(
    {"torch", "numpy", "einops", "functools", "math", "typing", "vmeanba_fx", "torchvision", "sklearn", "matplotlib",
     "scipy", "PIL", "triton", "cupy", "tqdm", "safetensors", "builtins", "collections", "copy", "abc"}
)  # fmt: skip
PYBIND = {
    "selective_scan_cuda": ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus"),
    "selective_scan_cuda_core": ("u", "delta", "A", "B", "C", "D", "delta_bias", "delta_softplus", "nrows"),
    "selective_scan_cuda_oflex": ("u", "delta", "A", "B", "C", "D", "delta_bias", "delta_softplus", "nrows", "oflex"),
}
_COMPILED = frozenset({*PYBIND, PYBIND_CONVOLUTION[0]})
# Functions of mamba-ssm and of VMamba's kernels by the names they are imported under. Much code swallows the ImportError,
# so that without these packages the name is simply missing; then, and only then, it is supplied while tracing.
IMPORTED = ("selective_scan_fn", "selective_scan_ref", "selective_scan_fn_v1")
_MAX_CONTAINER = 512  # a registry of scan variants is small; a longer container is data


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
    """What :func:`discover` found: ``functions``, ``classes`` and ``operators`` with their spec, pybind users, look-alikes.

    ``companions`` and ``companion_classes``: compiled code around scans, with what stands in for it on the CPU.
    """

    def __init__(self) -> None:
        self.functions: dict[types.FunctionType, ScanSpec] = {}
        self.classes: dict[type, ScanSpec] = {}
        self.operators: list[tuple[torch.FunctionSchema, ScanSpec]] = []
        self.companions: dict[types.FunctionType, StandIn] = {}
        self.companion_classes: dict[type, StandIn] = {}
        self.missing_pybind: list[tuple[dict[str, Any], str]] = []
        self.missing_functions: list[tuple[dict[str, Any], str]] = []
        self.lookalikes: set[str] = set()

    def consider(self, obj: types.FunctionType | type) -> None:
        """Record ``obj``, a function or an ``autograd.Function`` class, if its signature is that of a scan."""
        fn = obj.__dict__.get("forward", None) if isinstance(obj, type) else obj
        fn = getattr(fn, "__func__", fn)
        if not callable(fn) or (getattr(fn, "__module__", None) or "").startswith("vmeanba_fx."):
            return
        if not isinstance(obj, type) and getattr(fn, "__code__", None) and fn.__code__.co_varnames[:1] == ("ctx",):
            return  # the forward of a Function, which is swapped on the class
        parameters = parameter_names(fn)
        if (spec := find_spec(obj, parameters)) is not None:
            if isinstance(obj, type):
                self.classes[obj] = spec
            else:
                self.functions[obj] = spec
        elif (stand_in := find_stand_in(parameters)) is not None:
            if isinstance(obj, type):
                self.companion_classes[obj] = stand_in
            else:
                self.companions[obj] = stand_in

    def consider_operator(self, schema: torch.FunctionSchema) -> None:
        """Record an operator if its signature is that of a scan; as a look-alike where it returns more than one tensor."""
        parameters = tuple(argument.name for argument in schema.arguments)
        if (spec := find_spec(None, parameters)) is not None:
            if gives_one_tensor(schema):
                self.operators.append((schema, spec))
            else:
                self.lookalikes.add(f"torch.ops.{schema.name.replace('::', '.')}({', '.join(parameters)})")

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
    if isinstance(obj, types.MethodType):  # a captured `SomeFunction.apply` is one: its __self__ is the class
        return [obj.__func__, obj.__self__]
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
            return [*obj.__bases__, *(child for method in methods for child in _function_children(method, found))]
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
            if value is None and name in _COMPILED and name not in sys.modules:  # an import that failed
                found.missing_pybind.append((fn.__globals__, name))
            elif isinstance(value, types.ModuleType):
                if not _is_foreign(value.__name__):
                    out += [vars(value)[n] for n in names if n in vars(value)]
            else:
                out.append(value)
        elif name in _COMPILED and name not in sys.modules:
            found.missing_pybind.append((fn.__globals__, name))
        elif name in IMPORTED:
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
                    isinstance(value, types.FunctionType) and len(names_in_code(value)) >= 5
                ):
                    found.consider(value)
    for schema in foreign_schemas():
        found.consider_operator(schema)
    return found


def _is_autograd_function(obj: object) -> TypeGuard[type]:
    return isinstance(obj, type) and issubclass(obj, torch.autograd.Function)
