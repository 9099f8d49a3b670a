"""Which callables are selective scans, and how their arguments map to the canonical call.

A scan is recognised by its *signature* (the names of its parameters), never by its own name or by the
repository it comes from: public code has many functions called ``selective_scan_fn`` whose sixth argument
is ``z`` in one place and ``delta_bias`` in the next. What the built-in entries cover was read from the sources
of state-spaces/mamba (``selective_scan_interface.py``), MzeroMiko/VMamba (``csms6s.py``), their vendored copies and
the pybind modules underneath. :func:`register_scan` adds others; built-in families use it as well.
"""

from __future__ import annotations

import inspect
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


class Refusal(Exception):
    """Raised by an adapter: this call is a scan, but not one our op computes. The message is a sentence."""


Adapter = Callable[[Mapping[str, Any]], ScanCall]


@dataclass(frozen=True)
class ScanSpec:
    """How to recognise one family of scan callables.

    ``leading``: names of the first parameters, in order (``ctx`` of an ``autograd.Function`` is skipped).
    ``allowed``: names that may follow. ``adapt`` maps the bound arguments, by name, to a :class:`ScanCall`.
    ``target``: a callable that is this scan whatever its signature says.
    """

    name: str
    leading: tuple[str, ...]
    allowed: frozenset[str]
    adapt: Adapter
    target: object | None = field(default=None, compare=False)

    def matches(self, parameters: tuple[str, ...]) -> bool:
        """True where a signature with these parameter names belongs to this family."""
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

    Example::

        vmeanba_fx.register_scan(
            "my scan", my_module.scan,
            adapt=lambda a: vmeanba_fx.ScanCall(a["x"], a["dt"], a["A"], a["B"], a["C"], delta_softplus=True),
        )
    """
    if name in _SPECS:
        raise ValueError(f"a scan named {name!r} is registered already; unregister_scan({name!r}) removes it")
    if target is None and not parameters:
        raise ValueError(f"register_scan({name!r}): give the function itself (target=...) or its parameters=(...)")
    spec = ScanSpec(name, tuple(parameters or ()), frozenset(optional), adapt, target)
    _SPECS[name] = spec
    return spec


def unregister_scan(name: str) -> None:
    """Remove a registered scan; ``KeyError`` where there is none of that name."""
    del _SPECS[name]


def registered_scans() -> dict[str, ScanSpec]:
    """A copy of the registry, in order of registration; later entries are tried first."""
    return dict(_SPECS)


def parameter_names(fn: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters of ``fn`` without ``ctx``/``self`` and without ``*args``/``**kwargs``; () if unreadable."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return ()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return tuple(names[1:] if names[:1] in (["ctx"], ["self"]) else names)


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


def canonical(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, out_dtype: torch.dtype | None = None, return_last_state: bool = False,
) -> ScanCall:  # fmt: skip
    """Bring the layouts that public code uses for B and C to (B, K, N, L), and refuse what the op does not compute."""
    if A.is_complex() or B.is_complex() or C.is_complex():
        raise Refusal("A is complex (S4-style); only real selective scans are supported")
    batch, channels, length = u.shape

    def grouped(t: Tensor, name: str) -> Tensor:
        if t.dim() == 4:
            return t
        if t.dim() == 3:
            return t.unsqueeze(1)
        if t.dim() == 2:  # constant over time: one group per channel
            return t[None, :, :, None].expand(batch, channels, t.shape[1], length)
        raise Refusal(f"{name} has {t.dim()} dimensions; expected (B, K, N, L), (B, N, L) or (D, N)")

    B4, C4 = grouped(B, "B"), grouped(C, "C")
    if B4.shape[1] != C4.shape[1]:
        groups = max(B4.shape[1], C4.shape[1])
        B4, C4 = (t.repeat_interleave(groups // t.shape[1], dim=1) for t in (B4, C4))
    if delta.shape[1] != channels:
        raise Refusal(f"delta has {delta.shape[1]} channels where u has {channels} (delta_dim != dim)")
    return ScanCall(u, delta, A, B4, C4, D, z, delta_bias, bool(delta_softplus), out_dtype, bool(return_last_state))


def _by_name(a: Mapping[str, Any]) -> ScanCall:
    # VMamba's wrappers name their fp16-in, fp32-out option `oflex`; mamba-ssm's have no such option and keep u's dtype.
    out_dtype = compute_dtype(a["u"].dtype) if a.get("oflex") else None
    return canonical(
        a["u"], a["delta"], a["A"], a["B"], a["C"], a.get("D"), a.get("z"), a.get("delta_bias"),
        a.get("delta_softplus", False), out_dtype, bool(a.get("return_last_state")),
    )  # fmt: skip


def _plural(a: Mapping[str, Any]) -> ScanCall:
    return canonical(
        a["us"], a["dts"], a["As"], a["Bs"], a["Cs"], a.get("Ds"), None, a.get("delta_bias"),
        a.get("delta_softplus", False), None, bool(a.get("return_last_state")),
    )  # fmt: skip


def _spelled_out(a: Mapping[str, Any]) -> ScanCall:
    return canonical(
        a["u"], a["delta"], a["a_matrix"], a["b_matrix"], a["c_matrix"], a.get("d_vector"), None,
        a.get("delta_bias"), a.get("delta_softplus", False),
    )  # fmt: skip


def _two_dimensional(a: Mapping[str, Any]) -> ScanCall:
    raise Refusal("it runs a 2-D recurrence (HH, WW), not a scan along one sequence")


def _state_only(a: Mapping[str, Any]) -> ScanCall:
    raise Refusal("it has no C and returns the states h; only scans that return y are supported")


_OPTIONS = ("D", "z", "delta_bias", "delta_softplus", "return_last_state", "oflex", "backend", "nrows", "backnrows")
# The most specific entry last: entries are tried from the end.
register_scan(
    "2-D selective scan",
    parameters=("u", "delta", "A", "B", "C"),
    optional=(*_OPTIONS, "HH", "WW"),
    adapt=_two_dimensional,
)
register_scan("selective_scan", parameters=("u", "delta", "A", "B", "C"), optional=_OPTIONS, adapt=_by_name)
register_scan(
    "selective_scan (VMamba easy)",
    parameters=("us", "dts", "As", "Bs", "Cs"),
    optional=("Ds", "delta_bias", "delta_softplus", "return_last_state", "chunksize"),
    adapt=_plural,
)
register_scan(
    "selective_scan (spelled-out names)",
    parameters=("u", "delta", "a_matrix", "b_matrix", "c_matrix"),
    optional=("d_vector", "delta_bias", "delta_softplus", "use_associative_scan"),
    adapt=_spelled_out,
)
register_scan(
    "state-returning scan",
    parameters=("u", "delta", "A", "B", "D"),
    optional=("z", "delta_bias", "delta_softplus", "return_last_state"),
    adapt=_state_only,
)
