"""The gradient score: from one forward and a few backward passes per batch, what replacing each site would change.

Every site gets a gate g in the graph (:mod:`.gates`): at g = 0 the model is the original, at g = 1 the site is
replaced. One gate per image and site, so one backward pass gives the derivative for every image on its own
(images do not depend on each other in eval mode). The estimate of the change at g = 1 is

    loss    dl/dg + 1/2 J^T F J       the derivative, and the curvature that the class probabilities give (Gauss-Newton)
    kl      1/2 J^T F J               its derivative at g = 0 is zero: the unchanged model is its minimum
    others  dm/dg                     a metric of your own must be differentiable

with J = dlogits/dg and F = diag(p) - p p^T. ``J^T F J`` is estimated without bias as the mean of (v^T L^T J)^2 over a few
vectors v of random signs, F = L L^T: each takes one backward pass for all sites, where the exact value would take as
many as there are classes.

An expansion at the unchanged model ranks sites and does not measure them: it is too small where a replacement changes
much, and blind to what a saturated function hides. The plan's curve is measured in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError
from .batches import Batches
from .gates import Gated
from .metrics import Batch, class_scores, values_of
from .resume import Saved
from .scoring import Run, Runner, require_numbers, whole_pass
from .tally import Tally

PROBES = 2
GRADIENT = "gradient"
_CURVED = ("loss", "kl")


class Estimator:
    """Estimated metric of every image with each site replaced on its own, on top of those in ``taken``."""

    def __init__(self, runner: Runner, left: Sequence[int], taken: Sequence[int] = (), *, seed: int = 0) -> None:
        self.runner, self.seed = runner, seed
        self.left, self.taken = list(left), list(taken)
        sites = runner.sites
        self.gated = Gated(runner.gm, [sites[i] for i in self.left], [sites[i] for i in self.taken], runner.replacer)

    def columns(self, index: int, batch: Batch) -> tuple[Tensor, int]:
        """(values (1 + left, n), weight) of batch ``index``: with ``taken`` replaced, then with each of ``left`` too."""
        runner, metric = self.runner, self.runner.metric
        with torch.no_grad():
            run = runner.base(index, batch)
        curved = metric.name in _CURVED
        try:
            found, changes = self._estimates(run, curved)
        except (RuntimeError, NotImplementedError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CalibrationError(
                f"the gradient score does not work for this model ({why}): use score='measured'"
            ) from error
        require_numbers(changes, f"the gradient of the metric {metric.name!r} on batch {index}")
        if not curved and not bool(changes.any()):
            raise CalibrationError(f"metric {metric.name!r} has no gradient: use score='measured', or loss or kl")
        return torch.cat([found[None], found[None] + changes]).cpu(), run.weight

    def _estimates(self, run: Run, curved: bool) -> tuple[Tensor, Tensor]:
        """Metric (n,) and estimated changes (left, n)."""
        metric, batch, images = self.runner.metric, run.batch, run.batch.size

        def forward(gates: Tensor) -> tuple[Tensor, Tensor]:
            outputs = self.gated(gates, batch)
            values, _ = values_of(metric, outputs, batch, run.outputs)
            return values, class_scores(outputs) if curved else values

        gates = torch.zeros(images, len(self.left), device=self.runner.executor.device)
        (values, logits), pull = torch.func.vjp(forward, gates)  # type: ignore[misc]  # two, without has_aux
        changes = pull((torch.ones_like(values), torch.zeros_like(logits)))[0].double()
        if curved:
            changes = changes + self._curvature(run.index, logits, lambda v: pull((torch.zeros_like(values), v))[0])
        if values.numel() != images:  # no value per image: the same share for each
            changes = changes.sum(0, keepdim=True).expand(values.numel(), -1) / values.numel()
        return values.detach(), changes.T

    def _curvature(self, index: int, logits: Tensor, pull: Callable[[Tensor], Tensor]) -> Tensor:
        """1/2 J^T F J (images, left), averaged over the positions of an image as the metric is."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        p = logits.detach().softmax(1)
        total = torch.zeros((), dtype=torch.float64, device=p.device)
        for _ in range(PROBES):
            total = total + pull(curvature_probe(p, generator)).double().square()
        return total / (2 * PROBES * p[0, 0].numel())


def curvature_probe(p: Tensor, generator: torch.Generator) -> Tensor:
    """L v, v random signs and L L^T = diag(p) - p p^T for class probabilities p (images, classes, ...)."""
    signs = torch.randint(0, 2, tuple(p.shape), generator=generator, dtype=torch.float64).to(p) * 2 - 1
    rooted = p.sqrt() * signs
    return rooted - p * rooted.sum(1, keepdim=True)


def estimate_sites(runner: Runner, batches: Batches, saved: Saved, bar: Any, *, seed: int) -> Tally:
    """All batches; columns of the tally: the unchanged model, then every site."""
    estimator = Estimator(runner, range(len(runner.sites)), seed=seed)

    def measure(index: int, batch: Batch) -> tuple[Tensor, int]:
        found = estimator.columns(index, batch)
        bar.update()
        return found

    return whole_pass(measure, [1 + len(runner.sites)], batches, saved, GRADIENT, bar.update)
