"""Redirect every selective scan a model can reach to one registered op, for the time of a trace.

Public code refers to its scan in many ways: module globals, from-imports, ``self.selective_scan = fn``,
``functools.partial``, closures, default arguments, dictionaries of variants, ``autograd.Function.apply``, pybind
modules. Patching names misses most of them. So the *code object* of the Python function is swapped in place (every
reference sees that), ``forward`` is swapped on ``autograd.Function`` classes (a captured ``.apply`` sees that), ``fwd``
is swapped or injected on the pybind modules, and calls of operators meet a function mode. Everything is put back when the
context ends, whatever happened. The compiled companions of scans, for which a CPU has no code, get stand-ins the same way
(:mod:`.standins`).

A signature alone does not prove what a function computes: a helper ``scan(u, delta, A, B, C)`` may add its own bias.
So a function is tried once on its own first call (:mod:`.trial`), and left alone where it computes something
else; the scan it calls is found as well. Threads other than the one that captures run the original code throughout.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from .codeswap import CodeSwap
from .confinement import LOCK
from .discovery import PYBIND, Discovery, discover
from .families import canonical
from .operators import Handler, Intercepted, operator_of, signature_of
from .registry import Refusal, ScanCall, ScanSpec, compute_dtype, registered_scans
from .standins import PYBIND_CONVOLUTION, StandIn, convolution_pybind
from .trial import case_of, disagreement

Emit = Callable[[ScanCall], Any]

log = logging.getLogger(__name__)


def _bind(
    parameters: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> inspect.BoundArguments:
    try:
        bound = parameters.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}(): {error}") from None
    bound.apply_defaults()
    return bound


def _adapted(spec: ScanSpec, name: str, bound: inspect.BoundArguments) -> ScanCall:
    """The canonical call; what goes wrong in an adapter is told as such."""
    try:
        call = spec.adapt(bound.arguments)
    except Refusal:
        raise
    except Exception as error:  # a user's function
        raise CaptureError(f"the adapter of {spec.name!r} fails for {name}(): {type(error).__name__}: {error}") from error
    if not isinstance(call, ScanCall):
        raise CaptureError(f"the adapter of {spec.name!r} gives a {type(call).__name__} for {name}(), not a ScanCall")
    return call


def _mamba_ssm_signature(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
) -> Any:  # fmt: skip
    """The signature of mamba-ssm's function; only its parameters are used."""


def _vmamba_signature(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, delta_bias: Tensor | None = None,
    delta_softplus: bool = False, nrows: int = 1,
) -> Any:  # fmt: skip
    """The signature of the function in VMamba's first kernel package, which its forks import as ``..._v1``."""


