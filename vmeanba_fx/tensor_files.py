"""Tensors from files that may come from anywhere: no code in them runs, and no table of contents keeps Python busy."""

from __future__ import annotations

import os
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

_MOST = 2**20  # bytes of a table of contents; that of a network of a thousand tensors with its optimiser takes half


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors in a safetensors file.

    Raises:
        ValueError: its header is longer than 1 MiB; safetensors' own errors.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _MOST:
        raise ValueError(f"its header has {length} bytes, more than {_MOST // 2**20} MiB")
    return load_file(path)


def read_torch(file: IO[bytes]) -> object:
    """What a torch file holds: tensors, numbers, texts and plain containers.

    Raises:
        ValueError: its pickle, which Python interprets at a microsecond for a byte or two, is longer than 1 MiB; torch's own
            errors, one of which says that it holds other objects.
    """
    zipped = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    if not zipped:  # the format before PyTorch 1.6
        return torch.load(_Counted(file), map_location="cpu", weights_only=True)
    reader: Any = torch._C.PyTorchFileReader(file)
    if reader.has_record("data.pkl") and record_size(reader, "data.pkl") > _MOST:
        raise ValueError(f"its pickle is longer than {_MOST // 2**20} MiB")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def record_size(reader: Any, name: str) -> int:
    """Bytes of a record of a ``PyTorchFileReader``."""
    own = getattr(reader, "get_record_size", None)  # older PyTorch has no such
    return len(reader.get_record(name)) if own is None else own(name)


class _Counted:
    """``file``, of which ``read`` gives so much and no more: the pickle. The tensors behind it are read in other ways."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._left = file, _MOST

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"its pickle is longer than {_MOST // 2**20} MiB")
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
