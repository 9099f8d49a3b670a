"""From a traced graph back to a module with the model's own parameters."""

from __future__ import annotations

import copy

from torch import Tensor, fx, nn


def twin_of(model: nn.Module) -> nn.Module:
    """A copy of the model in eval mode that shares its parameters and buffers."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()


def assemble(model: nn.Module, graph: fx.Graph, constants: dict[str, Tensor]) -> fx.GraphModule:
    """A GraphModule over ``graph`` with the state-dict keys of ``model``, in their order, and the very same tensors.

    Modules the graph calls are taken as they are; the others become plain containers of their parameters and buffers.
    ``constants``: the tensors behind ``get_attr`` nodes; those that are no parameter or buffer of ``model`` are added
    as buffers that are not part of the state dict.
    """
    kept = {n.target for n in graph.nodes if n.op == "call_module"}
    kept |= {n.target for n in graph.nodes if n.op == "get_attr" and n.target not in constants}
    empty = fx.Graph(tracer_cls=graph._tracer_cls)  # which the module remembers, for unpickling
    gm = fx.GraphModule(nn.Module(), empty, class_name=type(model).__name__)
    _fill(gm, model, "", kept)
    for name, tensor in constants.items():
        path, _, attribute = name.rpartition(".")
        owner = _module_at(gm, path)
        if attribute not in owner._parameters and attribute not in owner._buffers:
            owner.__dict__.pop(attribute, None)
            owner.register_buffer(attribute, tensor.detach(), persistent=False)
    gm.graph = graph
    return gm.eval()


def _fill(into: nn.Module, model: nn.Module, path: str, kept: set[str]) -> None:
    for name, parameter in model._parameters.items():
        into.register_parameter(name, parameter)
    for name, buffer in model._buffers.items():
        into.register_buffer(name, buffer, persistent=name not in model._non_persistent_buffers_set)
    for name, child in model._modules.items():
        if child is None:
            continue
        below = f"{path}.{name}" if path else name
        if below in kept:
            into.add_module(name, child)
        elif _is_needed(child, below, kept):
            empty = nn.Module()
            into.add_module(name, empty)
            _fill(empty, child, below, kept)


def _is_needed(module: nn.Module, path: str, kept: set[str]) -> bool:
    """Whether anything below holds a tensor or is called."""
    if any(target.startswith(f"{path}.") for target in kept):
        return True
    return any(True for _ in (*module.parameters(), *module.buffers()))


def _module_at(root: nn.Module, path: str) -> nn.Module:
    """The module at ``path``, made of empty modules where there is none."""
    for name in path.split(".") if path else ():
        below = root._modules.get(name)
        if below is None:
            below = nn.Module()
            root.add_module(name, below)
        root = below
    return root
