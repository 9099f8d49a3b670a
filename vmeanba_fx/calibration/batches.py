"""The calibration data: the batches of a loader, and the same batches again for every further pass."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import CalibrationError
from .metrics import Batch, unpack

_KEPT_BYTES = 1 << 30  # batches are kept in memory up to this size, and read again where they are more


class Batches:
    """Batches of ``loader``; at most ``limit`` of them.

    Iterating reads the loader once. :meth:`again` gives chosen batches once more, from memory where they fit, else from
    the loader, whose batches must then be the same (with the same seed) as the first time.
    """

    def __init__(
        self, loader: Iterable[Any], transform_fn: Callable[[Any], Any] | None, limit: int | None, seed: int
    ) -> None:
        if isinstance(loader, Tensor):
            raise CalibrationError("the loader is a tensor: wrap it in a list, [images], to make it one batch")
        pair = loader if isinstance(loader, (tuple, list)) and len(loader) == 2 else ()
        if len({t.dim() for t in pair if isinstance(t, Tensor)}) == 2:
            raise CalibrationError("the loader is inputs and labels, one batch alone: wrap it in a list, [(inputs, labels)]")
        if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
            raise CalibrationError(f"the loader is a {type(loader).__name__}: give something that yields batches")
        self.seed = seed
        self.digests: list[bytes] = []
        self._loader, self._transform, self._limit = loader, transform_fn, limit
        self._kept: list[Batch] | None = []
        self._bytes = 0
        self._stream = self._read()
        try:
            self.first = next(self._stream)
        except StopIteration:
            raise CalibrationError("the calibration loader is empty: it gave no batch") from None
        label = self.first.labels
        if isinstance(loader, Dataset) and (isinstance(label, int) or (isinstance(label, Tensor) and not label.dim())):
            raise CalibrationError("the loader is a data set of single items: give DataLoader(dataset, batch_size)")

    def _read(self) -> Iterator[Batch]:
        for i, raw in enumerate(itertools.islice(self._loader, self._limit)):
            batch = unpack(raw, self._transform)
            if not batch.size:
                raise CalibrationError(f"batch {i} of the calibration loader is empty: it holds no samples")
            yield batch

    def __len__(self) -> int:
        """Batches read so far."""
        return len(self.digests)

    def expected(self) -> int | None:
        """How many batches there will be, where the loader tells."""
        try:
            n = len(self._loader)  # type: ignore[arg-type]
        except TypeError:
            return self._limit
        return n if self._limit is None else min(n, self._limit)

    def chain_of(self, count: int) -> str:
        """One digest of the first ``count`` batches, in order."""
        return hashlib.sha256(b"".join(self.digests[:count])).hexdigest()

    @property
    def chain(self) -> str:
        """One digest of all batches read so far."""
        return self.chain_of(len(self))

    def __iter__(self) -> Iterator[Batch]:
        for batch in itertools.chain([self.first], self._stream):
            self.digests.append(batch.digest())
            self._keep(batch)
            yield batch

    def _keep(self, batch: Batch) -> None:
        if self._kept is None:
            return
        leaves = pytree.tree_leaves((batch.args, batch.kwargs, batch.labels, batch.raw))
        self._bytes += sum(t.nbytes for t in {id(t): t for t in leaves if isinstance(t, Tensor)}.values())
        self._kept = [*self._kept, batch] if self._bytes <= _KEPT_BYTES else None

    def sweep(self) -> Iterator[Batch]:
        """All batches, as often as it is called; the first time it reads the loader."""
        if self.digests:
            yield from (batch for _, batch in self.again(lambda _: True))
            return
        with seeded(self.seed):
            yield from self

    def again(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Batch]]:
        """(index, batch) for every batch whose index is ``wanted``, in order.

        Raises:
            CalibrationError: the loader cannot be read twice, or gives other batches the second time.
        """
        if self._kept is not None:
            yield from ((i, batch) for i, batch in enumerate(self._kept) if wanted(i))
            return
        with seeded(self.seed):
            seen = 0
            for i, batch in enumerate(self._read()):
                seen += 1
                if wanted(i):
                    if batch.digest() != self.digests[i]:
                        raise CalibrationError(
                            f"batch {i} of the calibration loader is another one the second time: give a loader with a "
                            "fixed order, or fewer images (max_batches=), which are kept in memory"
                        )
                    yield i, batch
        if seen < len(self.digests):
            raise CalibrationError(
                "the calibration loader can be read only once and is too large to be kept in memory: "
                "give one that can be iterated again, or max_batches="
            )


def describe_inputs(batch: Batch) -> list[dict[str, Any]]:
    """What :meth:`Plan.apply` needs to capture a fresh model again; empty where an input is neither tensor nor plain.

    Tensors are described by shape and dtype, numbers, strings, flags and ``None`` by their value.
    """
    out: list[dict[str, Any]] = []
    for key, v in [*enumerate(batch.args), *batch.kwargs.items()]:
        if isinstance(v, Tensor):
            out.append({"key": key, "shape": list(v.shape), "dtype": str(v.dtype).removeprefix("torch.")})
        elif v is None or isinstance(v, (bool, int, float, str)):
            out.append({"key": key, "value": v})
        else:
            return []
    return out


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's generators seeded inside, and as they were outside."""
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise CalibrationError(f"seed={seed!r}: give a whole number that is not negative")
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: while CUDA sleeps, that would decide the caller's numbers on the GPU once it wakes.
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield
