"""The tracer proper: what happens when the model's Python calls torch, a leaf, or one of its modules."""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.fx.graph import _snake_case
from torch.overrides import is_tensor_method_or_property

from ..capturing.registry import looks_like_scan
from . import forms, source
from .functions import function_for, has_setup_context
from .guards import SymbolicTraceError
from .leaves import LeafFunctions, Listener, ScanObserver, is_layer, is_scan_signature
from .proxy import ShadowMethod, ShadowProxy, has_proxy
from .recorder import Recorder, input_names
from .values import run_scan

# What may be asked of a real tensor outside of the graph: it says nothing about its data, dtype or device.
_HARMLESS = forms.FORM | frozenset({"data_ptr", "__hash__", "__repr__", "__format__"})
_CHECKPOINT_OPTIONS = frozenset(
    "use_reentrant context_fn determinism_check debug early_stop preserve_rng_state".split()
)


class _Context:
    """Stands for ``ctx`` when ``autograd.Function.forward`` is traced into: takes anything, does nothing."""

    needs_input_grad: tuple[bool, ...] = ()

    def _nothing(self, *args: object, **kwargs: object) -> None:
        return None

    save_for_backward = save_for_forward = mark_dirty = mark_non_differentiable = set_materialize_grads = _nothing


def _changes_in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__")