class Interception:
    """The swaps of one capture.

    ``refused`` collects (where, sentence) of scans that were left as they are, ``untried`` the names of those believed
    without a trial, ``disproved`` functions whose parameters are those of a scan, with what they do instead.
    """

    def __init__(self, emit: Emit, where: Callable[[], str]) -> None:
        self.emit = emit
        self.where = where
        self.refused: list[tuple[str, str]] = []
        self.untried: list[str] = []
        self.disproved: list[str] = []
        self._thread = threading.get_ident()
        self._entered = 0
        self._taken = 0
        self._verdicts: dict[tuple[object, ...], str] = {}
        self._runs: dict[int, bool] = {}
        self._undo: list[Callable[[], None]] = []

    def _call(
        self, spec: ScanSpec, signature: inspect.Signature, name: str, original: Callable[..., Any],
        args: tuple[Any, ...], kwargs: dict[str, Any],
    ) -> Any:  # fmt: skip
        """One call of a swapped function: our op, or ``original`` where this is not a scan that the op computes."""
        if threading.get_ident() != self._thread:
            return original(*args, **kwargs)
        bound = _bind(signature, args, kwargs, name)
        self._entered += 1
        try:
            if any(torch._C._functorch.is_batchedtensor(t) for t in bound.arguments.values() if isinstance(t, Tensor)):
                raise Refusal("it is called under torch.vmap, for which the scan op has no rule")
            call = _adapted(spec, name, bound)
        except Refusal as refusal:
            self._entered -= spec.proof  # not a scan by its arguments either
            return self._refuse(str(refusal), original, args, kwargs)
        case = (id(signature), *case_of(bound.arguments))
        if case not in self._verdicts:
            taken = self._taken
            verdict = self._verdicts[case] = self._verdict(spec, name, original, bound)
            if verdict:
                log.info("%s has the signature of a scan but is none: %s", name, verdict)
                if self._taken == taken and spec.proof:  # nothing inside it is a scan either
                    self.disproved.append(f"{name}({', '.join(bound.arguments)}), but {verdict}")
        if verdict := self._verdicts[case]:
            if spec.proof:
                return original(*args, **kwargs)
            known = "was registered as" if spec.target is not None else "has the parameters of"
            return self._refuse(f"{name} {known} {spec.name!r}, but {verdict}", original, args, kwargs)
        self._taken += 1
        return self.emit(call)

    def _refuse(self, why: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``original`` itself, and the reason why among those refused, unless a scan inside of it was seen."""
        taken, index = self._taken, len(self.refused)
        self.refused.append((self.where(), why))
        result = original(*args, **kwargs)
        if self._taken > taken or len(self.refused) > index + 1:
            del self.refused[index]
        return result

    def _verdict(self, spec: ScanSpec, name: str, original: Callable[..., Any], bound: inspect.BoundArguments) -> str:
        """Why a function is not the scan its signature says; empty where it is, or where that has to be believed."""
        entered = self._entered
        verdict = disagreement(original, bound, lambda given: self.emit(spec.adapt(given)))
        if verdict is not None:
            return verdict
        if self._entered > entered or "self" in bound.signature.parameters or spec.proof:
            # A wrapper around another scan, or a method with values of its own: believing it could be silently wrong.
            return "it fails"
        self.untried.append(name)  # a kernel for another device, presumably
        return ""

    def _stand_in(
        self, stand_in: StandIn, signature: inspect.Signature, original: Callable[..., Any], args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # fmt: skip
        """One call of a companion of scans: ``original`` where it runs on this machine, else ``stand_in``."""
        if threading.get_ident() != self._thread:
            return original(*args, **kwargs)
        key = id(signature)
        if key not in self._runs:
            try:
                found = original(*args, **kwargs)
            except Exception as error:  # a compiled kernel may raise anything on tensors that it was not made for
                log.info("%s does not run on the CPU (%s); PyTorch code takes its place", original, error)
                self._runs[key] = False
            else:
                self._runs[key] = True
                return found
        if self._runs[key]:
            return original(*args, **kwargs)
        return stand_in(_bind(signature, args, kwargs, "stand-in").arguments)

    def swap_functions(self, found: Discovery) -> None:
        """Send the calls of every function found here, by its code."""
        signatures = {fn: inspect.signature(fn) for fn in (*found.functions, *found.companions)}

        def handle(fn: types.FunctionType, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
            if fn in found.functions:
                return self._call(found.functions[fn], signatures[fn], fn.__qualname__, original, args, kwargs)
            return self._stand_in(found.companions[fn], signatures[fn], original, args, kwargs)

        swap = CodeSwap(signatures, handle)
        swap.__enter__()
        self._undo.append(swap.__exit__)

    def swap_class(self, cls: type, target: ScanSpec | StandIn) -> None:
        """Send the calls of an ``autograd.Function`` here, by its ``forward``."""
        raw = cls.__dict__["forward"]
        forward = getattr(raw, "__func__", raw)
        signature = inspect.signature(forward)
        with_ctx = next(iter(signature.parameters), "") == "ctx"
        if with_ctx:
            signature = signature.replace(parameters=list(signature.parameters.values())[1:])

        def call(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if isinstance(target, ScanSpec):
                return self._call(target, signature, cls.__qualname__, original, args, kwargs)
            return self._stand_in(target, signature, original, args, kwargs)

        def handle(*args: Any, **kwargs: Any) -> Any:
            return call(forward, args, kwargs)

        def handle_with_ctx(ctx: Any, *args: Any, **kwargs: Any) -> Any:
            return call(functools.partial(forward, ctx), args, kwargs)

        cls.forward = staticmethod(handle_with_ctx if with_ctx else handle)  # type: ignore[attr-defined]
        self._undo.append(lambda: setattr(cls, "forward", raw))

    def swap_operators(self, found: Discovery) -> None:
        """Send the calls of operators here, by a mode."""

        def handler(schema: torch.FunctionSchema, spec: ScanSpec) -> Handler:
            signature = signature_of(schema)
            return lambda func, args, kwargs: self._call(spec, signature, schema.name, func, args, kwargs)

        if found.operators:
            mode = Intercepted({operator_of(schema): handler(schema, spec) for schema, spec in found.operators})
            mode.__enter__()
            self._undo.append(lambda: mode.__exit__(None, None, None))

    def swap_pybind(self, found: Discovery) -> None:
        for name, parameters in PYBIND.items():
            self._swap_attribute(found, name, "fwd", self._pybind_forward(name, parameters))
        self._swap_attribute(found, *PYBIND_CONVOLUTION, convolution_pybind)

    def _swap_attribute(self, found: Discovery, name: str, attribute: str, ours: Callable[..., Any]) -> None:
        """Send calls of ``attribute`` of the compiled module ``name`` to ``ours``, also where the module is missing."""
        module = sys.modules.get(name)
        original = getattr(module, attribute, None)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == self._thread:
                return ours(*args, **kwargs)
            if original is None:
                raise NameError(f"name {name!r} is not defined")
            return original(*args, **kwargs)

        if original is not None:
            setattr(module, attribute, forward)
            self._undo.append(functools.partial(setattr, module, attribute, original))
        stub = types.SimpleNamespace(**{attribute: forward})
        for namespace, missing in found.missing_pybind:
            if missing == name:
                self._supply(namespace, name, stub)

    def _supply(self, namespace: dict[str, Any], name: str, value: Any) -> None:
        """Define a global that is missing, or None because its import failed."""
        if namespace.get(name) is not None:
            return
        absent = name not in namespace
        namespace[name] = value
        self._undo.append(
            functools.partial(namespace.pop, name, None)
            if absent
            else functools.partial(namespace.__setitem__, name, None)
        )

    def supply_missing(self, found: Discovery) -> None:
        """Give code that failed to import its scan one, under the signature that the scan of that name has."""
        adapt = registered_scans()["selective_scan"].adapt

        def supplied(name: str) -> Callable[..., Any]:
            signature = inspect.signature(_vmamba_signature if name.endswith("_v1") else _mamba_ssm_signature)

            def scan(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() != self._thread:
                    raise NameError(f"name {name!r} is not defined")
                return self.emit(adapt(_bind(signature, args, kwargs, name).arguments))

            return scan

        for namespace, name in found.missing_functions:
            if name not in namespace:
                self._supply(namespace, name, supplied(name))

    def _pybind_forward(self, name: str, parameters: tuple[str, ...]) -> Callable[..., Any]:
        signature = inspect.Signature(
            [inspect.Parameter(p, inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in parameters]
        )

        def forward(*args: Any, **kwargs: Any) -> list[Tensor]:
            if len(args) + len(kwargs) != len(parameters):
                raise TypeError(
                    f"{name}.fwd is given {len(args) + len(kwargs)} arguments, and takes {len(parameters)}: this is another "
                    "kernel of that name; tell vmeanba_fx.register_scan of the Python function around it"
                )
            self._entered += 1
            self._taken += 1
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
    with LOCK:
        interception = Interception(emit, where)
        try:
            found = discover(model)
            for cls, target in (found.classes | found.companion_classes).items():
                interception.swap_class(cls, target)
            interception.swap_functions(found)
            interception.swap_operators(found)
            interception.swap_pybind(found)
            interception.supply_missing(found)
            yield interception, found
        finally:
            interception.undo()
