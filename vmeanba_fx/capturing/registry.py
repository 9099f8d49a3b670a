"""Which callables are selective scans, and how their arguments map to the canonical call.

A scan is recognised by its *signature* (the names of its parameters), never by its own name or by the
repository it comes from: public code has many functions called ``selective_scan_fn`` whose sixth argument
is ``z`` in one place and ``delta_bias`` in the next. :mod:`.families` registers what is known;
:func:`register_scan` adds others.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["ScanCall", "ScanSpec", "register_scan", "registered_scans", "unregister_scan"]


@dataclass(frozen=True)
class ScanCall:
    """One selective-scan call in canonical form.

    Shapes: ``u``, ``delta``, ``z`` are (B, K*D, L); ``A`` is (K*D, N); ``B``, ``C`` are (B, K, N, L);
    ``D`` and ``delta_bias`` are (K*D,). ``out_dtype`` is the dtype of y, ``None`` for the dtype of ``u``.
    ``restore`` brings y (B, K*D, L) to the layout that the caller expects, ``restore_state`` the last state (B, K*D, N);
    ``None`` where that is it.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    delta_bias: Tensor | None = None
    delta_softplus: bool = False
    out_dtype: torch.dtype | None = None
    return_last_state: bool = False
    restore: Callable[[Tensor], Tensor] | None = None
    restore_state: Callable[[Tensor], Tensor] | None = None

    def result(self, y: Tensor, last_state: Callable[[], Tensor]) -> Any:
        """What the caller gets: ``y``, and the last state where it asked for that."""
        y = y if self.restore is None else self.restore(y)
        if not self.return_last_state:
            return y
        state = last_state()
        return y, state if self.restore_state is None else self.restore_state(state)


class Refusal(Exception):
    """Raised by an adapter: this call is a scan, but not one our op computes. The message is a sentence."""


Adapter = Callable[[Mapping[str, Any]], ScanCall]


@dataclass(frozen=True)
class ScanSpec:
    """How to recognise one family of scan callables.

    ``leading``: names of the first parameters, in order (``ctx`` of an ``autograd.Function`` is skipped).
    ``allowed``: names that may follow. ``adapt`` maps the bound arguments, by name, to a :class:`ScanCall`.
    ``target``: a callable that is this scan whatever its signature says. ``recognise`` decides by the parameter names in
    place of ``leading`` and ``allowed``. ``proof``: take a function for the scan only where running it shows that it is.
    """

    name: str
    leading: tuple[str, ...]
    allowed: frozenset[str]
    adapt: Adapter
    target: object | None = field(default=None, compare=False)
    recognise: Callable[[tuple[str, ...]], bool] | None = None
    proof: bool = False

    def matches(self, parameters: tuple[str, ...]) -> bool:
        """True where a signature with these parameter names belongs to this family."""
        if self.recognise is not None:
            return self.recognise(parameters)
        n = len(self.leading)
        return parameters[:n] == self.leading and set(parameters[n:]) <= self.allowed


_SPECS: dict[str, ScanSpec] = {}


def register_scan(
    name: str,
    target: Callable[..., Any] | None = None,
    *,
    parameters: tuple[str, ...] | None = None,
    optional: tuple[str, ...] = (),
    adapt: Adapter,
) -> ScanSpec:
    """Teach the capture step a new selective-scan call.

    Args:
        name: what to call the family in messages; a name that is already registered is an error.
        target: the Python function or ``autograd.Function`` class itself. With it, only that object matches.
        parameters: names of the leading parameters that identify the signature, in order; needed without ``target``.
        optional: names of further parameters the signature may have.
        adapt: gets the bound arguments by parameter name (defaults filled in) and returns a :class:`ScanCall`.

    Raises:
        ValueError: the name is taken, or neither ``target`` nor ``parameters`` is given.
        TypeError: ``target`` or ``adapt`` is no callable.

    A capture runs the function and the adapter's :class:`ScanCall` on a few steps of the model's own inputs, on small ones,
    and with each of those zero; where they differ, the scan is left as it is and :func:`vmeanba_fx.find_sites` says so.

    Example::

        vmeanba_fx.register_scan(
            "my scan", my_module.scan,
            adapt=lambda a: vmeanba_fx.ScanCall(a["x"], a["dt"], a["A"], a["B"], a["C"], delta_softplus=True),
        )
    """
    if target is None and not parameters:
        raise ValueError(f"register_scan({name!r}): give the function itself (target=...) or its parameters=(...)")
    for what, given in (("target", target), ("adapt", adapt)):
        if not callable(given) and (given is not None or what == "adapt"):
            raise TypeError(f"register_scan({name!r}): {what}={given!r} is not callable")
    return add_family(ScanSpec(name, tuple(parameters or ()), frozenset(optional), adapt, target))


def add_family(spec: ScanSpec) -> ScanSpec:
    """What :func:`register_scan` ends with, for families that are recognised in ways it has no option for.

    Raises:
        ValueError: the name is taken.
    """
    if spec.name in _SPECS:
        raise ValueError(f"a scan named {spec.name!r} is registered already; unregister_scan({spec.name!r}) removes it")
    _SPECS[spec.name] = spec
    return spec


def unregister_scan(name: str) -> None:
    """Forget a registered scan.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in _SPECS:
        raise ValueError(f"no scan named {name!r} is registered; these are: {', '.join(_SPECS)}")
    del _SPECS[name]


def registered_scans() -> dict[str, ScanSpec]:
    """A copy of the registry, in order of registration; later entries are tried first."""
    return dict(_SPECS)


def parameter_names(fn: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters of ``fn`` without ``ctx``/``self`` and without ``*args``/``**kwargs``; () if unreadable."""
    if isinstance(fn, types.FunctionType) and not fn.__dict__:  # not wrapped: what inspect would read, at once
        names = names_in_code(fn)
    else:
        try:
            parameters = inspect.signature(fn).parameters.values()
        except (TypeError, ValueError):
            return ()
        names = tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return names[1:] if names[:1] in (("ctx",), ("self",)) else names


def names_in_code(fn: types.FunctionType) -> tuple[str, ...]:
    """Names of all parameters of ``fn``, ``ctx`` and ``self`` too, or of what it wraps: at once, no signature is made."""
    code = fn.__code__
    if code.co_flags & inspect.CO_VARARGS and hasattr(fn, "__wrapped__"):
        with contextlib.suppress(ValueError):  # a cycle of wrappers
            code = getattr(inspect.unwrap(fn), "__code__", code)
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def find_spec(fn: object, parameters: tuple[str, ...]) -> ScanSpec | None:
    """The family that ``fn`` belongs to: by identity first, then by signature; ``None`` if it is no known scan."""
    specs = list(reversed(_SPECS.values()))
    for spec in specs:
        if spec.target is not None and spec.target is fn:
            return spec
    for spec in specs:
        if spec.target is None and spec.matches(parameters):
            return spec
    return None


def is_scan(target: object) -> bool:
    """Whether a callable, a function or the ``apply`` of an ``autograd.Function``, belongs to a registered family."""
    owner = getattr(target, "__self__", None)
    target = owner if isinstance(owner, type) else target
    fn = getattr(target, "forward", target) if isinstance(target, type) else target
    return callable(fn) and find_spec(target, parameter_names(fn)) is not None


def looks_like_scan(parameters: tuple[str, ...]) -> bool:
    """True for a signature that starts like a selective scan but that no registered family explains."""
    return parameters[:3] == ("u", "delta", "A") and "B" in parameters


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a scan computes in. (``torch.promote_types`` would be recorded as a node while a model is traced.)"""
    return torch.float64 if dtype == torch.float64 else torch.float32
