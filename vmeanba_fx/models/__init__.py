"""VMamba in plain PyTorch: official names, weights and outputs. Needs neither CUDA nor a compiler."""

from .checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from .factories import (
    backbone,
    vanilla_vmamba_base,
    vanilla_vmamba_small,
    vanilla_vmamba_tiny,
    vmamba_base_s1l20,
    vmamba_base_s2l15,
    vmamba_digits,
    vmamba_fashion_v0,
    vmamba_fashion_v05,
    vmamba_small_s1l20,
    vmamba_small_s2l15,
    vmamba_tiny_s1l8,
    vmamba_tiny_s2l5,
)
from .upernet import UperNet
from .vmamba import VSSM, Backbone

__all__ = [
    "VSSM",
    "Backbone",
    "CheckpointError",
    "UperNet",
    "backbone",
    "load_checkpoint",
    "save_checkpoint",
    "vanilla_vmamba_base",
    "vanilla_vmamba_small",
    "vanilla_vmamba_tiny",
    "vmamba_base_s1l20",
    "vmamba_base_s2l15",
    "vmamba_digits",
    "vmamba_fashion_v0",
    "vmamba_fashion_v05",
    "vmamba_small_s1l20",
    "vmamba_small_s2l15",
    "vmamba_tiny_s1l8",
    "vmamba_tiny_s2l5",
]
