"""What calibration scores depend on, as digests: a plan made for something else is refused with the reason."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from ..files import is_name, is_number, names_to
from ..graph import SITE, graph_modules

_MAX_OPTIONS = 20


@dataclass(frozen=True)
class Fingerprint:
    """What scores depend on: graph, weights, options, seed, data. Two runs agree where all five do."""

    graph: str
    weights: str
    options: dict[str, Any]
    seed: int
    data: str = ""

    @classmethod
    def of(cls, gm: fx.GraphModule, *, seed: int, options: dict[str, Any]) -> Fingerprint:
        return cls(_graph_digest(gm), _weights_digest(gm), dict(options), seed)

    def with_data(self, data: str) -> Fingerprint:
        return replace(self, data=data)

    def difference(self, other: Fingerprint) -> str:
        """What differs, as words; empty where nothing does. Data are compared where both sides know theirs."""
        parts = {
            "another model graph": self.graph != other.graph,
            "other weights": self.weights != other.weights,
            f"other options, {self.options} against {other.options}": self.options != other.options,
            f"seed {self.seed} against {other.seed}": self.seed != other.seed,
            "other calibration data": bool(self.data and other.data and self.data != other.data),
        }
        return ", ".join(text for text, differs in parts.items() if differs)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: Any) -> Fingerprint:
        """Raises ``ValueError`` where ``d`` is not what :meth:`to_dict` made."""
        ok = isinstance(d, dict) and set(d) == set(cls.__dataclass_fields__) and isinstance(d["options"], dict)
        ok = ok and len(d["options"]) <= _MAX_OPTIONS and names_to(_is_plain)(d["options"])
        ok = ok and type(d["seed"]) is int and 0 <= d["seed"] < 2**64
        if not ok or not all(is_name(d[name]) for name in ("graph", "weights", "data")):
            raise ValueError("the fingerprint is incomplete or holds something that is not part of one")
        return cls(**d)


def _is_plain(option: Any) -> bool:
    return option is None or type(option) is bool or is_number(option) or is_name(option)


def _graph_digest(gm: fx.GraphModule) -> str:
    h = hashlib.sha256()
    for owner in graph_modules(gm):
        order = {node: f"%{i}" for i, node in enumerate(owner.graph.nodes)}
        for node in owner.graph.nodes:
            # Nodes by position; devices do not count, so that a plan made on a CPU serves the model on a GPU.
            args = pytree.tree_map_only(fx.Node, order.__getitem__, (node.args, node.kwargs))
            args = pytree.tree_map_only(torch.device, lambda _: "device", args)
            h.update(f"{node.op} {node.target} {node.meta.get(SITE, '')} {args}\n".encode())
    return h.hexdigest()


def _weights_digest(gm: fx.GraphModule) -> str:
    h = hashlib.sha256()
    tensors = dict(gm.named_parameters(remove_duplicate=False)) | dict(gm.named_buffers(remove_duplicate=False))
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        h.update(t.flatten().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
