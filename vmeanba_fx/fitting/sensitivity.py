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

from ..calibration.batches import Batches
from ..calibration.execute import Executor, traced_bytes
from ..calibration.gradient import curvature_probe
from ..calibration.metrics import Batch, logits_of
from ..errors import CalibrationError
from ..graph import concrete_sizes, value

BACKWARD_BYTES = 2 << 30  # about what a backward pass may hold; batches are cut into parts for it


def output_gradients(gm: fx.GraphModule, scans: Sequence[fx.Node], data: Batches) -> Iterator[list[Tensor]]:
    """For every part of a batch, the gradients of one random probe of the logits by the outputs of ``scans`` (b, K*D, L).

    Raises:
        CalibrationError: the model returns no class scores, or cannot be differentiated.
    """
    tape = _Tape(gm, scans)
    for index, batch in enumerate(data.sweep()):
        generator = torch.Generator().manual_seed(index)
        for part in batch.to(tape.device).split(_samples_at_once(gm) or batch.size):
            try:
                found = tape.gradients(part, generator)
            except (RuntimeError, NotImplementedError, IndexError) as error:
                why = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise CalibrationError(f"fit='outputs' does not work for this model ({why}): use fit='scan'") from error
            yield found


def _samples_at_once(gm: fx.GraphModule) -> int | None:
    """How many samples one backward pass has room for; None where the graph takes whole batches only."""
    inputs = [value(node) for node in gm.graph.find_nodes(op="placeholder")]
    inputs = [t for t in inputs if isinstance(t, Tensor) and t.dim()]
    if not inputs or not all(isinstance(t.shape[0], torch.SymInt) for t in inputs):
        return None
    per_sample = sum(map(traced_bytes, gm.graph.nodes)) / concrete_sizes(inputs[0])[0]
    return max(1, int(BACKWARD_BYTES / max(per_sample, 1.0)))


class _Tape(Executor):
    """Records what follows ``scans`` for differentiation, and no parameter."""

    def __init__(self, gm: fx.GraphModule, scans: Sequence[fx.Node]) -> None:
        super().__init__(gm, [], keep=scans)
        self._scans = list(scans)

    @torch.enable_grad()
    def gradients(self, batch: Batch, generator: torch.Generator) -> list[Tensor]:
        outputs, state = self.run(*batch.args, **batch.kwargs)
        logits = logits_of(outputs)
        probe = curvature_probe(logits.detach().double().softmax(1), generator).to(logits.dtype)
        return list(torch.autograd.grad(logits, [state.value(scan) for scan in self._scans], probe))

    def _call(self, node: fx.Node, *envs: dict[fx.Node, Any]) -> Any:
        found = super()._call(node, *envs)
        if node.op == "get_attr" and isinstance(found, Tensor):
            return found.detach()
        if node in self._scans and not found.requires_grad:
            found.requires_grad_()
        return found
