"""Any model in, one ATen-level ``fx.GraphModule`` out, each selective scan one node of our op.

``torch.export`` (non-strict) does the tracing; :mod:`vmeanba_fx.intercept` makes every scan one registered op while it
runs. Captures always run on a CPU copy of the model under fake tensors, so the graph does not depend on the device and
code paths that launch raw Triton kernels, invisible to export, are not taken. The caller's model is never touched.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from . import ops
from .errors import CaptureError
from .graph import SCAN, scan_nodes, site_names, strip_metadata
from .intercept import Discovery, Interception, cpu_device_guard, intercept
from .ops.last_state import last_state
from .registry import ScanCall, compute_dtype

__all__ = ["CaptureInfo", "capture", "capture_info"]

log = logging.getLogger(__name__)
_META = "vmeanba_fx.capture"


@dataclass(frozen=True)
class CaptureInfo:
    """What a capture was made from.

    ``args``/``kwargs``: the example inputs the graph was traced with (CPU, batch 2 where the batch is dynamic).
    ``dynamic``: input dimensions that may vary, as (input name, dimension). ``refused``: (module path, sentence) of
    scans that were seen but left as ordinary code. ``notes``: sentences on what specialised.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic: tuple[tuple[str, int], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def batch_dynamic(self) -> bool:
        """True where the graph runs for any batch size."""
        return any(dim == 0 for _, dim in self.dynamic)


def capture_info(gm: fx.GraphModule) -> CaptureInfo:
    """The :class:`CaptureInfo` that :func:`capture` left on ``gm``.

    Raises:
        CaptureError: ``gm`` does not come from :func:`capture` or :func:`~vmeanba_fx.transform`.
    """
    info = gm.meta.get(_META)
    if info is None:
        raise CaptureError("this GraphModule was not made by vmeanba_fx.capture(); call capture(model, example) first")
    return info


def capture(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_size: bool = False,
) -> fx.GraphModule:
    """Turn ``model`` into one ATen-level graph in which each selective scan is one ``vmeanba_fx.selective_scan`` node.

    Args:
        model: an ``nn.Module``, a ``torch.fx.GraphModule`` (traced with ``torch.fx.symbolic_trace`` or
            :func:`vmeanba_fx.symbolic_trace`, its scan calls as leaves), an ``ExportedProgram`` that holds our ops, or
            a graph that :func:`capture` made before (returned as a copy).
        args: example positional inputs, or one tensor. The first dimension is taken as the batch.
        kwargs: example keyword inputs.
        dynamic_size: let height and width (dimensions 2 and 3 of 4-D inputs) vary as well.

    Returns:
        A ``GraphModule`` on the model's device, in eval mode; :func:`capture_info` tells what is dynamic.

    Raises:
        CaptureError: the model is on ``meta``, does not run on the example inputs, or cannot be exported.
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    kwargs = dict(kwargs or {})
    if isinstance(model, ExportedProgram):
        return _from_exported(model)
    if isinstance(model, fx.GraphModule) and _META in model.meta:
        return copy.deepcopy(model)
    device = _device_of(model)
    cpu_args, cpu_kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().cpu(), (args, kwargs))
    batch = _batch_size(cpu_args, cpu_kwargs)
    notes: list[str] = []
    with _quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        private = _private_copy(model)
        small = _with_batch(cpu_args, cpu_kwargs, batch, 2)
        try:
            program, refused = _export(private, *small, batch=2, dynamic_size=dynamic_size)
            fixed = not _is_dynamic(program)
        except CaptureError as error:
            log.info("export with a dynamic batch failed (%s)", error)
            fixed = True
        if fixed:
            small = (cpu_args, cpu_kwargs)
            program, refused = _export(_private_copy(model), *small, batch=None, dynamic_size=False)
            notes.append(f"the model specialises its batch size: the graph runs for batch {batch} only")
    gm = program.module()
    info = CaptureInfo(*small, _dynamic_dims(gm), tuple(refused), tuple(notes))
    return _finish(gm, info, device, model)


def _from_exported(program: ExportedProgram) -> fx.GraphModule:
    args, kwargs = program.example_inputs or ((), {})
    gm = program.module()
    if not scan_nodes(gm) and not any(str(n.target).startswith("vmeanba_fx") for n in gm.graph.nodes):
        raise CaptureError(
            "the ExportedProgram holds no vmeanba_fx op: its scans were traced into other operators; "
            "call vmeanba_fx.capture() on the nn.Module instead, which keeps each scan as one node"
        )
    tensors = [*gm.parameters(), *gm.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    return _finish(gm, CaptureInfo(tuple(args), dict(kwargs), _dynamic_dims(gm)), device, None)


def _finish(gm: fx.GraphModule, info: CaptureInfo, device: torch.device, model: nn.Module | None) -> fx.GraphModule:
    from .passes import functionalize, lift_skip

    strip_metadata(gm)
    # A plain GraphModule: the one export makes refuses train() and eval().
    gm = lift_skip(functionalize(fx.GraphModule(gm, gm.graph)))
    names = _fx_names(model)
    scans = scan_nodes(gm)
    if names and len(names) == len(scans):
        for (_, node), name in zip(scans, names, strict=True):
            node.meta["vmeanba_fx.site"] = name
    else:
        site_names(gm)
    if device.type != "cpu":
        move_to_device(gm, device)
    gm.meta[_META] = info
    return gm.eval()


def _fx_names(model: nn.Module | None) -> list[str]:
    """Names of the scans of a graph that a user traced: the module stack where fx kept one, the node name otherwise."""
    if not isinstance(model, fx.GraphModule):
        return []
    from .registry import find_spec, parameter_names

    names: list[str] = []
    for node in model.graph.nodes:
        target = getattr(node.target, "__self__", node.target) if node.op == "call_function" else None
        if target is None or not callable(target):
            continue
        signature = getattr(target, "forward", target) if isinstance(target, type) else target
        if target in SCAN or find_spec(target, parameter_names(signature)) is not None:
            stack = node.meta.get("nn_module_stack") or {}
            last = list(stack.values())[-1][0] if stack else ""
            names.append(f"{last}" if last and names.count(last) == 0 else f"{last or node.name}")
    duplicates = {n for n in names if names.count(n) > 1}
    counts: dict[str, int] = {}
    for i, name in enumerate(names):
        if name in duplicates:
            counts[name] = counts.get(name, -1) + 1
            names[i] = f"{name}#{counts[name]}"
    return names


def _device_of(model: nn.Module) -> torch.device:
    devices = {t.device for t in [*model.parameters(), *model.buffers()]}
    if any(d.type == "meta" for d in devices):
        raise CaptureError("the model has parameters on the meta device: load its weights before transforming it")
    if len(devices) > 1:
        raise CaptureError(f"the model is spread over {sorted(map(str, devices))}: move it to one device first")
    return next(iter(devices), torch.device("cpu"))


def _private_copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).cpu().eval()
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be deep-copied ({error}); the capture works on a copy"
        ) from error


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    sizes = [t.shape[0] for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 0]
    if not sizes:
        raise CaptureError("no example input with a batch dimension: give at least one tensor")
    if sizes[0] == 0:
        raise CaptureError("the example input has batch size 0")
    return sizes[0]


def _with_batch(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, wanted: int) -> Any:
    """The example inputs at batch ``wanted``: the first rows, repeated where there are too few."""

    def resize(t: Tensor) -> Tensor:
        if t.dim() == 0 or t.shape[0] != batch:
            return t
        rows = torch.arange(wanted) % batch
        return t[rows].clone()

    return pytree.tree_map_only(Tensor, resize, (args, kwargs))


def _export(
    private: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, batch: int | None, dynamic_size: bool
) -> tuple[ExportedProgram, list[tuple[str, str]]]:
    shapes = torch.export.ShapesCollection()
    for t in pytree.tree_leaves((args, kwargs)):
        if isinstance(t, Tensor) and t.dim() > 0:
            spec: dict[int, Any] = {0: Dim.AUTO} if batch is not None and t.shape[0] == batch else {}
            if dynamic_size and t.dim() == 4:
                spec |= {2: Dim.AUTO, 3: Dim.AUTO}
            if spec:
                shapes[t] = spec
    name = type(private).__name__
    stack: list[str] = []
    with intercept(private, _emit, lambda: stack[-1] if stack else "") as (interception, found), cpu_device_guard():
        with _module_stack(private, stack):
            # Modules that build state in their first forward must build it from real tensors.
            _attempt(lambda: private(*args, **kwargs), f"{name} does not run on the example input", args, found)
            interception.refused.clear()
        with _module_stack(private, stack):
            program = _attempt(
                lambda: torch.export.export(private, args, kwargs, dynamic_shapes=shapes, strict=False),
                f"{name} cannot be exported",
                args,
                found,
            )
        return program, _unique(interception)


def _attempt(run: Callable[[], Any], what: str, args: tuple[Any, ...], found: Discovery) -> Any:
    try:
        return run()
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in pytree.tree_leaves(args) if isinstance(t, Tensor))
        hint = ""
        if found.lookalikes:
            hint = "; these look like scans of unknown signature, see vmeanba_fx.register_scan: " + "; ".join(
                sorted(found.lookalikes)
            )
        first = str(error).strip().splitlines()[:3]
        raise CaptureError(f"{what} ({shapes}): {type(error).__name__}: {' '.join(first)}{hint}") from error


def _unique(interception: Interception) -> list[tuple[str, str]]:
    return list(dict.fromkeys(interception.refused))


def _emit(call: ScanCall) -> Any:
    """One scan call as graph nodes: the bare recurrence as one op, the skip, the gate and the cast as plain nodes."""
    compute = compute_dtype(call.u.dtype)
    y = ops.selective_scan(
        call.u, call.delta, call.A, call.B, call.C, None, None, call.delta_bias, call.delta_softplus, compute
    )
    if call.D is not None:
        y = y + call.D.unsqueeze(-1) * call.u
    if call.z is not None:
        y = y * torch.nn.functional.silu(call.z.to(compute) if call.z.dtype != compute else call.z)
    out_dtype = call.out_dtype or call.u.dtype
    if y.dtype != out_dtype:
        y = y.to(out_dtype)
    if not call.return_last_state:
        return y
    return y, last_state(call.u, call.delta, call.A, call.B, call.delta_bias, call.delta_softplus)


@contextlib.contextmanager
def _module_stack(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep ``stack`` at the paths of the modules whose forward is running."""

    def leave(*_: object) -> None:
        stack.pop()

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: stack.append(path)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        stack.clear()
        for handle in handles:
            handle.remove()


def _placeholders(gm: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    for node in gm.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
            yield node.name, node.meta["val"]


def _dynamic_dims(gm: fx.GraphModule) -> tuple[tuple[str, int], ...]:
    return tuple(
        (name, i) for name, val in _placeholders(gm) for i, s in enumerate(val.shape) if isinstance(s, torch.SymInt)
    )


def _is_dynamic(program: ExportedProgram) -> bool:
    inputs = set(program.graph_signature.user_inputs)
    return any(
        isinstance(n.meta["val"].shape[0], torch.SymInt)
        for n in program.graph.nodes
        if n.op == "placeholder" and n.name in inputs and isinstance(n.meta.get("val"), Tensor) and n.meta["val"].dim()
    )


def move_to_device(gm: fx.GraphModule, device: torch.device) -> None:
    """Move parameters, buffers, constants and every ``device=`` argument of ``gm`` to ``device``, in place."""
    gm.to(device)
    for module in gm.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, name, value.to(device))
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            node.args = pytree.tree_map_only(torch.device, lambda _: device, node.args)
            node.kwargs = pytree.tree_map_only(torch.device, lambda _: device, dict(node.kwargs))
        module.recompile()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
