"""What the command line names: models, data, devices. Arguments are parsed as literals, never evaluated."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import models
from ..data import FashionMNIST, load_digits_images, make_loader
from ..errors import VMeanbaError
from ..models import load_checkpoint
from ..tensor_files import read_safetensors

_ARRAYS = ("images", "labels")
_MOST_COMPRESSED = 100
_MOST_ARRAYS = 1_000
_TABLE_BYTES = 2**24  # where the table of contents lies, at the end of an archive


class CommandError(VMeanbaError):
    """Something the command line named that cannot be used."""


def rank(text: str) -> int | str:
    """An argparse type: ``auto`` or a whole number of at least 1."""
    return text if text == "auto" else at_least(1)(text)


def at_least(low: int) -> Callable[[str], int]:
    """An argparse type: a whole number not below ``low``."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return number

    return parse


@dataclass(frozen=True)
class ModelSpec:
    """A parsed ``--model``: a module (dotted name or .py file), a name in it, and literal arguments."""

    text: str
    module: str
    factory: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """``pkg.mod:factory(key=literal)``, ``file.py:factory``, or a name of ``vmeanba_fx.models``."""
        match = re.fullmatch(r"(?:(?P<module>.+?):)?(?P<call>[A-Za-z_][\w.]*(?:\(.*\))?)", text.strip(), re.DOTALL)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not MODULE:FACTORY or MODULE:FACTORY(key=value, ...)")
        try:
            call = ast.parse(match["call"], mode="eval").body
            args, kwargs = [], {}
            if isinstance(call, ast.Call):
                args = [ast.literal_eval(arg) for arg in call.args]
                if any(keyword.arg is None for keyword in call.keywords):
                    raise ValueError("** is not a literal")
                kwargs = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
                call = call.func
            if not isinstance(call, ast.Name | ast.Attribute):
                raise ValueError("not a name")
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
            raise argparse.ArgumentTypeError(
                f"{text!r}: arguments must be plain literals, as in factory(num_classes=10, dims=[16, 32])"
            ) from None
        return cls(text, match["module"] or "vmeanba_fx.models", ast.unparse(call), tuple(args), kwargs)

    def build(self) -> nn.Module:
        """Import the module, call the factory.

        Raises:
            CommandError: there is no such module or name, the factory fails, or it does not give a model.
        """
        module = self._import()
        try:
            found = attrgetter(self.factory)(module)
        except AttributeError:
            hint = ""
            if module is models and "." in self.factory:
                hint = f"; name a factory in a file as {self.factory}:FACTORY"
            elif module is models:
                names = ", ".join(name for name in models.__all__ if name.startswith(("vmamba_", "vanilla_")))
                hint = f", only {names}; name a model of your own as path/to/file.py:FACTORY or MODULE:FACTORY"
            raise CommandError(f"--model: {self.module} has no {self.factory!r}{hint}") from None
        if isinstance(found, nn.Module) and not (self.args or self.kwargs):
            return found
        if not callable(found):
            raise CommandError(f"--model: {self.text} is a {type(found).__name__}, neither a model nor a factory")
        try:
            model = found(*self.args, **self.kwargs)
        except Exception as error:
            raise CommandError(f"--model: {self.text} fails: {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise CommandError(f"--model: {self.text} returns a {type(model).__name__}, not a torch.nn.Module")
        return model

    def _import(self) -> Any:
        try:
            if not self.module.endswith(".py"):
                _search_first(Path.cwd())
                return importlib.import_module(self.module)
            path = Path(self.module)
            if not path.is_file():
                raise CommandError(f"--model: {path}: no such file")
            _search_first(path.resolve().parent)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None, "a .py file has a loader"
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(path.stem, module)
            spec.loader.exec_module(module)
            return module
        except CommandError:
            raise
        except Exception as error:
            raise CommandError(f"--model: cannot import {self.module}: {type(error).__name__}: {error}") from error


def _search_first(folder: Path) -> None:
    """Let ``import`` find what lies beside the user's model, as ``python file.py`` and ``python -m`` do."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@dataclass(frozen=True)
class DataSpec:
    """A parsed ``--data``. ``kind``: digits, fashion-mnist, random or file; ``shape`` of random data (B, C, H, W)."""

    kind: str
    path: str = ""
    shape: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> DataSpec:
        kind, _, rest = text.partition(":")
        if text == "digits":
            return cls("digits")
        if kind == "fashion-mnist" and rest:
            return cls("fashion-mnist", path=rest)
        if kind == "random":
            if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5}){3}", rest):
                raise argparse.ArgumentTypeError(f"{text!r}: write random:B,C,H,W, as in random:8,3,224,224")
            return cls("random", shape=tuple(map(int, rest.split(","))))
        if Path(text).suffix in (".npz", ".safetensors"):
            return cls("file", path=text)
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected digits, fashion-mnist:FOLDER, random:B,C,H,W, FILE.npz or FILE.safetensors"
        )

    def loader(self, *, batch: int, size: int | None, seed: int, batches: int | None, like: nn.Module) -> _Cast:
        """Batches (images, labels), or images where there are no labels, in the dtype of the model ``like``.

        Of the two named data sets the training part is taken, in a fixed order.
        """
        if size is not None and self.kind != "fashion-mnist":
            raise CommandError(f"--size has no effect on --data {self.kind}, only on fashion-mnist")
        dtype = next((p.dtype for p in like.parameters() if p.is_floating_point()), torch.float32)
        return _Cast(self._batches(batch, size, seed, batches), dtype)

    def _batches(self, batch: int, size: int | None, seed: int, batches: int | None) -> Any:
        if self.kind == "random":
            generator = torch.Generator().manual_seed(seed)
            return [torch.randn(self.shape, generator=generator) for _ in range(batches or 1)]
        try:
            if self.kind == "fashion-mnist":
                return DataLoader(FashionMNIST(self.path, train=True, size=size or 96), batch)
            images, labels = load_digits_images(train=True) if self.kind == "digits" else _read(Path(self.path))
        except (ValueError, ImportError) as error:
            raise CommandError(f"--data: {error}") from error
        return images.split(batch) if labels is None else make_loader(images, labels, batch)


class _Cast:
    """A loader's batches with the images in ``dtype``."""

    def __init__(self, batches: Any, dtype: torch.dtype) -> None:
        self.batches, self.dtype = batches, dtype

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            yield batch.to(self.dtype) if isinstance(batch, Tensor) else (batch[0].to(self.dtype), batch[1])


def _read(path: Path) -> tuple[Tensor, Tensor | None]:
    """``images`` and, where there are any, ``labels`` of a file; nothing in the file is executed."""
    if not path.is_file():
        raise CommandError(f"--data: {path}: no such file")
    try:
        if path.suffix == ".npz":
            _refuse_bomb(path)
            _check_data(path, _promised(path))  # before gigabytes are unpacked
            with np.load(path, allow_pickle=False) as file:
                found = {name: torch.from_numpy(file[name]) for name in _ARRAYS if name in file.files}
        else:
            found = read_safetensors(path)
    except CommandError:
        raise
    except Exception as error:  # the readers raise a dozen types on damaged files
        raise CommandError(f"--data: {path} cannot be read: {error}") from error
    _check_data(path, found)
    labels = found.get("labels")
    return found["images"], None if labels is None else labels.long()


def _check_data(path: Path, found: Mapping[str, Tensor]) -> None:
    images, labels = found.get("images"), found.get("labels")
    if images is None:
        raise CommandError(f"--data: {path} holds no 'images'")
    if not images.is_floating_point() or images.dim() < 2 or not len(images):
        raise CommandError(
            f"--data: {path}: images are {images.dtype} {tuple(images.shape)}; "
            "expected at least one, floating point, normalised as the model wants them"
        )
    if labels is None:
        return
    if labels.is_floating_point() or labels.is_complex() or not labels.dim() or len(labels) != len(images):
        raise CommandError(
            f"--data: {path}: labels are {labels.dtype} {tuple(labels.shape)}; expected one class number for each of "
            f"the {len(images)} images"
        )


def _refuse_bomb(path: Path) -> None:
    """A small archive that fills the memory when it is read, or whose table of contents takes seconds to read."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TABLE_BYTES))
        if file.read().count(b"PK\x01\x02") > _MOST_ARRAYS:
            raise ValueError(f"it holds more than {_MOST_ARRAYS:,} arrays")
    with zipfile.ZipFile(path) as archive:
        if any(info.file_size > max(_MOST_COMPRESSED * info.compress_size, 2**27) for info in archive.infolist()):
            raise ValueError(f"it is compressed to less than 1/{_MOST_COMPRESSED}, which no images are")


def _promised(path: Path) -> dict[str, Tensor]:
    """What a .npz file says of its arrays: zeros of their types and shapes, which take no memory."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for name in {f"{name}.npy" for name in _ARRAYS} & set(archive.namelist()):
            with archive.open(name) as file:
                read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, _, dtype = read[np.lib.format.read_magic(file)](file)
            found[name.removesuffix(".npy")] = torch.from_numpy(np.zeros((), dtype)).expand(shape)
    return found


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is a GPU if there is one.

    Raises:
        CommandError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CommandError(f"--device {name}: expected cpu, cuda, cuda:N or auto") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here")
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device {name}: expected cpu, cuda, cuda:N or auto")
    return device


def build_model(spec: ModelSpec, weights: str | None, *, seed: int, device: str = "cpu") -> nn.Module:
    """The model in eval mode on ``device``, with the weights in a file or random ones, of ``seed``."""
    target = resolve_device(device)
    torch.manual_seed(seed)  # a plan belongs to weights: the next command must build the same model
    model = spec.build()
    if weights is not None:
        load_checkpoint(model, weights)
    return model.eval().to(target)
