"""Any model in, one ATen-level ``fx.GraphModule`` out, each selective scan one node of our op.

``torch.export`` (non-strict) does the tracing; :mod:`.intercept` makes every scan one registered op while it
runs. Captures always run on a CPU copy of the model under fake tensors, so the graph does not depend on the device and
code paths that launch raw Triton kernels, invisible to export, are not taken. The caller's model is never touched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from ..dead_code import remove_dead_code
from ..errors import CaptureError
from ..graph import (
    GUARDS,
    SCAN,
    SITE,
    arguments,
    copy_graph,
    fake_mode,
    graph_modules,
    module_path,
    mutates,
    scan_nodes,
    site_names,
    strip_metadata,
)
from .confinement import capturing, forget_sizes, on_the_cpu, one_at_a_time
from .copies import device_of, move_to_device, private_copy
from .discovery import Discovery
from .emission import emit_scan, module_stack
from .examples import batch_size, name_keywords, shapes_of, with_batch
from .guards import drop_implied_bounds, drop_needless_guards, failed_guard, module_of
from .intercept import Interception, intercept
from .registry import ScanCall, is_scan

__all__ = ["CaptureInfo", "capture", "capture_info"]

log = logging.getLogger(__name__)
_META = "vmeanba_fx.capture"
_MESSAGE = 600


@dataclass(frozen=True)
class CaptureInfo:
    """What a capture was made from.

    ``args``/``kwargs``: the example inputs the graph was traced with (CPU, batch 2 where the batch is dynamic).
    ``dynamic``: input dimensions that may vary, as (input name, dimension). ``refused``: (module path, sentence) of
    scans that were seen but left as ordinary code. ``lookalikes``: functions of the model that may be scans of a
    signature nobody registered. ``notes``: sentences on what specialised.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic: tuple[tuple[str, int], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    lookalikes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def batch_dynamic(self) -> bool:
        """True where the graph runs for any batch size."""
        return any(dim == 0 for _, dim in self.dynamic)


def is_captured(model: object) -> TypeGuard[fx.GraphModule]:
    """Whether ``model`` is a graph that :func:`capture` made."""
    return isinstance(model, fx.GraphModule) and _META in model.meta


def capture_info(gm: fx.GraphModule) -> CaptureInfo:
    """The :class:`CaptureInfo` that :func:`capture` left on ``gm``.

    Raises:
        CaptureError: ``gm`` does not come from :func:`capture` or :func:`~vmeanba_fx.transform`.
    """
    info = getattr(gm, "meta", {}).get(_META)
    if info is None:
        raise CaptureError(
            f"this {type(gm).__name__} was not made by vmeanba_fx.capture(): call capture(model, example_inputs) first"
        )
    return info


@one_at_a_time
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
        CaptureError: it is no model, is on ``meta``, does not run on the example inputs, or cannot be exported.
    """
    if isinstance(args, Mapping) or not isinstance(args, Iterable):
        raise CaptureError(f"args is a {type(args).__name__}: give a tensor or a tuple of inputs, and kwargs= by name")
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    kwargs = dict(kwargs or {})
    if isinstance(model, ExportedProgram):
        return _from_exported(model, args, kwargs)
    if is_captured(model):
        return copy_graph(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a TorchScript module cannot be captured: give the nn.Module that it was made from")
    if not isinstance(model, nn.Module):
        raise CaptureError(f"{model!r:.60} is no nn.Module, traced GraphModule or ExportedProgram")
    if "_orig_mod" in model._modules:  # what torch.compile(model) wraps
        model = model.get_submodule("_orig_mod")
    device = device_of(model)
    cpu_args, cpu_kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().cpu(), (args, kwargs))
    batch = batch_size(cpu_args, cpu_kwargs)
    with capturing():
        trace = _with_free_batch(model, *with_batch(cpu_args, cpu_kwargs, batch, 2), dynamic_size)
        if trace is None:
            trace = _export(private_copy(model), cpu_args, cpu_kwargs, batch=None, dynamic_size=False)
            trace.notes.append(f"the model specialises its batch size: the graph runs for batch {batch} only")
        gm = _functional(trace)
    _release_trace(gm)
    if drawn := sorted({str(n.target) for owner in graph_modules(gm) for n in owner.graph.nodes if _is_random(n)}):
        trace.notes.append(f"the model draws random numbers ({', '.join(drawn)}): no two runs, nor scores, are the same")
    if written := _restore_buffers(gm, model):
        trace.notes.append(f"the model writes into its buffers ({', '.join(written)}): its outputs may depend on earlier calls")
    info = CaptureInfo(
        trace.args, trace.kwargs, _dynamic_dims(gm), tuple(trace.refused), tuple(trace.lookalikes), tuple(trace.notes)
    )
    gm = _finish(gm, info, device, _traced_paths(model))
    # torch keeps the symbols of a trace for good (its own export does); what they cached need not stay with them.
    mode = fake_mode(gm.graph)
    getattr(getattr(mode, "shape_env", None), "fake_tensor_cache", {}).clear()
    return gm


def _release_trace(gm: fx.GraphModule) -> None:
    """Let the trace be freed with ``gm``, which PyTorch 2.13 alone does not: a megabyte and more for each.

    Its sizes hold its inputs, which hold the sizes through C++, unseen by gc; and caches of methods hold old traces.
    """
    mode = fake_mode(gm.graph)
    if mode is not None and getattr(mode.shape_env, "tracked_fakes", None):
        mode.shape_env.tracked_fakes = []
    forget_sizes()


@dataclass
class _Trace:
    """One export. ``run`` is the traced model under interception, to compare with; ``gm`` the program as a module."""

    program: ExportedProgram
    gm: fx.GraphModule
    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    refused: list[tuple[str, str]]
    lookalikes: list[str]
    notes: list[str]


def _with_free_batch(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_size: bool
) -> _Trace | None:
    """The model exported at batch 2 for any batch size, or None where it does not allow that."""
    try:
        trace = _export(private_copy(model), args, kwargs, batch=2, dynamic_size=dynamic_size)
    except CaptureError as error:
        log.info("export with a dynamic batch failed (%s)", error)
        return None
    symbolic = any(dim == 0 for _, dim in _dynamic_dims(trace.gm))
    if not symbolic or failed_guard(trace.gm, *with_batch(args, kwargs, 2, 3)):
        return None
    single = with_batch(args, kwargs, 2, 1)
    if guard := drop_needless_guards(trace.program, trace.gm, trace.run, *single):
        trace.notes.append(f"the graph does not run for batch 1: it needs {guard}")
    if dynamic_size and not any(dim > 1 for _, dim in _dynamic_dims(trace.gm)):
        trace.notes.append("the model specialises its height and width: the graph runs for the captured size only")
    return trace


def _functional(trace: _Trace) -> fx.GraphModule:
    """The traced graph without in-place operators and open ``torch.vmap`` regions, as far as that is possible: passes and
    scores rely on data flow."""
    gm = _plain(trace.gm)
    if not any(mutates(node) or _is_vmap(node) for owner in graph_modules(gm) for node in owner.graph.nodes):
        return gm
    try:
        functional = trace.program.run_decompositions({}).module()
        setattr(functional, GUARDS, getattr(trace.gm, GUARDS))  # without those that are dropped
        return _plain(functional)
    except Exception as error:  # whatever torch raises for a graph it cannot retrace
        log.info("in-place operators stay in the graph (%s)", error)
        return gm


def _is_vmap(node: fx.Node) -> bool:
    """Whether a node enters or leaves a ``torch.vmap`` region, which no data flow tells from a dead one."""
    return getattr(node.target, "__module__", None) == "torch._functorch.predispatch"


def _restore_buffers(gm: fx.GraphModule, model: nn.Module) -> list[str]:
    """Buffers that the graph writes into get the model's own values again: the capture has run the copy. Their names."""
    own = dict(model.named_buffers())
    written = {str(node.args[0].target): node.args[0] for node in gm.graph.nodes if mutates(node) and node.args}
    names = sorted(name for name, node in written.items() if node.op == "get_attr" and name in own)
    for name in names:
        gm.get_buffer(name).copy_(own[name].detach())
    return names


def _is_random(node: fx.Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    drops = any(name in str(node.target) for name in ("dropout", "rrelu"))  # inert in eval mode
    return not drops and arguments(node).get("dropout_p") != 0  # attention draws for its dropout alone


def _plain(gm: fx.GraphModule) -> fx.GraphModule:
    """An ordinary GraphModule of the same graph: the one export makes refuses train() and eval()."""
    from ..passes import functionalize

    strip_metadata(gm)
    drop_implied_bounds(gm)
    return functionalize(fx.GraphModule(gm, gm.graph))


def _from_exported(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    gm = module_of(program)
    if not scan_nodes(gm) and not any(str(n.target).startswith("vmeanba_fx") for n in gm.graph.nodes):
        raise CaptureError(
            "the ExportedProgram holds no vmeanba_fx op: its scans were traced into other operators; "
            "call vmeanba_fx.capture() on the nn.Module instead, which keeps each scan as one node"
        )
    if (args or kwargs) and (guard := failed_guard(gm, args, kwargs)):
        raise CaptureError(
            f"the ExportedProgram does not take these inputs ({shapes_of((args, kwargs))}): {guard} does not hold; give inputs "
            "like those it was exported with, or export it with dynamic_shapes"
        )
    return reopened(program, args, kwargs)


def reopened(program: ExportedProgram, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> fx.GraphModule:
    """A program as a captured graph, whether it holds ops of ours or none is left; by default with its own inputs."""
    if not args and not kwargs:
        args, kwargs = program.example_inputs or ((), {})
    gm = module_of(program)
    return _finish(_plain(gm), CaptureInfo(tuple(args), dict(kwargs or {}), _dynamic_dims(gm)), device_of(gm), [])


def _finish(gm: fx.GraphModule, info: CaptureInfo, device: torch.device, paths: list[str]) -> fx.GraphModule:
    from ..passes import lift_skip

    gm = lift_skip(gm)
    remove_dead_code(gm)  # such as a last state that nobody reads
    scans = scan_nodes(gm)
    if len(paths) == len(scans):
        for (_, node), path in zip(scans, paths, strict=True):
            node.meta[SITE] = path
    site_names(gm)
    if device.type != "cpu":
        move_to_device(gm, device)
    gm.meta[_META] = info
    return gm.eval()


def _traced_paths(model: nn.Module) -> list[str]:
    """Where the scans of a graph that a user traced lie: export sees one flat module, fx kept the paths."""
    if not isinstance(model, fx.GraphModule):
        return []
    calls = [node for node in model.graph.nodes if node.op == "call_function"]
    return [module_path(node) for node in calls if node.target in SCAN or is_scan(node.target)]


def _export(
    private: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, batch: int | None, dynamic_size: bool
) -> _Trace:
    name_keywords(private, kwargs)
    shapes: Any = torch.export.ShapesCollection()  # documented, but not in the annotations of export
    for t in pytree.tree_leaves((args, kwargs)):
        if isinstance(t, Tensor) and t.dim() > 0:
            spec: dict[int, Any] = {0: Dim.AUTO} if batch is not None and t.shape[0] == batch else {}
            if dynamic_size and t.dim() == 4:
                spec |= {2: Dim.AUTO, 3: Dim.AUTO}
            if spec:
                shapes[t] = spec
    name = type(private).__name__
    stack: list[str] = []
    stacks: list[tuple[str, ...]] = []

    def emit(call: ScanCall) -> Any:
        stacks.append(tuple(stack))
        return emit_scan(call)

    with intercept(private, emit, lambda: stack[-1] if stack else "") as (interception, found), on_the_cpu():
        try:
            with module_stack(private, stack):
                what = "does not run on the example input"
                # Modules that build state in their first forward must build it from real tensors.
                private(*args, **kwargs)
                interception.refused.clear()
            with module_stack(private, stack):
                what = "cannot be exported"
                program = torch.export.export(private, args, kwargs, dynamic_shapes=shapes, strict=False)
        except CaptureError:  # of ours, and a sentence already
            raise
        except Exception as error:
            message = f"{name} {what} ({shapes_of((args, kwargs))}): {type(error).__name__}: {_quoted(error)}"
            raise CaptureError("; ".join([message, *_hints(message, interception, found, stacks)])) from error

    def run(*args: Any, **kwargs: Any) -> Any:
        with intercept(private, emit_scan, lambda: ""), on_the_cpu():
            return private(*args, **kwargs)

    refused = list(dict.fromkeys(interception.refused))
    notes = [
        f"{name} does not run on the CPU: that it is the scan its signature says could not be checked"
        for name in dict.fromkeys(interception.untried)
    ]
    lookalikes = sorted({*found.lookalikes, *interception.disproved})
    return _Trace(program, module_of(program), run, args, kwargs, refused, lookalikes, notes)


def _quoted(error: Exception) -> str:
    """The beginning of another package's message: that of ``torch.export`` may hold the whole graph."""
    return " ".join(str(error).strip().splitlines()[:3])[:_MESSAGE]


def _hints(message: str, interception: Interception, found: Discovery, stacks: list[tuple[str, ...]]) -> list[str]:
    """What to try where a model cannot be captured. ``stacks``: the modules around each scan, outermost first."""
    if "in output, which is not a known type" in message:
        return [
            "make the type known with torch.export.register_dataclass, or have the model not return it (a cache of "
            "Hugging Face: model.config.use_cache = False)"
        ]
    if "unexpected keyword argument" in message:
        return [
            "inputs given by name go in by the names of the model's parameters; for batches with other names there is "
            "calibrate(..., transform_fn=lambda batch: (inputs, labels))"
        ]
    if "__obj_flatten__" in message:
        return ["torch.export does not take quantised layers with packed weights: rewrite the model first, then quantise it"]
    hints = [f"{where or 'the model'} has a scan that is refused: {why}" for where, why in interception.refused[:1]]
    if found.lookalikes:
        likely = "; ".join(sorted(found.lookalikes))
        hints.append(f"these look like scans of unknown signature, see vmeanba_fx.register_scan: {likely}")
    around = [level[0] for level in zip(*stacks, strict=False) if len(set(level)) == 1]
    if around and around[-1]:
        hints.append(f"all its scans lie in {around[-1]!r}: capture that module alone and put the result in its place")
    return hints


def _dynamic_dims(gm: fx.GraphModule) -> tuple[tuple[str, int], ...]:
    """Input dimensions that may vary, as (input name, dimension)."""
    inputs = [(n.name, n.meta.get("val")) for n in gm.graph.nodes if n.op == "placeholder"]
    tensors = [(name, val) for name, val in inputs if isinstance(val, Tensor)]
    # A size that the model read as a number stays a SymInt, whose expression is that number.
    return tuple(
        (name, i)
        for name, val in tensors
        for i, s in enumerate(val.shape)
        if isinstance(s, torch.SymInt) and s.node.expr.free_symbols
    )
