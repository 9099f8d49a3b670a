"""Imports the official vmamba.py, unmodified, on a machine without CUDA, Triton, timm and fvcore.

The file is not part of this repository; VMEANBA_OFFICIAL_VMAMBA says where it is.
"""

import importlib.util
import os
import sys
import types
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch

VARIABLE = "VMEANBA_OFFICIAL_VMAMBA"


class _DropPath(torch.nn.Module):
    """timm's, as far as evaluation needs it."""

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.training and self.drop_prob:
            raise NotImplementedError("the stand-in for timm's DropPath is for evaluation only")
        return x


def _module(name: str, **attributes) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    return module


def _stand_ins() -> dict[str, types.ModuleType]:
    names = ("FlopCountAnalysis", "flop_count_str", "flop_count", "parameter_count")
    language = _module("triton.language", constexpr=object, tensor=object)
    return {
        "timm": _module("timm"),
        "timm.models": _module("timm.models", register_model=lambda function: function),
        "timm.models.layers": _module("timm.models.layers", DropPath=_DropPath, trunc_normal_=torch.nn.init.trunc_normal_),
        "fvcore": _module("fvcore"),
        "fvcore.nn": _module("fvcore.nn", **dict.fromkeys(names)),
        "triton": _module("triton", jit=lambda function: function, language=language),
        "triton.language": language,
    }


def load_official() -> types.ModuleType:
    """The official module, or a skipped test that says how to get it."""
    path = os.environ.get(VARIABLE)
    if not path:
        pytest.skip(f"set {VARIABLE} to the path of vmamba.py from github.com/MzeroMiko/VMamba to compare with it")
    if not Path(path).is_file():
        pytest.fail(f"{VARIABLE}: no such file: {path}")
    name = "official_vmamba"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        with mock.patch.dict(sys.modules, _stand_ins()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]
