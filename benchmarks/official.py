"""The official VMamba, unmodified, with its own CUDA scan or on a machine without CUDA: for benchmarks, tests and command line.

The command line takes its file and its scan from the environment:

    OFFICIAL_VMAMBA=vmamba.py OFFICIAL_SO=selective_scan_cuda_oflex.so \\
        vmeanba-fx bench --model benchmarks/official.py:vmamba_tiny_s1l8 --batch 128 --autocast float16 --out benchmarks/results
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


def vmamba_tiny_s1l8():
    return load_official(os.environ["OFFICIAL_VMAMBA"], os.environ["OFFICIAL_SO"]).vmamba_tiny_s1l8()


def load_official(path: str, extension: str | None = None, *, triton: bool = True) -> Any:
    """The official file, with its own CUDA scan where there is an ``extension``.

    timm and fvcore, needed for training and counting, are stand-ins; without ``triton`` so is Triton, which makes the file take
    its paths of plain PyTorch.
    """
    if "official_vmamba" in sys.modules:
        return sys.modules["official_vmamba"]
    if triton:
        importlib.import_module("triton")  # before the patch, which forgets every module imported while it lasts
    with mock.patch.dict(sys.modules, _stand_ins(triton)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = _import("official_vmamba", path)
    sys.modules["official_vmamba"] = module
    if extension:
        module.selective_scan_cuda_oflex = _import("selective_scan_cuda_oflex", extension)

        def fast(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, oflex=True, backend=None):
            return module.SelectiveScanCuda.apply(u, delta, A, B, C, D, delta_bias, delta_softplus, oflex, "oflex")

        module.selective_scan_fn = fast
    return module


def _import(name: str, path: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no module that Python can import")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _DropPath(nn.Module):
    """timm's, as far as evaluation needs it."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.drop_prob:
            raise NotImplementedError("the stand-in for timm's DropPath is for evaluation only")
        return x


def _stand_ins(triton: bool) -> dict[str, types.ModuleType]:
    counts = ("FlopCountAnalysis", "flop_count_str", "flop_count", "parameter_count")
    found = [
        _module("timm"),
        _module("timm.models", register_model=lambda function: function),
        _module("timm.models.layers", DropPath=_DropPath, trunc_normal_=nn.init.trunc_normal_),
        _module("fvcore"),
        _module("fvcore.nn", **dict.fromkeys(counts)),
    ]
    if not triton:
        language = _module("triton.language", constexpr=object, tensor=object)
        found += [_module("triton", jit=lambda function: function, language=language), language]
    return {module.__name__: module for module in found}


def _module(name: str, **attributes: object) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    return module


@contextlib.contextmanager
def scan_as_op(module: types.ModuleType) -> Iterator[None]:
    """The official module with its CUDA scan as one registered op, as its compiled baseline needs it."""
    if not hasattr(torch.ops, "official_scan") or not hasattr(torch.ops.official_scan, "fwd"):
        scan = module.selective_scan_cuda_oflex

        @torch.library.custom_op("official_scan::fwd", mutates_args=())
        def fwd(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
            return scan.fwd(u, delta, A, B, C, D, bias, True, 1, True)[0]

        @fwd.register_fake
        def _(u, delta, A, B, C, D, bias):
            return torch.empty_like(u, dtype=torch.float32)

    def as_op(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, oflex=True, backend=None):
        return torch.ops.official_scan.fwd(u, delta, A, B, C, D, delta_bias)

    # Raw Triton launches inside autograd.Function break the graph.
    with mock.patch.multiple(module, selective_scan_fn=as_op, WITH_TRITON=False):
        yield
