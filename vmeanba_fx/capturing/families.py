"""The scan signatures of public code, and how each maps to the canonical call.

Read from the sources of state-spaces/mamba (``selective_scan_interface.py``, ``ssd_combined.py``), MzeroMiko/VMamba
(``csms6s.py``), their vendored copies and the pybind modules underneath; ``docs/families.md`` says which models were run.
The most specific entry is registered last, because entries are tried from the end. The first one takes any function
with the parts of a scan under their usual names, and only where running it proves what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Refusal, ScanCall, ScanSpec, add_family, compute_dtype, register_scan

_OPTIONS = ("D", "z", "delta_bias", "delta_softplus", "return_last_state", "oflex", "backend", "nrows", "backnrows")


def canonical(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, out_dtype: torch.dtype | None = None, return_last_state: bool = False,
    restore: Callable[[Tensor], Tensor] | None = None, restore_state: Callable[[Tensor], Tensor] | None = None,
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
    return ScanCall(
        u, delta, A, B4, C4, D, z, delta_bias, bool(delta_softplus), out_dtype, bool(return_last_state), restore, restore_state
    )


def _by_name(a: Mapping[str, Any]) -> ScanCall:
    # VMamba's wrappers name their fp16-in, fp32-out option `oflex`; mamba-ssm's have no such option and keep u's dtype.
    out_dtype = compute_dtype(a["u"].dtype) if a.get("oflex") else None
    parts = {name: a.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")}
    return _oriented(parts, bool(a.get("delta_softplus")), out_dtype, bool(a.get("return_last_state")))


def _oriented(
    p: dict[str, Any], softplus: bool, out_dtype: torch.dtype | None = None, return_last_state: bool = False
) -> ScanCall:
    """The call of parts that are channels first (B, D, L) or, as in mamba-minimal and mambapy, length first (B, L, D)."""
    if not _length_first(p["u"], p["A"], p["B"]):
        return canonical(**p, delta_softplus=softplus, out_dtype=out_dtype, return_last_state=return_last_state)
    turned = {n: t.transpose(1, 2) if n in ("u", "delta", "B", "C", "z") and t is not None else t for n, t in p.items()}
    return canonical(
        **turned, delta_softplus=softplus, out_dtype=out_dtype, return_last_state=return_last_state,
        restore=lambda y: y.transpose(1, 2),
    )  # fmt: skip


def _length_first(u: Tensor, A: Tensor, B: Tensor) -> bool:
    if u.dim() != 3 or B.dim() != 3 or A.dim() != 2:
        return False
    channels, state = A.shape
    usual = u.shape[1] == channels and B.shape[1] == state and B.shape[2] == u.shape[2]
    return not usual and u.shape[2] == channels and B.shape[2] == state and B.shape[1] == u.shape[1]


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


def _discretised(a: Mapping[str, Any]) -> ScanCall:
    """lrnnx's function, which is Mamba's with a choice of how to discretise."""
    if a.get("deltaA") is not None:
        raise Refusal("it is given deltaA, a step of its own for the decay")
    if a["discretization"] != "mamba":
        raise Refusal(f"it discretises by {a['discretization']!r}, not as Mamba does")
    return _by_name(a)


def _state_only(a: Mapping[str, Any]) -> ScanCall:
    """Returns the states h (B, D, N, L): with one state per channel, h is y for C = 1."""
    if a["A"].is_complex() or a["A"].shape[-1] != 1:
        raise Refusal(f"it has no C and returns the states h, {a['A'].shape[-1]} per channel; one is supported")
    if a.get("D") is not None or a.get("z") is not None:
        raise Refusal("it has no C and returns the states h, with D or z added to them")
    B = a["B"]
    return canonical(
        a["u"], a["delta"], a["A"], B, torch.ones_like(B), None, None, a.get("delta_bias"), a.get("delta_softplus", False),
        compute_dtype(a["u"].dtype), bool(a.get("return_last_state")), lambda y: y.unsqueeze(2),
    )  # fmt: skip


def _chunked(a: Mapping[str, Any]) -> ScanCall:
    """Mamba-2: x, z (B, L, H, P), dt (B, L, H), A (H,), B, C (B, L, G, N), D (H,) or (H, P), dt_bias (H,).

    mamba-ssm's gives y in the dtype of x; that of Hugging Face, where x is called ``hidden_states``, in float32.
    """
    a = {**a, **a.get("kwargs", {})}
    x, A = a["x"] if "x" in a else a["hidden_states"], a["A"]
    for name in ("initial_states", "seq_idx", "cu_seqlens", "return_varlen_states"):
        if a.get(name) is not None and a[name] is not False:
            raise Refusal(f"it is given {name}, which the scan op does not take")
    heads, width = x.shape[2:]
    compute = compute_dtype(x.dtype)

    def per_channel(t: Tensor) -> Tensor:  # (H,) or (H, P) -> (H*P,)
        return (t if t.dim() == 2 else t[:, None].expand(heads, width)).reshape(heads * width)

    def turned(t: Tensor) -> Tensor:  # (B, L, H, P) -> (B, H*P, L)
        return t.permute(0, 2, 3, 1).flatten(1, 2)

    dt, bias, softplus = a["dt"], a.get("dt_bias"), bool(a.get("dt_softplus"))
    low, high = a.get("dt_limit") or (0.0, float("inf"))
    if (low, high) != (0.0, float("inf")):  # the limits act behind the softplus
        dt = dt.to(compute) if bias is None else dt.to(compute) + bias
        dt, bias, softplus = (F.softplus(dt) if softplus else dt).clamp(low, high), None, False
    B, C = (a[name].permute(0, 2, 3, 1) for name in "BC")
    D, z = a.get("D"), a.get("z")
    return canonical(
        turned(x), turned(dt[..., None].expand(*dt.shape, width)), per_channel(A)[:, None].expand(-1, B.shape[2]), B, C,
        None if D is None else per_channel(D), None if z is None else turned(z), None if bias is None else per_channel(bias),
        softplus, None if "x" in a else compute, bool(a.get("return_final_states")),
        lambda y: y.unflatten(1, (heads, width)).permute(0, 3, 1, 2),
        lambda h: h.unflatten(1, (heads, width)),
    )  # fmt: skip


_CHUNKED = ("dt", "A", "B", "C", "chunk_size")
_CHUNKED_OPTIONS = {
    "D", "z", "dt_bias", "initial_states", "seq_idx", "cu_seqlens", "dt_softplus", "dt_limit", "return_final_states",
    "return_varlen_states", "state_dtype", "backend",
}  # fmt: skip


def _is_chunked(parameters: tuple[str, ...]) -> bool:
    # The launchers behind the public function have its parameters but this one, and return what its backward needs.
    options = parameters[len(_CHUNKED) + 1 :]
    return (
        parameters[:1] in (("x",), ("hidden_states",))
        and parameters[1 : len(_CHUNKED) + 1] == _CHUNKED
        and "return_final_states" in options
        and set(options) <= _CHUNKED_OPTIONS
    )


# -- any other code ----------------------------------------------------------------------------------------------------

_NAMES = {
    "u": ("u", "us", "x", "xs", "hidden_states", "inputs"),
    "delta": ("delta", "deltas", "dt", "dts"),
    "A": ("a", "as", "a_matrix"),
    "B": ("b", "bs", "b_matrix"),
    "C": ("c", "cs", "c_matrix"),
    "D": ("d", "ds", "d_vector", "d_skip"),
    "z": ("z", "gate"),
    "delta_bias": ("delta_bias", "dt_bias"),
    "delta_softplus": ("delta_softplus", "dt_softplus"),
    "return_last_state": ("return_last_state",),
}
_PART_OF = {name: part for part, names in _NAMES.items() for name in names}


def _has_the_parts(parameters: tuple[str, ...]) -> bool:
    parts = [_PART_OF.get(name.lower()) for name in parameters]
    known = [part for part in parts if part is not None]
    return {"u", "delta", "A", "B", "C"} <= set(known) and len(set(known)) == len(known)


def _by_part(a: Mapping[str, Any]) -> ScanCall:
    parts: dict[str, Any] = dict.fromkeys(("u", "delta", "A", "B", "C", "D", "z", "delta_bias"))
    softplus = last_state = False
    for name, given in a.items():
        part = _PART_OF.get(name.lower())
        if part == "delta_softplus":
            softplus = bool(given)
        elif part == "return_last_state":
            last_state = bool(given)
        elif part is not None:
            parts[part] = given
        elif isinstance(given, Tensor):
            raise Refusal(f"it takes a tensor {name!r} that a selective scan does not have")
    if not all(isinstance(parts[n], Tensor) for n in ("u", "delta", "A", "B", "C")) or parts["u"].dim() != 3:
        raise Refusal("its arguments are not those of a selective scan")
    return _oriented(parts, softplus, return_last_state=last_state)


def _register_builtin() -> None:
    generic = "parts of a scan by their usual names"
    add_family(ScanSpec(generic, (), frozenset(), _by_part, recognise=_has_the_parts, proof=True))
    parts = ("u", "delta", "A", "B", "C")
    register_scan("2-D selective scan", parameters=parts, optional=(*_OPTIONS, "HH", "WW"), adapt=_two_dimensional)
    register_scan(
        "selective_scan (lrnnx)", parameters=parts, optional=(*_OPTIONS, "deltaA", "discretization"), adapt=_discretised
    )
    register_scan("selective_scan", parameters=parts, optional=_OPTIONS, adapt=_by_name)
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
        optional=("z", "delta_bias", "delta_softplus", "return_last_state", "lag"),
        adapt=_state_only,
    )
    add_family(ScanSpec("chunked scan (Mamba-2)", (), frozenset(), _chunked, recognise=_is_chunked))


_register_builtin()
