"""The proxies of the tracer: an fx proxy that also knows the value its node has on the example inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .guards import SymbolicTraceError

if TYPE_CHECKING:
    from .recorder import Recorder
    from .tracer import ShadowTracer

_SETTERS = frozenset({"data", "grad", "requires_grad", "real", "imag", "names"})


class ShadowSize(tuple[Any, ...]):
    """``x.shape``: a tuple of ints and int proxies, one a dimension, so that Python can unpack, slice and join it."""

    def __getitem__(self, index: Any) -> Any:
        item = super().__getitem__(index)
        return ShadowSize(item) if isinstance(index, slice) else item

    def __add__(self, other: tuple[Any, ...]) -> ShadowSize:
        return ShadowSize((*self, *other))

    def numel(self) -> Any:
        """Product of all dimensions."""
        total: Any = 1
        for size in self:
            total = total * size
        return total


class ShadowProxy(fx.Proxy):
    """An fx proxy with a ``shadow``, the concrete value of its node on the example inputs.

    Operations become nodes and are run on the shadows at once. Whatever Python must know (truth, length, an index) is
    answered from the shadow and recorded as a guard. ``static``: the value depends on parameters and constants only,
    never on an input, so its shape is a constant of the model.
    """

    tracer: ShadowTracer

    def __init__(self, node: fx.Node, tracer: Recorder, shadow: Any, static: bool, fixed_length: bool) -> None:
        super().__init__(node, tracer)
        self.shadow = shadow
        self.static = static
        self.fixed_length = fixed_length

    def __repr__(self) -> str:
        return f"ShadowProxy({self.node.name})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return self.tracer.read_attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTERS and isinstance(self.__dict__.get("shadow"), Tensor):
            raise SymbolicTraceError(f"setting .{name} of a traced tensor leaves no trace in a graph")
        object.__setattr__(self, name, value)

    @classmethod
    def __torch_function__(cls, orig_method: Any, types: Any, args: Any = None, kwargs: Any = None) -> Any:
        args, kwargs = args or (), kwargs or {}
        return first_proxy((args, kwargs)).tracer.torch_function(orig_method, args, kwargs)

    # What Python must know now.

    def __bool__(self) -> bool:
        return self.tracer.decide(self, bool(self.shadow))

    def __int__(self) -> int:
        return self._number(int)

    def __float__(self) -> float:
        return self._number(float)

    def __index__(self) -> int:
        return self._number(operator.index)

    def _number(self, convert: Callable[[Any], Any]) -> Any:
        number = self.item() if isinstance(self.shadow, Tensor) else self
        if not isinstance(number, ShadowProxy):  # a bool, settled already
            return convert(number)
        if type(number.shadow) is float and convert is int:  # only the integer part matters
            number = self.tracer.create_proxy("call_function", int, (number,), {})
        return convert(self.tracer.decide(number, number.shadow))

    if TYPE_CHECKING:  # fx adds its operators at run time

        def __getitem__(self, index: Any) -> Any: ...

    def __len__(self) -> int:
        return self.tracer.length(self)

    def __iter__(self) -> Iterator[Any]:
        return self.tracer.iter(self)

    def __reversed__(self) -> Iterator[Any]:
        return reversed(list(self))

    def __contains__(self, item: object) -> bool:
        if isinstance(self.shadow, dict):
            return item in self.shadow
        if isinstance(self.shadow, Tensor):
            same: Any = self == item
            return bool(same.any())
        return any(item is own or item == own for own in self)

    def __hash__(self) -> int:
        if isinstance(self.shadow, (int, float, complex, tuple, torch.dtype, torch.device)):
            return hash(self.tracer.decide(self, self.shadow))
        return object.__hash__(self)

    def __str__(self) -> str:
        # A number or dtype in a string may become the key of a cache.
        return str(self.tracer.decide(self, self.shadow)) if self._is_scalar() else repr(self)

    def __format__(self, spec: str) -> str:
        return format(self.tracer.decide(self, self.shadow), spec) if self._is_scalar() else format(repr(self), spec)

    def __array__(self, *args: object, **kwargs: object) -> Any:
        raise SymbolicTraceError("a traced value was handed to NumPy, which leaves no trace in a graph")

    def _is_scalar(self) -> bool:
        return isinstance(self.shadow, (int, float, complex, torch.dtype, torch.device))

    def keys(self) -> Any:
        """Keys of a dict that an operation returned; fx.Proxy has this method too, for ``**proxy``."""
        return list(self.shadow) if isinstance(self.shadow, dict) else self.tracer.read_attribute(self, "keys")()

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.in_place(operator.setitem, (self, index, value), {})

    # Arithmetic that fx.Proxy lacks.

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self


def _define_in_place(name: str) -> None:
    function = getattr(operator, name)

    def method(self: ShadowProxy, other: Any) -> Any:
        if not isinstance(self.shadow, Tensor):
            return NotImplemented  # an int: Python falls back on the plain operator
        return self.tracer.in_place(function, (self, other), {})

    method.__name__ = method.__qualname__ = f"__{name}__"
    setattr(ShadowProxy, f"__{name}__", method)


for _name in "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift".split():
    _define_in_place(_name)


class ShadowMethod:
    """A method read from a proxy, ``x.view`` say; calling it makes a node."""

    def __init__(self, owner: ShadowProxy, name: str) -> None:
        self.owner = owner
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.owner.tracer.call_tensor_method(self.owner, self.name, args, kwargs)


def _children(obj: Any) -> Iterable[Any]:
    if isinstance(obj, (tuple, list, set, frozenset)):
        return obj
    if isinstance(obj, dict):
        return obj.values()
    if isinstance(obj, slice):
        return (obj.start, obj.stop, obj.step)
    return ()


def proxies_in(obj: Any) -> Iterator[ShadowProxy]:
    """Every proxy in nested tuples, lists, sets, dicts and slices."""
    if type(obj) is ShadowProxy:
        yield obj
    else:
        for child in _children(obj):
            yield from proxies_in(child)


def first_proxy(obj: Any) -> ShadowProxy:
    """The first of :func:`proxies_in`; there must be one."""
    return next(proxies_in(obj))


def has_proxy(obj: Any) -> bool:
    """Whether :func:`proxies_in` finds any."""
    return next(proxies_in(obj), None) is not None


def shadows_of(obj: Any) -> Any:
    """``obj`` with each proxy replaced by its shadow."""
    if type(obj) is ShadowProxy:
        return obj.shadow
    if isinstance(obj, tuple):
        items = [shadows_of(item) for item in obj]
        return type(obj)(*items) if hasattr(obj, "_fields") else tuple(items)
    if type(obj) in (list, set, frozenset):
        return type(obj)(shadows_of(item) for item in obj)
    if type(obj) is dict:
        return {key: shadows_of(value) for key, value in obj.items()}
    if isinstance(obj, slice):
        return slice(shadows_of(obj.start), shadows_of(obj.stop), shadows_of(obj.step))
    return obj
