"""The released VMamba models by their official names, and the small model of the examples.

Every factory takes keyword overrides of `VSSM`'s arguments, as in `vmamba_tiny_s1l8(num_classes=10, in_chans=1)`, and
returns a model with random weights; `load_checkpoint` brings the trained ones.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path

from .checkpoints import load_checkpoint
from .vmamba import VSSM, Backbone

DIGITS_WEIGHTS = Path(__file__).parent / "digits" / "vmamba_digits.safetensors"

# vanilla_*: the first version (v0). *_s1l*, *_s2l*: the second (ssm_ratio 1 or 2, blocks in the third stage).
_V0 = dict(
    patch_size=4, ssm_d_state=16, ssm_ratio=2.0, ssm_conv_bias=True, forward_type="v0", mlp_ratio=0.0, norm_layer="ln",
    downsample_version="v1", patchembed_version="v1",
)  # fmt: skip
_V2 = dict(
    patch_size=4, ssm_d_state=1, ssm_conv_bias=False, forward_type="v05_noz", mlp_ratio=4.0, norm_layer="ln2d",
    downsample_version="v3", patchembed_version="v2",
)  # fmt: skip
_SPECS: dict[str, dict] = {
    "vanilla_vmamba_tiny": dict(_V0, depths=(2, 2, 9, 2), dims=96, drop_path_rate=0.2),
    "vanilla_vmamba_small": dict(_V0, depths=(2, 2, 27, 2), dims=96, drop_path_rate=0.3),
    "vanilla_vmamba_base": dict(_V0, depths=(2, 2, 27, 2), dims=128, drop_path_rate=0.6),
    "vmamba_tiny_s2l5": dict(_V2, depths=(2, 2, 5, 2), dims=96, drop_path_rate=0.2, ssm_ratio=2.0),
    "vmamba_small_s2l15": dict(_V2, depths=(2, 2, 15, 2), dims=96, drop_path_rate=0.3, ssm_ratio=2.0),
    "vmamba_base_s2l15": dict(_V2, depths=(2, 2, 15, 2), dims=128, drop_path_rate=0.6, ssm_ratio=2.0),
    "vmamba_tiny_s1l8": dict(_V2, depths=(2, 2, 8, 2), dims=96, drop_path_rate=0.2, ssm_ratio=1.0),
    "vmamba_small_s1l20": dict(_V2, depths=(2, 2, 20, 2), dims=96, drop_path_rate=0.3, ssm_ratio=1.0),
    "vmamba_base_s1l20": dict(_V2, depths=(2, 2, 20, 2), dims=128, drop_path_rate=0.5, ssm_ratio=1.0),
}
_SPECS["vmamba_digits"] = dict(
    _V2, in_chans=1, num_classes=10, depths=(4, 4), dims=(24, 40), ssm_ratio=1.0, ssm_conv=-1, mlp_ratio=2.0,
    downsample_version="v1", patchembed_version="v1", drop_path_rate=0.0,
)  # fmt: skip
# The two models of the accuracy studies: 96x96 grey images, ten classes, ten scan sites.
_FASHION = dict(in_chans=1, num_classes=10, depths=(2, 2, 4, 2), dims=48)
_SPECS["vmamba_fashion_v05"] = dict(_V2, **_FASHION, ssm_ratio=1.0)
_SPECS["vmamba_fashion_v0"] = dict(_V0, **_FASHION)
_ARGUMENTS = tuple(inspect.signature(VSSM).parameters)


def _merge(name: str, overrides: dict) -> dict:
    """The arguments of model `name` with `overrides`; `channel_first` is the official factories' short form."""
    overrides = dict(overrides)
    if "pretrained" in overrides:
        raise ValueError(
            f"{name}() does not download weights: get the checkpoint file and call "
            "vmeanba_fx.models.load_checkpoint(model, path)"
        )
    if "channel_first" in overrides:
        overrides["norm_layer"] = "ln2d" if overrides.pop("channel_first") else "ln"
    for key in overrides:
        if key not in _ARGUMENTS:
            close = difflib.get_close_matches(key, _ARGUMENTS, n=1)
            raise TypeError(f"{name}() has no argument {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return {**_SPECS[name], **overrides}


def _factory(name: str) -> Callable[..., VSSM]:
    def make(**overrides) -> VSSM:
        return VSSM(**_merge(name, overrides))

    shown = ("depths", "dims", "ssm_ratio", "ssm_d_state", "forward_type")
    spec = ", ".join(f"{key}={_SPECS[name][key]!r}" for key in shown)
    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"{name}: {spec}. `channel_first` and every argument of `VSSM` may be given."
    return make


vanilla_vmamba_tiny = _factory("vanilla_vmamba_tiny")
vanilla_vmamba_small = _factory("vanilla_vmamba_small")
vanilla_vmamba_base = _factory("vanilla_vmamba_base")
vmamba_tiny_s2l5 = _factory("vmamba_tiny_s2l5")
vmamba_small_s2l15 = _factory("vmamba_small_s2l15")
vmamba_base_s2l15 = _factory("vmamba_base_s2l15")
vmamba_tiny_s1l8 = _factory("vmamba_tiny_s1l8")
vmamba_small_s1l20 = _factory("vmamba_small_s1l20")
vmamba_base_s1l20 = _factory("vmamba_base_s1l20")
vmamba_fashion_v05 = _factory("vmamba_fashion_v05")
vmamba_fashion_v0 = _factory("vmamba_fashion_v0")


def backbone(name: str, *, out_indices: tuple[int, ...] = (0, 1, 2, 3), **overrides) -> Backbone:
    """The model `name` without its classifier, returning feature maps: for `UperNet` and other dense heads."""
    if name not in _SPECS:
        raise ValueError(f"no VMamba is called {name!r}; the names are {', '.join(_SPECS)}")
    return Backbone(out_indices=out_indices, **_merge(name, overrides))


def vmamba_digits(pretrained: bool = False, **overrides) -> VSSM:
    """The small VMamba of the examples, for 32x32 grey digits; `pretrained=True` loads the shipped weights.

    It has no depthwise convolution, so that within a stage its scans alone carry information from place to place.
    """
    if pretrained and overrides:
        raise ValueError(f"vmamba_digits(pretrained=True) cannot be changed: {', '.join(overrides)} given")
    model = VSSM(**_merge("vmamba_digits", overrides))
    return load_checkpoint(model, DIGITS_WEIGHTS) if pretrained else model
