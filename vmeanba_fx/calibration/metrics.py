"""Batches as loaders give them, and the metrics a site's impact is measured with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

from ..capturing.copies import to_device
from ..errors import CalibrationError

__all__ = ["Batch", "Metric", "resolve_metric"]

_LABEL_KEYS = ("labels", "label", "targets", "target", "y")
IGNORED = -100
"""The label of what is left out of accuracy and loss, as in torch's cross entropy."""


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward (``args``, ``kwargs``), the ``labels`` if there are any, and the batch as the loader gave it.

    What ``transform_fn`` of :func:`vmeanba_fx.calibrate` returns for a model with several positional inputs:
    ``Batch((image, mask), labels=labels)``.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    labels: Any = None
    raw: Any = None

    @property
    def size(self) -> int:
        """Samples in the batch: the first dimension of the first tensor."""
        for t in pytree.tree_leaves((self.args, self.kwargs)):
            if isinstance(t, Tensor) and t.dim():
                return t.shape[0]
        raise CalibrationError("a batch without any tensor")

    def to(self, device: torch.device) -> Batch:
        return Batch(*to_device((self.args, self.kwargs, self.labels, self.raw), device))

    def split(self, count: int) -> Iterator[Batch]:
        """Inputs of at most ``count`` samples at a time: tensors as long as the batch are cut, all else stays whole."""
        size = self.size

        def cut(start: int) -> Callable[[Tensor], Tensor]:
            return lambda t: t[start : start + count] if t.dim() and t.shape[0] == size else t

        for start in range(0, size, count):
            args, kwargs = pytree.tree_map_only(Tensor, cut(start), (self.args, self.kwargs))
            yield Batch(args, kwargs)

    def digest(self) -> bytes:
        """SHA-256 over dtypes, shapes and bytes of everything that enters a score."""
        h = hashlib.sha256()
        for leaf in pytree.tree_leaves((self.args, self.kwargs, self.labels)):
            if isinstance(leaf, Tensor):
                h.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
                h.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            else:
                h.update(repr(leaf).encode())
        return h.digest()


def unpack(raw: Any, transform_fn: Callable[[Any], Any] | None = None) -> Batch:
    """What a loader gave, as a :class:`Batch`.

    A tensor is the only input; ``(x,)`` and ``(x, labels)`` are input and labels; of a mapping, the key ``labels``
    (or ``label``, ``target(s)``, ``y``) holds the labels and the rest are keyword inputs; so are those of
    ``(mapping, labels)``. ``transform_fn`` maps any other batch to one of these, or to a :class:`Batch`.

    Raises:
        CalibrationError: none of these.
    """
    if transform_fn is not None and not callable(transform_fn):
        raise CalibrationError(f"transform_fn must be a callable that maps a batch, not {type(transform_fn).__name__}")
    given = raw if transform_fn is None else transform_fn(raw)
    if isinstance(given, Batch):
        return Batch(given.args, given.kwargs, given.labels, raw)
    if isinstance(given, Tensor):
        return Batch((given,), raw=raw)
    if isinstance(given, Mapping):
        kwargs = dict(given)
        labels = next((kwargs.pop(key) for key in _LABEL_KEYS if key in kwargs), None)
        return Batch((), kwargs, labels, raw)
    if isinstance(given, (tuple, list)) and len(given) in (1, 2):
        labels = given[1] if len(given) == 2 else None
        if isinstance(given[0], Tensor):
            return Batch((given[0],), labels=labels, raw=raw)
        if isinstance(given[0], Mapping):
            return Batch((), dict(given[0]), labels, raw)
    kind = type(given).__name__
    if isinstance(given, (tuple, list)):
        kind += f" of {', '.join(type(item).__name__ for item in given[:4])}{', ...' if len(given) > 4 else ''}"
    raise CalibrationError(
        f"cannot tell inputs from labels in a batch that is a {kind}: give tensors, or "
        "transform_fn=lambda batch: (inputs, labels)"
    )


