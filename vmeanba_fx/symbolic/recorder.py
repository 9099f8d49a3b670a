"""Making nodes while their values are computed, and turning what Python must know into guards."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from . import forms, source
from .guards import SymbolicTraceError, check_guard
from .proxy import ShadowProxy, ShadowSize, proxies_in, shadows_of

_NO_VALUE = object()
# Values that Python decides upon without asking them anything (`is`, a dictionary key): never given out as proxies.
_SETTLED = (bool, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)


class Recorder(fx.Tracer):
    """An fx tracer whose proxies carry values. ``replica``: the private copy of ``model`` that is traced."""

    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module, replica: nn.Module) -> None:
        super().__init__()
        self.constants: dict[str, Tensor] = {}  # the tensor behind each get_attr node
        self.replica = replica
        self.raised: Exception | None = None
        # The original too: a lambda or closure kept by the model still refers to it after the copy.
        self.paths = {id(m): name for owner in (model, replica) for name, m in owner.named_modules()}
        self._tensors = {id(t): (name, t) for owner in (model, replica) for name, t in _named_tensors(owner)}
        self._attributes: dict[str, ShadowProxy] = {}
        self._known: dict[Any, Any] = {}
        self._guarded: set[Any] = set()
        self._ranked: set[fx.Node] = set()
        self._scalars: set[fx.Node] = set()
        self._shadow_depth = 0

    # Values.

    @contextmanager
    def on_shadows(self) -> Iterator[None]:
        """Context in which code runs on concrete values and nothing is recorded."""
        self._shadow_depth += 1
        try:
            yield
        finally:
            self._shadow_depth -= 1

    @property
    def recording(self) -> bool:
        """False while an operation is run on shadows."""
        return self._shadow_depth == 0

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = shadows_of(args), shadows_of(kwargs)
        try:
            with self.on_shadows():
                if kind == "call_function":
                    return target(*args, **kwargs)
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                return self.replica.get_submodule(target)(*args, **kwargs)
        except Exception as error:
            self.raised = error
            raise

    # Nodes.

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None,
        proxy_factory_fn: Any = None, *, value: Any = _NO_VALUE, passed_on: bool = False,
    ) -> Any:  # fmt: skip
        """Make a node, run it on the shadows, and wrap the result (or return it, where Python needs it as it is).

        ``value``: the result, where it is known already. ``passed_on``: a dtype or device that may stay symbolic.
        """
        new_args, new_kwargs = self.create_arg(args), self.create_arg(kwargs)
        key = self._key(kind, target, args, kwargs, f"{new_args} {new_kwargs} {passed_on}")
        if key is not None and key in self._known:
            return self._known[key]
        inputs = list(proxies_in((args, kwargs)))
        constant = all(p.static for p in inputs)
        if value is _NO_VALUE:
            value = self._evaluate(kind, target, args, kwargs)
        if constant and kind == "call_method" and target in forms.FORM:
            return value
        node = self.create_node(kind, target, new_args, new_kwargs, name, type_expr)
        self.annotate(node, value)
        static = constant and forms.shape_is_constant(target, args, value)
        leaf = self.replica.get_submodule(target) if kind == "call_module" else None
        if static or forms.rank_follows(kind, target, args, kwargs, leaf, self._ranked):
            self._ranked.add(node)
        if key is not None:
            self._scalars.add(node)
        result = self.wrap(node, value, static, forms.has_fixed_length(target, args, value, inputs), passed_on)
        if key is not None:
            self._known[key] = result
        return result

    def _key(self, kind: str, target: Any, args: Any, kwargs: Any, operands: str) -> Any:
        """A key under which arithmetic on sizes is made once, or None for anything else."""
        if target is getattr or (kind == "call_method" and target in forms.FORM):
            return kind, target, operands
        inputs = [p.shadow for p in proxies_in((args, kwargs))]
        arithmetic = kind == "call_function" and getattr(target, "__module__", "") in ("_operator", "math", "builtins")
        if arithmetic and inputs and not any(isinstance(s, Tensor) for s in inputs):
            return kind, target, operands
        return None

    def wrap(
        self, node: fx.Node, value: Any, static: bool = False, fixed_length: bool = False, passed_on: bool = False
    ) -> Any:
        """The Python object that stands for ``node``: a proxy, or the value itself."""
        if value is None:
            return None
        if isinstance(value, _SETTLED) and not passed_on:
            return self.decide(node, value)
        proxy = ShadowProxy(node, self, value, static, fixed_length)
        if isinstance(value, torch.Size):
            return ShadowSize(proxy[i] for i in range(self.length(proxy)))
        return proxy

    def annotate(self, node: fx.Node, value: Any) -> None:
        """Note the example's shape, dtype and source lines on a node, for printing."""
        if isinstance(value, Tensor):
            with self.on_shadows():
                node.meta["tensor_meta"] = _extract_tensor_metadata(value)
        if frames := list(source.user_frames()):
            node.stack_trace = source.stack_trace(frames)

    def create_arg(self, a: Any) -> Any:
        """Proxies become nodes; tensors and modules become ``get_attr`` nodes; the rest as fx does it."""
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, ShadowSize):
            return tuple(self.create_arg(item) for item in a)
        if isinstance(a, Tensor):
            return self.attribute(a).node
        if isinstance(a, nn.Module):
            if path := self.paths.get(id(a)):
                return self.create_node("get_attr", path, (), {})
            raise SymbolicTraceError(f"{type(a).__name__} is handed to a function, but is no submodule of the model")
        return super().create_arg(a)

    def attribute(self, tensor: Tensor) -> ShadowProxy:
        """The ``get_attr`` proxy of a parameter, buffer, tensor attribute or constant."""
        # The tensor is kept beside its name, so that its id stays its own.
        name, _ = self._tensors.setdefault(id(tensor), (f"_constant{len(self.constants)}", tensor))
        if name not in self._attributes:
            self.constants[name] = tensor
            node = self.create_node("get_attr", name, (), {})
            self.annotate(node, tensor)
            self._ranked.add(node)
            self._attributes[name] = ShadowProxy(node, self, tensor, static=True, fixed_length=False)
        return self._attributes[name]

    def in_place(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A function that changes its first argument."""
        has_side_effect(target)  # or fx's dead code elimination drops it where nobody reads its result
        self._known.clear()  # it may have changed a shape
        if forms.changes_rank(target):
            self._ranked.difference_update(p.node for p in proxies_in(args[:1]))
        return self.create_proxy("call_function", target, args, kwargs)

    def drop_unread_sizes(self) -> None:
        """Erase size arithmetic and attributes that nothing uses."""
        for node in reversed(self.graph.nodes):
            if not node.users and (node in self._scalars or node.op == "get_attr"):
                self.graph.erase_node(node)

    # Decisions.

    def decide(self, proxy: ShadowProxy | fx.Node, value: Any) -> Any:
        """Return ``value``, which Python is about to rely on, and have the graph check it when it runs."""
        node = proxy.node if isinstance(proxy, fx.Proxy) else proxy
        key = (node, type(value), value)
        if self.recording and key not in self._guarded:
            self._guarded.add(key)
            frame = next(source.user_frames(), None)
            where = f"`{forms.describe(node, self._scalars)}` in {self.scope.module_path or 'the model'}"
            where += f", {source.line_of(frame)}" if frame is not None else ""
            self.create_node("call_function", check_guard, (node, value, where), {})
        return value

    def rank(self, proxy: ShadowProxy) -> int:
        """Number of dimensions of a tensor."""
        rank: int = proxy.shadow.dim()
        if proxy.node not in self._ranked:
            self._ranked.add(proxy.node)
            node = self.create_node("call_method", "dim", (proxy.node,), {})
            self._scalars.add(node)
            self.decide(node, rank)
        return rank

    def shape(self, proxy: ShadowProxy) -> Any:
        """``x.shape``: ints for a constant, otherwise one proxy a dimension."""
        if proxy.static:
            return proxy.shadow.shape
        name = proxy.node.name
        return ShadowSize(
            self.create_proxy("call_method", "size", (proxy, i), {}, name=f"{name}_size{i}")
            for i in range(self.rank(proxy))
        )

    def length(self, proxy: ShadowProxy) -> int:
        """``len(proxy)``."""
        if isinstance(proxy.shadow, Tensor):
            if self.rank(proxy) == 0:
                raise TypeError("len() of a 0-d tensor")
            return operator.index(self.shape(proxy)[0])
        length = len(proxy.shadow)
        if not proxy.fixed_length and isinstance(proxy.shadow, (tuple, list)):
            node = self.create_node("call_function", len, (proxy.node,), {})
            self._scalars.add(node)
            self.decide(node, length)
            proxy.fixed_length = True
        return length

    def iter(self, obj: Any) -> Iterator[Any]:
        """Items of a tensor along its first dimension, of a returned tuple or list, or keys of a returned dict."""
        if isinstance(obj.shadow, dict):
            return iter(list(obj.shadow))
        if not isinstance(obj.shadow, (Tensor, tuple, list)):
            raise TypeError(f"{type(obj.shadow).__name__!r} object is not iterable")
        return (obj[i] for i in range(self.length(obj)))


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and tensors kept as plain attributes, with their paths."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
    for path, owner in module.named_modules():
        for name, value in vars(owner).items():
            if isinstance(value, Tensor):
                yield f"{path}.{name}" if path else name, value


def input_names(model: nn.Module, count: int) -> list[str]:
    """Names for ``count`` positional inputs: those of ``forward``'s parameters."""
    positional, rest = [], None
    for p in inspect.signature(model.forward).parameters.values():
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            positional.append(p.name)
        elif p.kind is p.VAR_POSITIONAL:
            rest = p.name
    if count > len(positional) and rest is None:
        raise SymbolicTraceError(
            f"forward() takes {len(positional)} positional inputs, but {count} example inputs were given"
        )
    return positional[:count] + [f"{rest}_{i}" for i in range(count - len(positional))]
