"""One function per file format: write a program under a name, load it from there, return what runs it.

:data:`FORMS` says in which form (see :mod:`vmeanba_fx.ops.chunked`) a format wants our ops decomposed before, if at all.

Each takes ``(program, name, extra)``, with ``extra`` JSON texts by name, and returns ``run(*args, **kwargs)``, which
gives the flat list of output tensors of the file that was written.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument

from ..errors import ExportError
from ..ops.chunked import Form, looped, unrolled
from .archive import read_program

Run = Callable[..., list[Tensor]]

OPSET = 18
FORMS: dict[str, Form] = {"aoti": unrolled, "onnx": looped}


def write_pt2(program: ExportedProgram, name: str, extra: dict[str, str]) -> Run:
    """A ``torch.export`` program; our ops stay, so that kernels of the machine it runs on are used."""
    buffer = io.BytesIO()  # torch's own file writer does not say that a disk is full
    torch.export.save(program, buffer, extra_files=dict(extra))
    with open(name, "xb") as file:
        file.write(buffer.getbuffer())
    del buffer
    with open(name, "rb") as file:
        written, found = read_program(file.read(), "the file written")
    if found != extra:
        raise ExportError("the file written holds another report or plan")
    module = written.module()
    return lambda *args, **kwargs: _tensors(module(*args, **kwargs))


def write_aoti(program: ExportedProgram, name: str, extra: dict[str, str]) -> Run:
    """An AOTInductor package: machine code, loaded by C++ programs without Python."""
    options = {"aot_inductor.metadata": {f"vmeanba_fx.{key}": text for key, text in extra.items()}}
    with _quiet("torch._inductor"):
        torch._inductor.aoti_compile_and_package(program, package_path=name, inductor_configs=options)
        module = torch._inductor.aoti_load_package(name)
    return lambda *args, **kwargs: _tensors(module(*args, **kwargs))


def write_onnx(program: ExportedProgram, name: str, extra: dict[str, str]) -> Run:
    """An ONNX model of standard operators, weights inside."""
    import onnxruntime
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    constants = [out.arg for out in program.graph_signature.output_specs if isinstance(out.arg, ConstantArgument)]
    if numbers := [str(constant.value) for constant in constants if constant.value is not None]:
        raise ExportError(f"the model returns {', '.join(numbers)} beside its tensors, and an ONNX file gives tensors only")
    lowered = program.run_decompositions({torch.ops.aten.softplus.default: _softplus})
    with _quiet("torch.onnx"), _quiet("onnx_ir"):
        model = torch.onnx.export(
            lowered, (), dynamo=True, opset_version=OPSET, verbose=False, external_data=False, optimize=False
        )
        assert model is not None  # only where torch.onnx is given a file to write itself
        # The whole optimizer takes minutes on a few thousand nodes, and onnxruntime has its own.
        fold_constants(model.model)
        CommonSubexpressionEliminationPass()(model.model)
        remove_unused_nodes(model.model)
    _name_outputs_and_batch(model.model.graph)
    used = {node.domain for node in model.model.graph.all_nodes()}
    if used - {"", "ai.onnx"}:
        raise ExportError(f"operators outside of the ONNX standard remain, of {', '.join(sorted(used))}")
    model.model.metadata_props.update({f"vmeanba_fx.{key}": text for key, text in extra.items()})
    model.save(name, external_data=False)
    session = onnxruntime.InferenceSession(name, providers=["CPUExecutionProvider"])

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        flat = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        feed = {i.name: t.detach().cpu().numpy() for i, t in zip(session.get_inputs(), flat, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    return run


def _name_outputs_and_batch(graph: Any) -> None:
    """``output`` (or ``output_0``, ...) and ``batch``, whatever the traced names are: programs read files by these names.

    Inputs keep theirs, also where the model returns one or calls one like that.
    """
    from onnx_ir import Shape, SymbolicDim

    taken = {x.name for x in (*graph.inputs, *(x for node in graph.all_nodes() for x in node.outputs))}
    for i, output in enumerate(graph.outputs):
        name = "output" if len(graph.outputs) == 1 else f"output_{i}"
        if name not in taken and output not in graph.inputs:
            output.name = name
    free = {dim.value for x in graph.inputs for dim in x.shape or () if isinstance(dim, SymbolicDim)}
    if len(free) != 1:
        return
    [batch] = free
    for x in [*graph.inputs, *(x for node in graph.all_nodes() for x in node.outputs)]:
        dims = [dim.value if isinstance(dim, SymbolicDim) else dim for dim in x.shape or ()]
        if any(isinstance(dim, str) for dim in dims):
            x.shape = Shape([re.sub(rf"\b{batch}\b", "batch", dim) if isinstance(dim, str) else dim for dim in dims])


def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """Softplus from vectorised operators: onnxruntime takes 20 to 30 ns an element for its own.

    log(u) * v / (u - 1) with u = 1 + v is log(1 + v) without the rounding of 1 + v.
    """
    v = torch.exp(-(beta * x).abs())
    u = 1 + v
    return torch.relu(x) + torch.where(u == 1, v, torch.log(u) * v / (u - 1)) / beta


def _tensors(outputs: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the warnings of torch's exporters about packages that are not needed here."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
