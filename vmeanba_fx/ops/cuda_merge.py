"""What several blocks of a scan made of the same map, added up in a fixed order by `cuda/add_parts.cu`."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from . import cuda_runtime
from .cuda_runtime import TYPE_CODES

_PER_PART = 256  # elements of the output from which a thread may add up all the parts of its own; fewer are for PyTorch's tree


@dataclass(frozen=True)
class Merge:
    """(B, maps * parts, R, H, W) float32 -> `shape`, (B, maps, R, H, W) or (B, R, H, W): each map is a sum of `parts`."""

    parts: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    kernel: cuda_runtime.Kernel | None  # None: PyTorch does it

    @classmethod
    def of(cls, parts: int, shape: tuple[int, ...], dtype: torch.dtype, device: int) -> "Merge":
        if prod(shape[-3:]) % 4 or parts > prod(shape) // _PER_PART:
            return cls(parts, shape, dtype, None)
        macros = (("PARTS", parts), ("OUT_TYPE", TYPE_CODES[dtype]))
        return cls(parts, shape, dtype, cuda_runtime.kernel("add_parts.cu", "add_parts", macros, device))

    def __call__(self, parts: Tensor) -> Tensor:
        if self.kernel is None:
            return parts.unflatten(1, (-1, self.parts)).sum(2).to(self.dtype).view(self.shape)
        out = torch.empty(self.shape, dtype=self.dtype, device=parts.device)
        blocks = -(-out.numel() // 1024)
        self.kernel.launch((blocks, 1, 1), 256, 0, (parts.data_ptr(), out.data_ptr(), out.numel(), parts[0, 0].numel()))
        return out