class ShadowTracer(Recorder, Listener):
    """Traces a model into layers, leaf functions, tensor operations and guards."""

    def __init__(
        self, model: nn.Module, replica: nn.Module, leaves: LeafFunctions, observer: ScanObserver,
        leaf_modules: tuple[type[nn.Module], ...],
    ) -> None:  # fmt: skip
        super().__init__(model, replica)
        self.failed_in: tuple[str, str] | None = None  # path and class of the innermost module that raised
        self._leaves = leaves
        self._observer = observer
        self._leaf_modules = leaf_modules
        self._entered: set[types.CodeType] = set()  # code that made nodes
        self._led_to_scan: set[types.CodeType] = set()  # code that called a scan

    def annotate(self, node: fx.Node, value: Any) -> None:
        """Also remember whose code made the node."""
        super().annotate(node, value)
        self._entered.update(frame.f_code for frame in source.user_frames())

    # Attributes and methods of proxies.

    def read_attribute(self, proxy: ShadowProxy, name: str) -> Any:
        """``proxy.name``: a proxy for data, a callable for a method, or the value itself."""
        shadow = proxy.shadow
        with self.on_shadows():
            value = getattr(shadow, name)  # AttributeError as the value itself would raise it
        if isinstance(shadow, dict) and name in ("values", "items"):
            return lambda: [proxy[key] if name == "values" else (key, proxy[key]) for key in shadow]
        if inspect.isroutine(value):
            return ShadowMethod(proxy, name)
        if not self.recording:
            return value
        if isinstance(shadow, Tensor) and name == "shape":
            return self.shape(proxy)
        if isinstance(shadow, Tensor) and name == "ndim":
            return self.rank(proxy)
        passed_on = False
        if isinstance(value, (torch.dtype, torch.device)):
            frame = next(source.user_frames(), None)
            passed_on = frame is not None and source.is_passed_on(frame, name, self._leaves.is_leaf)
        return self.create_proxy("call_function", getattr, (proxy, name), {}, value=value, passed_on=passed_on)

    def call_tensor_method(self, owner: ShadowProxy, name: str, args: Any, kwargs: Any) -> Any:
        """``owner.name(*args, **kwargs)``."""
        if isinstance(owner.shadow, Tensor):
            if name in ("dim", "ndimension"):
                return self.rank(owner)
            if name == "size" and not args and not kwargs:
                return self.shape(owner)
            if name == "__setitem__":
                return self.in_place(operator.setitem, (owner, *args), kwargs)
            if _changes_in_place(name):
                return self.in_place(getattr(torch.Tensor, name), (owner, *args), kwargs)
        return self.create_proxy("call_method", name, (owner, *args), kwargs)

    # Calls that reach torch.

    def torch_function(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Any torch function or tensor method called while tracing, with or without proxies among its arguments."""
        if not self.recording:
            return func(*args, **kwargs)
        name = forms.name_of(func)
        method = is_tensor_method_or_property(func)
        traced = has_proxy((args, kwargs))
        if method and not traced and name in _HARMLESS:
            return func(*args, **kwargs)
        if not method:
            return self._function(func, args, kwargs, traced)
        owner = args[0]
        if not isinstance(owner, ShadowProxy):
            if _changes_in_place(name):
                raise SymbolicTraceError(f"a tensor that is kept between calls is changed in place ({name})")
            owner = self.attribute(owner)
        if name == "__get__":
            return getattr(owner, func.__self__.__name__)
        if name == "__getitem__":
            return self.create_proxy("call_function", operator.getitem, (owner, *args[1:]), kwargs)
        return self.call_tensor_method(owner, name, args[1:], kwargs)

    def _function(self, func: Any, args: Any, kwargs: Any, traced: bool) -> Any:
        if traced:
            return self.create_proxy("call_function", func, args, kwargs)
        # A factory, whose result is fresh in every call, a function of the model's own tensors, or of no tensor at all.
        with self.on_shadows():
            value = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs, value))):
            return value
        return self.create_proxy("call_function", func, args, kwargs, value=value)

    # Leaves.

    def leaf_called(self, fn: types.FunctionType, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One node for a call of a scan or another leaf function."""
        is_scan = fn in self._leaves.scans
        if not self.recording or not has_proxy((args, kwargs)):
            return run_scan(fn, original, args, kwargs) if is_scan else original(*args, **kwargs)
        return self._leaf_node(fn, args, kwargs, is_scan)

    def apply_called(self, cls: type, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One node for an ``autograd.Function``, which keeps its backward; traced into if a scan hides in it."""
        is_scan = is_scan_signature(cls)
        if not self.recording or not has_proxy((args, kwargs)):
            run = functools.partial(original, cls)
            return run_scan(cls, run, args, kwargs) if is_scan else run(*args, **kwargs)
        if cls in self._observer.classes and cls not in self._leaves.classes:
            context = () if has_setup_context(cls) else (_Context(),)
            return cls.forward(*context, *args, **kwargs)  # type: ignore[attr-defined]
        return self._leaf_node(function_for(cls), args, kwargs, is_scan)

    def _leaf_node(self, target: types.FunctionType, args: Any, kwargs: Any, is_scan: bool) -> Any:
        result = self.create_proxy("call_function", target, args, kwargs, name=_snake_case(target.__name__))
        if is_scan:
            self._led_to_scan.update(frame.f_code for frame in source.user_frames())
        return result

    def checkpoint_called(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Activation checkpointing does not change what is computed: call the function itself."""
        if not self.recording:
            return original(*args, **kwargs)
        return args[0](*args[1:], **{k: v for k, v in kwargs.items() if k not in _CHECKPOINT_OPTIONS})

    # Modules.

    def path_of_module(self, mod: nn.Module) -> str:
        """Path of a submodule, also when a closure reached the original instead of the copy."""
        path = self.paths.get(id(mod))
        if path is None:
            raise SymbolicTraceError(f"{type(mod).__name__} is called but is no submodule of the model")
        return path

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers, and what the caller asked for; never the model itself, nor a layer with a scan inside."""
        if module_qualified_name == "":
            return False
        if isinstance(m, self._leaf_modules):
            return True
        return is_layer(m) and id(m) not in self._observer.modules

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One node for a layer; other modules are traced into."""
        if not self.recording:
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or (self.paths.get(id(m), ""), type(m).__name__)
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """A parameter or buffer read from a module."""
        if not self.recording or type(attr_val) is ShadowProxy or not isinstance(attr_val, Tensor):
            return attr_val
        return self.attribute(attr_val)

    # The whole model.

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Placeholders named as ``forward``'s parameters; ``forward`` may be an attribute of the instance."""
        values = concrete_args or ()
        inputs = []
        for name, value in zip(input_names(self.replica, len(values)), values, strict=True):
            node = self.create_node("placeholder", name, (), {})
            self.annotate(node, value)
            if value is None:
                self.decide(node, None)
            inputs.append(self.wrap(node, value))
        return source.run_model, [self.replica, *inputs]

    def finish(self) -> fx.Graph:
        """The graph, after refusing models whose Python went another way unseen."""
        if self.raised is not None:
            raise SymbolicTraceError(f"the model catches an error and goes another way ({self.raised})")
        for path, module in self.replica.named_modules():
            for name, state in (*module._parameters.items(), *module._buffers.items()):
                if isinstance(state, ShadowProxy):
                    raise SymbolicTraceError(f"{path}.{name} is assigned in forward(), so one call depends on the last")
        for code in self._entered - self._led_to_scan:
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            if looks_like_scan(names):
                raise SymbolicTraceError(
                    f"{code.co_name}{names} looks like a selective scan but is defined while the model runs, so that "
                    "its calls cannot be kept as one node; define it outside of forward()"
                )
        self.drop_unread_sizes()
        self.graph._tracer_cls = ReplayTracer
        return self.graph


class ReplayTracer(fx.Tracer):
    """Traces the printed code of a graph again, which is how fx unpickles: each function it calls stays one node."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of a module that was generated from a traced one."""
        functions = (v for v in type(root).forward.__globals__.values() if isinstance(v, types.FunctionType))
        self._autowrap_function_ids.update(map(id, functions))
        graph = super().trace(root, concrete_args)
        for node in graph.nodes:
            node.meta.pop("is_wrapped", None)  # would register the printed names with fx for good
        return graph
