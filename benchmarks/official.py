"""The official VMamba with its own CUDA scan, for the benchmarks and for the command line.

The command line takes its file and its scan from the environment:

    OFFICIAL_VMAMBA=vmamba.py OFFICIAL_SO=selective_scan_cuda_oflex.so \\
        vmeanba-fx bench --model benchmarks/official.py:vmamba_tiny_s1l8 --batch 128 --autocast float16 --out benchmarks/results
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor, nn


def vmamba_tiny_s1l8():
    return load_official(os.environ["OFFICIAL_VMAMBA"], os.environ["OFFICIAL_SO"]).vmamba_tiny_s1l8()


def load_official(path: str, extension: str | None) -> types.ModuleType:
    """The official file with its own CUDA scan; timm and fvcore, needed for training and counting, are stand-ins."""
    if "official_vmamba" in sys.modules:
        return sys.modules["official_vmamba"]
    stand_ins = {n: types.ModuleType(n) for n in ("timm", "timm.models", "timm.models.layers", "fvcore", "fvcore.nn")}
    stand_ins["timm.models"].register_model = lambda f: f
    stand_ins["timm.models.layers"].DropPath = type("DropPath", (nn.Identity,), {"__init__": _drop_path})
    stand_ins["timm.models.layers"].trunc_normal_ = nn.init.trunc_normal_
    for n in ("FlopCountAnalysis", "flop_count_str", "flop_count", "parameter_count"):
        setattr(stand_ins["fvcore.nn"], n, None)
    import triton  # noqa: F401  before the patch, which forgets every module imported while it lasts

    with mock.patch.dict(sys.modules, stand_ins):
        spec = importlib.util.spec_from_file_location("official_vmamba", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    sys.modules["official_vmamba"] = module
    if extension:
        spec = importlib.util.spec_from_file_location("selective_scan_cuda_oflex", extension)
        scan = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(scan)
        module.selective_scan_cuda_oflex = scan

        def fast(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, oflex=True, backend=None):
            return module.SelectiveScanCuda.apply(u, delta, A, B, C, D, delta_bias, delta_softplus, oflex, "oflex")

        module.selective_scan_fn = fast
    return module


def _drop_path(self: nn.Module, drop_prob: float = 0.0) -> None:
    nn.Identity.__init__(self)
    self.drop_prob = drop_prob


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
