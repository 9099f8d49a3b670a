"""Private copies of the caller's model, and moves between devices."""

from __future__ import annotations

import contextlib
import copy
import types
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..errors import CaptureError
from ..graph import fake_mode


def device_of(model: nn.Module) -> torch.device:
    """The one device of a model's parameters and buffers.

    Raises:
        CaptureError: they are on ``meta``, or on several devices.
    """
    devices = {t.device for t in [*model.parameters(), *model.buffers()]}
    if any(d.type == "meta" for d in devices):
        raise CaptureError("the model has parameters on the meta device: load its weights before transforming it")
    if len(devices) > 1:
        raise CaptureError(f"the model is spread over {sorted(map(str, devices))}: move it to one device first")
    return next(iter(devices), torch.device("cpu"))


def to_device(values: Any, device: torch.device) -> Any:
    """``values`` with all tensors in it on ``device``."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), values)


class _CopiesResults(TorchFunctionMode):
    """Lets ``deepcopy`` copy what a module kept of its last forward: tensors with a history, as values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def private_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the CPU in eval mode that shares nothing with it.

    Raises:
        CaptureError: it cannot be copied.
    """
    memo: dict[int, Any] = {}
    try:
        with _CopiesResults():
            private = copy.deepcopy(model, memo).cpu().eval()
        _rebind_closures(private, memo)
        return private
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be deep-copied ({error}); the capture works on a copy"
        ) from error


def _rebind_closures(private: nn.Module, memo: dict[int, Any]) -> None:
    """Make functions that ``private`` holds as attributes refer to its own modules, not to those it was copied from.

    ``deepcopy`` shares functions: ``self.act = lambda x: self.norm(x)`` would run, and in training mode change, the
    caller's model.
    """

    def own_cell(cell: types.CellType) -> types.CellType:
        try:
            held = cell.cell_contents
        except ValueError:  # empty
            return cell
        return types.CellType(memo[id(held)]) if memo.get(id(held), held) is not held else cell

    for module in private.modules():
        for name, fn in vars(module).items():
            if isinstance(fn, types.FunctionType) and fn.__closure__:
                cells = tuple(map(own_cell, fn.__closure__))
                if any(new is not old for new, old in zip(cells, fn.__closure__, strict=True)):
                    own = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, cells)
                    own.__kwdefaults__ = fn.__kwdefaults__
                    setattr(module, name, own)


def move_to_device(gm: fx.GraphModule, device: torch.device) -> None:
    """Move parameters, buffers, constants and every ``device=`` argument of ``gm`` to ``device``, in place."""
    gm.to(device)
    for module in gm.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, name, value.to(device))
        if not isinstance(module, fx.GraphModule):
            continue
        with fake_mode(module.graph) or contextlib.nullcontext():
            for node in module.graph.nodes:
                node.args = pytree.tree_map_only(torch.device, lambda _: device, node.args)
                node.kwargs = pytree.tree_map_only(torch.device, lambda _: device, dict(node.kwargs))
                if "val" in node.meta:
                    node.meta["val"] = pytree.tree_map_only(Tensor, lambda t: t.to(device), node.meta["val"])
        module.recompile()
