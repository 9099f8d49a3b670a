"""The value of a scan on the example inputs, also where the model's own kernel does not run on this machine."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

from .. import ops
from ..capturing.registry import Refusal, ScanCall, ScanSpec, find_spec, parameter_names
from ..ops.last_state import last_state
from .functions import signature_of_apply

log = logging.getLogger(__name__)


def run_scan(scan: object, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``original(*args, **kwargs)``, or our op where that fails, as CUDA-only scans do on a CPU.

    ``scan``: the function or ``autograd.Function`` class, which the registry knows how to read.
    """
    try:
        return original(*args, **kwargs)
    except Exception as error:
        # The signature of `original`: the function itself is redirected at this moment and shows *args, **kwargs.
        described = scan.forward if isinstance(scan, type) else original  # type: ignore[attr-defined]
        signature = signature_of_apply(scan) if isinstance(scan, type) else inspect.signature(original)
        call = _canonical_call(find_spec(scan, parameter_names(described)), signature, args, kwargs)
        if call is None:
            raise
        log.info("%s does not run here (%s); its example value comes from vmeanba_fx.ops", scan, error)
        return _compute(call)


def _canonical_call(
    spec: ScanSpec | None, signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ScanCall | None:
    if spec is None or signature is None:
        return None
    try:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return spec.adapt(dict(bound.arguments))
    except (Refusal, TypeError, KeyError):
        return None


def _compute(call: ScanCall) -> Any:
    y = ops.selective_scan(
        call.u, call.delta, call.A, call.B, call.C, call.D, call.z, call.delta_bias, call.delta_softplus, call.out_dtype
    )
    return call.result(
        y, lambda: last_state(call.u, call.delta, call.A, call.B, call.delta_bias, call.delta_softplus)
    )
