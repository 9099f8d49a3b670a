"""Small layers of VMamba. Their parameter names and shapes are those of the official code.

Feature maps are (B, C, H, W), "channel-first", or (B, H, W, C), "channel-last".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear layer over the channels of a feature map; channel-first it runs as a 1x1 convolution."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, channel_first: bool = False):
        super().__init__(in_features, out_features, bias=bias)
        self.channel_first = channel_first

    def forward(self, x: Tensor) -> Tensor:
        if self.channel_first:
            return F.conv2d(x, self.weight[:, :, None, None], self.bias)
        return F.linear(x, self.weight, self.bias)


class GroupedLinear(nn.Module):
    """K independent bias-free linear maps: (B, K*in_features, L) -> (B, K*out_features, L).

    The weight is (K*out_features, in_features); it runs as one grouped 1x1 convolution.
    """

    def __init__(self, in_features: int, out_features: int, groups: int):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(groups * out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight[:, :, None], groups=self.groups)


class LayerNorm(nn.LayerNorm):
    """A LayerNorm over the channels; input and output may each be channel-first or channel-last."""

    def __init__(self, channels: int, channel_first: bool = False, *, out_channel_first: bool | None = None):
        super().__init__(channels)
        self.in_channel_first = channel_first
        self.out_channel_first = channel_first if out_channel_first is None else out_channel_first

    def forward(self, x: Tensor) -> Tensor:
        if self.in_channel_first:
            x = x.permute(0, 2, 3, 1)
        x = super().forward(x)
        return x.permute(0, 3, 1, 2) if self.out_channel_first else x


class Permute(nn.Module):
    """`x.permute(*dims)` as a module."""

    def __init__(self, *dims: int):
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(*self.dims)


class SpatialSoftmax(nn.Module):
    """Softmax over all positions of each channel."""

    def __init__(self, channel_first: bool):
        super().__init__()
        self.channel_first = channel_first

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2) if self.channel_first else x.flatten(1, 2)
        return torch.softmax(flat, dim=2 if self.channel_first else 1).view_as(x)


class PatchMerge(nn.Module):
    """Stacks each 2x2 window into the channels: (C, H, W) -> (4C, ceil(H/2), ceil(W/2)).

    The window order is (0, 0), (1, 0), (0, 1), (1, 1). Odd sizes get a row or column of zeros at the end, where the
    official module (it pads by almost the whole size) raises an error; for even sizes the two agree.
    """

    def __init__(self, channel_first: bool):
        super().__init__()
        self.channel_first = channel_first

    def forward(self, x: Tensor) -> Tensor:
        if self.channel_first:
            _, _, H, W = x.shape
        else:
            _, H, W, _ = x.shape
        # Unknown sizes (export with dynamic H and W) are padded by a computed amount: a test would fix their parity.
        if not (isinstance(H, int) and isinstance(W, int) and H % 2 == 0 and W % 2 == 0):
            x = F.pad(x, (0, W % 2, 0, H % 2) if self.channel_first else (0, 0, 0, W % 2, 0, H % 2))
        corners = ((0, 0), (1, 0), (0, 1), (1, 1))
        if self.channel_first:
            return torch.cat([x[:, :, row::2, col::2] for row, col in corners], dim=1)
        return torch.cat([x[:, row::2, col::2, :] for row, col in corners], dim=-1)


class Mlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, dim: int, hidden_dim: int, act_layer: type[nn.Module], dropout: float, channel_first: bool):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim, channel_first=channel_first)
        self.act = act_layer()
        self.fc2 = Linear(hidden_dim, dim, channel_first=channel_first)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    """Stochastic depth: in training, drops the whole branch of a sample with probability `drop_prob`."""

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        return f"{self.drop_prob:g}"
