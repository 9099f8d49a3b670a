"""``verify=True``: outputs before and after an exact pass, and whether they differ by more than rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.func import functional_call

from vmeanba_fx.errors import GraphCheckError


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """On a GPU float32 convolutions may run in TF32, and then differ from the linear layers that a pass puts in their place."""
    cudnn: Any = torch.backends.cudnn  # whose parts have no stubs
    backends: tuple[Any, ...] = cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def outputs_of(gm: fx.GraphModule, args: tuple[tuple[Any, ...], dict[str, Any]] | None) -> list[Tensor]:
    """The tensors that ``gm`` gives for (args, kwargs), in full precision; none without inputs."""
    if args is None:
        return []
    buffers = {name: t.clone() for name, t in gm.named_buffers()}  # a model may write into them: the next run starts alike
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _without_tf32():
        outputs = functional_call(gm, buffers, args[0], dict(args[1]))
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def compare_outputs(expected: list[Tensor], found: list[Tensor], name: str, half: bool) -> None:
    """Compare the outputs before and after the exact pass ``name``. ``half``: the graph computes in half precision somewhere.

    Raises:
        GraphCheckError: an output differs by more than rounding.
    """
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        scale = max(float(a.double().abs().max()), 1e-30) if a.numel() else 1.0
        error = float((a.double() - b.double()).abs().max()) / scale if a.numel() else 0.0
        bound = 5e-2 if half else {torch.float64: 1e-10, torch.float32: 1e-4}.get(a.dtype, 5e-2)
        if not error <= bound:
            raise GraphCheckError(
                f"{name} is an exact pass but moved output {i} by {error:.1e} (relative; allowed {bound:.0e})"
            )