def logits_of(outputs: Any) -> Tensor:
    """The class scores among a model's outputs: the tensor itself, ``.logits``, ``["logits"]``, or the only tensor."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), Tensor):
        return outputs["logits"]
    if isinstance(getattr(outputs, "logits", None), Tensor):
        return outputs.logits
    tensors = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    if len(tensors) == 1:
        return tensors[0]
    raise CalibrationError(
        f"the model returns {len(tensors)} tensors and none is called logits: "
        "pass metric=callable(outputs, batch), which gets the outputs whole"
    )


def class_scores(outputs: Any) -> Tensor:
    """The class scores (B, classes, ...) among a model's outputs, float64.

    Raises:
        CalibrationError: the model does not return class scores.
    """
    scores = logits_of(outputs)
    if not scores.is_floating_point() or scores.dim() < 2 or scores.shape[1] < 2:
        raise CalibrationError(
            f"the model returns {scores.dtype} of shape {tuple(scores.shape)}, not class scores (batch, classes, ...) of two "
            "classes or more: pass metric=callable(outputs, batch)"
        )
    return scores.double()


def _class_numbers(scores: Tensor, labels: Any) -> Tensor:
    """Labels that fit the scores (B, classes, ...); a comparison of other shapes or kinds would give nonsense."""
    expected, classes = (*scores.shape[:1], *scores.shape[2:]), scores.shape[1]
    whole = isinstance(labels, Tensor) and not labels.is_floating_point() and not labels.is_complex()
    if not whole or tuple(labels.shape) != expected:
        got = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise CalibrationError(
            f"labels must be class numbers, a tensor of whole numbers of shape {expected} for class scores of shape "
            f"{tuple(scores.shape)}, got {got}: pass transform_fn, or a metric of your own"
        )
    labels = labels.long()
    counted = labels[labels != IGNORED]
    if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= classes):
        raise CalibrationError(
            f"labels lie between {int(counted.min())} and {int(counted.max())}, but the model has the classes 0 to "
            f"{classes - 1}: pass transform_fn; {IGNORED} marks what is to be ignored"
        )
    return labels


def _mean_of_labelled(values: Tensor, labels: Tensor) -> Tensor:
    """Mean over the positions of each sample whose label counts; 0 where none does."""
    counts = (labels != IGNORED).double().reshape(len(labels), -1)
    return (values.double().reshape(counts.shape) * counts).sum(1) / counts.sum(1).clamp_min(1.0)


def _accuracy(outputs: Any, batch: Batch, _: Any) -> Tensor:
    scores = class_scores(outputs)
    labels = _class_numbers(scores, batch.labels)
    return _mean_of_labelled(scores.argmax(1) == labels, labels)


def _loss(outputs: Any, batch: Batch, _: Any) -> Tensor:
    scores = class_scores(outputs)
    labels = _class_numbers(scores, batch.labels)
    return _mean_of_labelled(F.cross_entropy(scores, labels, reduction="none", ignore_index=IGNORED), labels)


def kl(outputs: Any, base: Any) -> Tensor:
    """KL(original || rewritten) of the class distributions, one value per sample; no labels needed."""
    new, old = F.log_softmax(class_scores(outputs), 1), F.log_softmax(class_scores(base), 1)
    return (old.exp() * (old - new)).sum(1).reshape(len(new), -1).mean(1)


def _kl(outputs: Any, _: Batch, base: Any) -> Tensor:
    return kl(outputs, base)


@dataclass(frozen=True)
class Metric:
    """``compute(outputs, batch, base_outputs)`` gives one value per sample, or one for the batch."""

    name: str
    compute: Callable[[Any, Batch, Any], Tensor]
    higher_is_better: bool
    needs_labels: bool


_METRICS = {
    "accuracy": Metric("accuracy", _accuracy, True, True),
    "loss": Metric("loss", _loss, False, True),
    "kl": Metric("kl", _kl, False, False),
}


def resolve_metric(metric: str | Callable[..., Any] | None, has_labels: bool) -> Metric:
    """A metric by name, or from ``callable(outputs, batch) -> float tensor`` with the loader's own batch.

    A callable counts as "higher is better" unless it has an attribute ``higher_is_better = False``. ``None`` is
    ``accuracy`` where the loader gives labels and ``kl`` where it does not.

    Raises:
        CalibrationError: an unknown name, or a metric that needs labels on a loader without.
    """
    if metric is None:
        metric = "accuracy" if has_labels else "kl"
    if isinstance(metric, str):
        if metric not in _METRICS:
            raise CalibrationError(
                f"unknown metric {metric!r}: use {', '.join(_METRICS)}, or a callable(outputs, batch)"
            )
        found = _METRICS[metric]
        if found.needs_labels and not has_labels:
            raise CalibrationError(
                f"metric {metric!r} needs labels, which the loader does not give; metric='kl' needs none"
            )
        return found
    if not callable(metric):
        raise CalibrationError(f"metric must be a name or a callable, not {type(metric).__name__}")
    name = getattr(metric, "__name__", type(metric).__name__)
    fn = metric
    return Metric(name, lambda out, batch, _: fn(out, batch.raw), getattr(fn, "higher_is_better", True), False)


def values_of(metric: Metric, outputs: Any, batch: Batch, base: Any) -> tuple[Tensor, int]:
    """(values, weight) of one batch: a value per sample with weight 1, or one value that counts for the whole batch.

    Values that are not finite are passed on, for the caller to name the site.
    """
    values = metric.compute(outputs, batch, base)
    fits = isinstance(values, Tensor) and values.is_floating_point() and tuple(values.shape) in ((), (batch.size,))
    if not fits:
        got = type(values).__name__
        if isinstance(values, Tensor):
            got = f"a tensor of shape {tuple(values.shape)}, {values.dtype}, for {batch.size} samples"
        raise CalibrationError(
            f"metric {metric.name!r} must return a float tensor, one value or one per sample; got {got}"
        )
    return (values.double().reshape(1), batch.size) if values.dim() == 0 else (values.double(), 1)
