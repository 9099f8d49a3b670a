"""VMamba: a patch embedding, stages of SS2D and MLP blocks with downsampling between them, and a classifier.

Constructor arguments, `state_dict` keys and outputs are those of the official code (github.com/MzeroMiko/VMamba), so
that its checkpoints load; only torch is needed, and the scan is `vmeanba_fx.ops.selective_scan` on every device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import DropPath, GroupedLinear, LayerNorm, Linear, Mlp, PatchMerge, Permute
from .ss2d import make_ss2d

ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}


def _one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """`value` in lower case, or an error that lists what is allowed."""
    if not isinstance(value, str) or value.lower() not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
    return value.lower()


def _sequential(**modules: nn.Module) -> nn.Sequential:
    """A Sequential whose children are named: "_2" becomes "2", the position the official state dict uses."""
    return nn.Sequential(OrderedDict((name.lstrip("_"), module) for name, module in modules.items()))


def _patch_embed(in_chans: int, dim: int, patch_size: int, norm: bool, channel_first: bool, version: str) -> nn.Module:
    """(B, in_chans, H, W) -> about H/patch_size x W/patch_size; v1 is one convolution, v2 two overlapping ones."""
    if norm:
        out: nn.Module = LayerNorm(dim, channel_first=True, out_channel_first=channel_first)
    else:
        out = nn.Identity() if channel_first else Permute(0, 2, 3, 1)
    if version == "v1":
        return _sequential(_0=nn.Conv2d(in_chans, dim, patch_size, patch_size), _2=out)
    stride = patch_size // 2
    if stride < 1:
        raise ValueError(f"patchembed_version 'v2' needs patch_size >= 2, not {patch_size}")
    return _sequential(
        _0=nn.Conv2d(in_chans, dim // 2, stride + 1, stride, padding=1),
        _2=LayerNorm(dim // 2, channel_first=True) if norm else nn.Identity(),
        _4=nn.GELU(),
        _5=nn.Conv2d(dim // 2, dim, stride + 1, stride, padding=1),
        _7=out,
    )


def _downsample(dim: int, out_dim: int, channel_first: bool, version: str) -> nn.Module:
    """Halves H and W: v1 patch merging and a linear layer, v2 a 2x2 and v3 an overlapping 3x3 convolution."""
    if version == "v1":
        return _sequential(
            _0=PatchMerge(channel_first),
            _1=LayerNorm(4 * dim, channel_first),
            _2=Linear(4 * dim, out_dim, bias=False, channel_first=channel_first),
        )
    kernel, padding = (2, 0) if version == "v2" else (3, 1)
    return _sequential(
        _0=nn.Identity() if channel_first else Permute(0, 3, 1, 2),
        _1=nn.Conv2d(dim, out_dim, kernel, stride=2, padding=padding),
        _3=LayerNorm(out_dim, channel_first=True, out_channel_first=channel_first),
    )


class VSSBlock(nn.Module):
    """x + SS2D(norm(x)), then x + MLP(norm(x)); a branch whose ratio is 0 is left out."""

    def __init__(
        self,
        dim: int,
        *,
        drop_path: float,
        channel_first: bool,
        forward_type: str,
        ssm_ratio: float,
        mlp_ratio: float,
        mlp_act_layer: type[nn.Module],
        mlp_drop_rate: float,
        use_checkpoint: bool,
        **ss2d_options,
    ):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.ssm_branch, self.mlp_branch = ssm_ratio > 0, mlp_ratio > 0
        self.drop_path = DropPath(drop_path)
        if self.ssm_branch:
            self.norm = LayerNorm(dim, channel_first)
            self.op = make_ss2d(
                dim, forward_type=forward_type, channel_first=channel_first, ssm_ratio=ssm_ratio, **ss2d_options
            )
        if self.mlp_branch:
            self.norm2 = LayerNorm(dim, channel_first)
            self.mlp = Mlp(dim, int(dim * mlp_ratio), mlp_act_layer, mlp_drop_rate, channel_first)

    def _branches(self, x: Tensor) -> Tensor:
        if self.ssm_branch:
            x = x + self.drop_path(self.op(self.norm(x)))
        if self.mlp_branch:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x

    def forward(self, x: Tensor) -> Tensor:
        if self.use_checkpoint and self.training:
            return checkpoint(self._branches, x, use_reentrant=False)
        return self._branches(x)


class VSSM(nn.Module):
    """The VMamba classifier: images (B, in_chans, H, W) -> logits (B, num_classes), for any H and W that leave a pixel.

    forward_type: "v0", or "v05" and its relatives with tags, see `vmeanba_fx.models.ss2d`.
    norm_layer: "ln" keeps the maps channel-last, "ln2d" channel-first; the numbers are the same.
    dims: channels per stage, or those of the first, doubled per stage.
    """

    def __init__(
        self,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 2, 9, 2),
        dims: int | Sequence[int] = (96, 192, 384, 768),
        ssm_d_state: int = 16,
        ssm_ratio: float = 2.0,
        ssm_dt_rank: int | str = "auto",
        ssm_act_layer: str = "silu",
        ssm_conv: int = 3,
        ssm_conv_bias: bool = True,
        ssm_drop_rate: float = 0.0,
        ssm_init: str = "v0",
        forward_type: str = "v2",
        mlp_ratio: float = 4.0,
        mlp_act_layer: str = "gelu",
        mlp_drop_rate: float = 0.0,
        gmlp: bool = False,
        drop_path_rate: float = 0.1,
        patch_norm: bool = True,
        norm_layer: str = "LN",
        downsample_version: str = "v2",
        patchembed_version: str = "v1",
        use_checkpoint: bool = False,
        posembed: bool = False,
        imgsize: int = 224,
    ):
        super().__init__()
        dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        if len(dims) != len(depths) or not depths:
            raise ValueError(f"dims and depths must name the same stages: got {len(dims)} dims, {len(depths)} depths")
        if gmlp:
            raise ValueError("gmlp=True is not supported: no released VMamba uses a gated MLP")
        self.channel_first = _one_of("norm_layer", norm_layer, ("ln", "ln2d")) == "ln2d"
        _one_of("downsample_version", downsample_version, ("v1", "v2", "v3"))
        _one_of("patchembed_version", patchembed_version, ("v1", "v2"))
        self.num_classes = num_classes
        self.dims = dims
        self.num_features = dims[-1]

        self.pos_embed = None
        if posembed:
            patches = imgsize // patch_size
            self.pos_embed = nn.Parameter(torch.empty(1, dims[0], patches, patches))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.patch_embed = _patch_embed(in_chans, dims[0], patch_size, patch_norm, self.channel_first, patchembed_version)
        total = sum(depths)
        drop_path = iter([drop_path_rate * i / max(total - 1, 1) for i in range(total)])
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            blocks = nn.Sequential(*(
                VSSBlock(
                    dims[i],
                    drop_path=next(drop_path),
                    channel_first=self.channel_first,
                    forward_type=forward_type,
                    d_state=ssm_d_state,
                    ssm_ratio=ssm_ratio,
                    dt_rank=ssm_dt_rank,
                    act_layer=ACTIVATIONS[_one_of("ssm_act_layer", ssm_act_layer, tuple(ACTIVATIONS))],
                    d_conv=ssm_conv,
                    conv_bias=ssm_conv_bias,
                    dropout=ssm_drop_rate,
                    initialize=ssm_init,
                    mlp_ratio=mlp_ratio,
                    mlp_act_layer=ACTIVATIONS[_one_of("mlp_act_layer", mlp_act_layer, tuple(ACTIVATIONS))],
                    mlp_drop_rate=mlp_drop_rate,
                    use_checkpoint=use_checkpoint,
                )
                for _ in range(depth)
            ))  # fmt: skip
            last = i == len(depths) - 1
            down = nn.Identity() if last else _downsample(dims[i], dims[i + 1], self.channel_first, downsample_version)
            self.layers.append(_sequential(blocks=blocks, downsample=down))
        self.classifier = _sequential(
            norm=LayerNorm(self.num_features, self.channel_first),
            permute=nn.Identity() if self.channel_first else Permute(0, 3, 1, 2),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(1),
            head=nn.Linear(self.num_features, num_classes),
        )
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        """The official initialisation; its small projections leave the scan with almost no weight at the start."""
        if isinstance(module, nn.Linear | GroupedLinear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            bias = getattr(module, "bias", None)
            if bias is not None:
                nn.init.zeros_(bias)

    def embed(self, x: Tensor) -> Tensor:
        """Images to the first stage's feature map."""
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + (self.pos_embed if self.channel_first else self.pos_embed.permute(0, 2, 3, 1))
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


class Backbone(VSSM):
    """VMamba without the classifier: images -> one normed channel-first map (B, dims[i], H_i, W_i) per out index."""

    def __init__(self, out_indices: Sequence[int] = (0, 1, 2, 3), norm_layer: str = "ln", **options):
        super().__init__(norm_layer=norm_layer, **options)
        stages = len(self.layers)
        if not out_indices or list(out_indices) != [i for i in range(stages) if i in out_indices]:
            raise ValueError(f"out_indices must be increasing stages in 0..{stages - 1}, not {tuple(out_indices)}")
        self.out_indices = tuple(out_indices)
        self.out_channels = [self.dims[i] for i in self.out_indices]
        for i in self.out_indices:
            self.add_module(f"outnorm{i}", LayerNorm(self.dims[i], self.channel_first))
        del self.classifier

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]  # maps in place of logits
        x = self.embed(x)
        maps = []
        layer: Any  # with blocks and downsample by name
        for i, layer in enumerate(self.layers):
            x = layer.blocks(x)
            if i in self.out_indices:
                y = self.get_submodule(f"outnorm{i}")(x)
                maps.append((y if self.channel_first else y.permute(0, 3, 1, 2)).contiguous())
            x = layer.downsample(x)
        return maps
