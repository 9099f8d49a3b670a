"""Reading and writing model weights. A file is never half loaded, and no file can run code.

Accepted are safetensors files and torch files (`weights_only=True`) that hold a state dict, plainly or under "model",
"state_dict" or "model_ema", with the key names of any official VMamba release.
"""

from __future__ import annotations

import fnmatch
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import VMeanbaError
from ..tensor_files import read_safetensors, read_torch

Model = TypeVar("Model", bound=nn.Module)
CONTAINERS = ("model", "state_dict", "model_ema")
# Names of older releases -> names of the current one.
RENAMES = (
    (r"^module\.", ""),
    (r"^((?:backbone\.)?patch_embed\.)proj\.", r"\g<1>0."),
    (r"^((?:backbone\.)?patch_embed\.)norm\.", r"\g<1>2."),
    (r"(layers\.\d+\.blocks\.\d+\.)ln_1\.", r"\1norm."),
    (r"(layers\.\d+\.blocks\.\d+\.)self_attention\.", r"\1op."),
    (r"(layers\.\d+\.downsample\.)norm\.", r"\g<1>1."),
    (r"(layers\.\d+\.downsample\.)reduction\.", r"\g<1>2."),
    (r"^(norm|head)\.", r"classifier.\1."),
)


class CheckpointError(VMeanbaError, RuntimeError):
    """A checkpoint file that cannot be read or does not fit the model; the model is as it was."""


# Official files carry their training configuration beside the weights. It is read as plain dicts, which run no code.
_INERT: list[Any] = [(OrderedDict, "yacs.config.CfgNode"), (OrderedDict, "argparse.Namespace")]


def read_checkpoint(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU. `key` picks the entry of a torch file ("model_ema", say)."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        content = _guarded(path, lambda: read_safetensors(path))
    else:
        content = _guarded(path, lambda: _read_torch(path))
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    if key is not None:
        if not isinstance(content.get(key), Mapping):
            entries = ", ".join(str(name) for name in list(content)[:8])
            raise CheckpointError(f"{path}: no state dict under {key!r}; the file has {entries}")
        content = content[key]
    else:
        content = next((content[name] for name in CONTAINERS if isinstance(content.get(name), Mapping)), content)
    wrong = [str(name) for name, value in content.items() if not (isinstance(name, str) and _is_plain(value))]
    if wrong or not content:
        reason = f"not a plain tensor: {_some(wrong)}" if wrong else "it is empty"
        raise CheckpointError(f"{path}: not a state dict, {reason}")
    return dict(content)


def _is_plain(value: object) -> bool:
    """A dense tensor with data; others would fail half-way through loading."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_quantized or value.is_meta)


def _read_torch(path: Path) -> object:
    with torch.serialization.safe_globals(_INERT), open(path, "rb") as file:
        return read_torch(file)


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    """`read()` with every way a file can be broken turned into one sentence."""
    try:
        return read()
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|[Gg]lobal) (\S+\.\S+)", str(error))
        if found:
            raise CheckpointError(
                f"{path}: refused, it contains the Python object {found[1]} and could run code; only tensors are loaded"
            ) from error
        raise CheckpointError(f"{path}: not a readable checkpoint (corrupt or truncated?)") from error
    except Exception as error:  # the readers raise a dozen types on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: not a readable checkpoint (corrupt or truncated?): {reason}") from error


def adapt(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`state` with the key names and layouts of `model`, as far as they are known; nothing is dropped."""
    target = model.state_dict()
    out = {}
    for name, value in state.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if name not in target and re.sub(r"_weight$", ".weight", name) in target:
            name = re.sub(r"_weight$", ".weight", name)  # one (K, out, in) parameter of v0, or K stacked maps
        if name not in target and name.removeprefix("backbone.") in target:
            name = name.removeprefix("backbone.")
        if name in target:
            value = _fit(name, value, target[name])
        out[name] = value
    return out


def _fit(name: str, value: Tensor, wanted: Tensor) -> Tensor:
    """`value` in the shape of `wanted` where the official code converts silently too; loading casts the dtype."""
    trailing = value.shape[wanted.ndim :]
    if value.shape[: wanted.ndim] == wanted.shape and trailing and trailing.numel() == 1:
        value = value.reshape(wanted.shape)  # a linear layer stored as a 1x1 convolution
    elif value.ndim == 3 and (value.shape[0] * value.shape[1], value.shape[2]) == tuple(wanted.shape):
        value = value.flatten(0, 1)  # (K, out, in), the weights of K scan directions
    elif name == "pos_embed" and value.ndim == wanted.ndim == 4 and value.shape[1] == wanted.shape[1]:
        if value.shape != wanted.shape:
            value = F.interpolate(value.float(), size=wanted.shape[2:], mode="bicubic", align_corners=False)
    return value


def load_checkpoint(model: Model, path: str | Path, *, key: str | None = None, ignore: Iterable[str] = ()) -> Model:
    """Loads the weights in `path` into `model` (strictly) and returns the model.

    ignore: key patterns such as "classifier.*" that may be missing from the file or be left over in it; a pattern that
    matches nothing is an error. On any error the model is unchanged and the message names the file and the keys.
    """
    content = read_checkpoint(path, key)
    state = adapt(content, model)
    if len(state) < len(content):
        raise CheckpointError(f"{path}: the file holds a parameter under two names, an old and a new one")
    target = model.state_dict()
    meta = [name for name, value in target.items() if value.is_meta]
    if meta:
        raise CheckpointError(f"{path}: the model is on the meta device; call model.to_empty(device='cpu') first")
    ignored: set[str] = set()
    for pattern in ignore:
        matched = set(fnmatch.filter((*state, *target), pattern))
        if not matched:
            raise CheckpointError(f"{path}: ignore pattern {pattern!r} matches no key of the file or the model")
        ignored |= matched
    state = {name: value for name, value in state.items() if name not in ignored}
    problems = {
        "missing": [name for name in target if name not in state and name not in ignored],
        "unexpected": [name for name in state if name not in target],
        "wrong shape": [
            f"{name} (file {tuple(value.shape)}, model {tuple(target[name].shape)})"
            for name, value in state.items()
            if name in target and value.shape != target[name].shape
        ],
    }
    if any(problems.values()):
        text = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {text}")
    model.load_state_dict(state, strict=not ignored)
    return model


def save_checkpoint(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the model's state dict, with text metadata, as a safetensors file."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(state, path, metadata={str(k): str(v) for k, v in (metadata or {}).items()})


def _some(names: list[str], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
