"""How much a model's outputs depend on what its scans give: the weights of rank-r fits with ``fit="outputs"``.

For one position's scan output y (D,) and the logits z, with F = diag(p) - p p^T the curvature of the class probabilities::

    KL(outputs with y + e, outputs) ~ 1/2 e^T G e        G = (dz/dy)^T F (dz/dy)

What a fit can use is one G for all positions of a site, their mean: with g the gradient of (L v)^T z, F = L L^T and v
random signs, G is the mean of g g^T. One backward pass per batch gives a g for every position of every site. Errors at
different positions are taken as independent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .batches import Batches
from .errors import CalibrationError
from .execute import Executor
from .gradient import curvature_probe
from .metrics import logits_of


def output_gradients(gm: fx.GraphModule, scans: Sequence[fx.Node], data: Batches) -> Iterator[list[Tensor]]:
    """For every batch, the gradients of one random probe of the logits by the outputs of ``scans`` (B, K*D, L).

    Raises:
        CalibrationError: the model returns no class scores, or cannot be differentiated.
    """
    tape = _Tape(gm, scans)
    for index, batch in enumerate(data.sweep()):
        batch = batch.to(tape.device)
        try:
            with torch.enable_grad():
                outputs, state = tape.run(*batch.args, **batch.kwargs)
                logits = logits_of(outputs)
                probe = curvature_probe(logits.detach().double().softmax(1), torch.Generator().manual_seed(index))
                found = torch.autograd.grad(logits, [state.value(scan) for scan in scans], probe.to(logits.dtype))
        except (RuntimeError, NotImplementedError, IndexError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CalibrationError(f"fit='outputs' does not work for this model ({why}): use fit='scan'") from error
        yield list(found)


class _Tape(Executor):
    """Records what follows ``scans`` for differentiation, and no parameter."""

    def __init__(self, gm: fx.GraphModule, scans: Sequence[fx.Node]) -> None:
        super().__init__(gm, [], keep=scans)
        self._scans = set(scans)

    def _call(self, node: fx.Node, *envs: dict[fx.Node, Any]) -> Any:
        value = super()._call(node, *envs)
        if node.op == "get_attr" and isinstance(value, Tensor):
            return value.detach()
        if node in self._scans and not value.requires_grad:
            value.requires_grad_()
        return value
