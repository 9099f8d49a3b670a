"""UperNet: a semantic segmentation head (pyramid pooling and a feature pyramid) on a backbone of several maps.

The modules carry the names mmsegmentation gives them, `backbone.*` and `decode_head.*`: the official VMamba
segmentation checkpoints use that layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNormAct(nn.Module):
    """A bias-free convolution, BatchNorm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


class UperHead(nn.Module):
    """Feature maps (B, in_channels[i], H_i, W_i), finest first -> logits (B, num_classes, H_0, W_0).

    The last map is pooled to each size of `pool_scales` and joined with itself; every coarser result is added to the
    next finer map; all of them are resized to the finest and fused.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ):
        super().__init__()
        *finer, last = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvNormAct(last, channels, 1)) for scale in pool_scales
        )
        self.bottleneck = ConvNormAct(last + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNormAct(size, channels, 1) for size in finer)
        self.fpn_convs = nn.ModuleList(ConvNormAct(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvNormAct(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        last = maps[-1]
        pooled = [_resize(module(last), last) for module in self.psp_modules]
        top = self.bottleneck(torch.cat([last, *pooled], dim=1))
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=False)]
        outputs = [top]
        for lateral, conv in zip(reversed(laterals), reversed(self.fpn_convs), strict=True):
            top = lateral + _resize(top, lateral)
            outputs.insert(0, conv(top))
        fused = self.fpn_bottleneck(torch.cat([_resize(x, outputs[0]) for x in outputs], dim=1))
        return self.conv_seg(self.dropout(fused))


class UperNet(nn.Module):
    """Images (B, 3, H, W) -> logits (B, num_classes, H, W); `backbone` returns maps of `out_channels`, finest first."""

    def __init__(self, backbone: nn.Module, num_classes: int, channels: int = 512, **head_options):
        super().__init__()
        in_channels = getattr(backbone, "out_channels", None)
        if not in_channels:
            raise ValueError("UperNet needs a backbone with `out_channels`, such as vmeanba_fx.models.Backbone")
        self.backbone = backbone
        self.decode_head = UperHead(in_channels, num_classes, channels, **head_options)

    def forward(self, x: Tensor) -> Tensor:
        return _resize(self.decode_head(self.backbone(x)), x)
