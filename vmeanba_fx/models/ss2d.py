"""The 2-D selective scan module (SS2D) of VMamba: the only place where positions are mixed over long distances.

Shapes: B batch, D inner channels, H x W positions, L = H*W, K = 4 scan directions, N state size, R rank of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import selective_scan
from .layers import GroupedLinear, LayerNorm, Linear, Permute, SpatialSoftmax

K = 4  # scan directions; VMamba always has four, even where two pairs of them coincide

# How the official forward types walk over the positions. v01 to v05 differ in kernels and casts only: our op always
# accumulates in fp32, so here they are one and the same (and so is the tag _no32).
SCAN_MODES = {
    **dict.fromkeys(("v01", "v02", "v03", "v04", "v05", "v2", "v3"), "cross2d"),
    "v051d": "unidi",
    "v052d": "bidi",
    "v052dc": "cascade2d",
}
OUT_NORMS = ("onnone", "ondwconv3", "oncnorm", "onsoftmax", "onsigmoid")


@dataclass(frozen=True)
class ForwardType:
    """A parsed `forward_type`, for instance "v05_onsigmoid_noz": scan mode, out-norm and gate."""

    scan_mode: str
    out_norm: str
    gate: bool
    gate_act: bool
    out_act: bool


def parse_forward_type(text: str) -> ForwardType:
    """Splits "v05_onnone_noz" into its base and tags; an unknown base or tag is an error."""
    base, *tags = text.split("_")
    unknown = [tag for tag in tags if tag not in (*OUT_NORMS, "noz", "nozact", "oact", "no32")]
    norms = [tag for tag in tags if tag in OUT_NORMS]
    if base not in SCAN_MODES or unknown or len(norms) > 1 or len(set(tags)) < len(tags):
        raise ValueError(
            f"forward_type {text!r} is not supported: expected 'v0', 'v0seq' or one of {', '.join(SCAN_MODES)} "
            f"followed by tags, each at most once, out of _noz, _nozact, _oact, _no32 "
            f"and one of _{', _'.join(OUT_NORMS)}"
        )
    return ForwardType(
        scan_mode=SCAN_MODES[base],
        out_norm=norms[0] if norms else "ln",
        gate="noz" not in tags,
        gate_act="nozact" not in tags,
        out_act="oact" in tags,
    )


def cross_scan(x: Tensor, mode: str = "cross2d") -> Tensor:
    """(B, D, H, W) -> (B, 4, D, L): the map as four sequences.

    cross2d: row by row, column by column, and both reversed. bidi: row by row twice, and both reversed. unidi: row by
    row four times.
    """
    rows = x.flatten(2)
    if mode == "unidi":
        return torch.stack([rows, rows, rows, rows], dim=1)
    second = x.transpose(2, 3).flatten(2) if mode == "cross2d" else rows
    forward = torch.stack([rows, second], dim=1)
    return torch.cat([forward, forward.flip(-1)], dim=1)


def cross_merge(ys: Tensor, height: int, width: int, mode: str = "cross2d") -> Tensor:
    """(B, 4, D, L) -> (B, D, H, W): each sequence put back to its positions, then summed."""
    B, _, D, _ = ys.shape
    if mode == "unidi":
        return ys.sum(1).view(B, D, height, width)
    ys = ys[:, :2] + ys[:, 2:].flip(-1)
    if mode == "bidi":
        return ys.sum(1).view(B, D, height, width)
    return ys[:, 0].reshape(B, D, height, width) + ys[:, 1].reshape(B, D, width, height).transpose(2, 3)


def state_matrix(A_logs: Tensor) -> Tensor:
    """The negative real A = -exp(A_logs), never in less than fp32."""
    return -torch.exp(A_logs if A_logs.dtype is torch.float64 else A_logs.float())


def initial_scan_parameters(d_inner: int, d_state: int, dt_rank: int, initialize: str = "v0") -> tuple[Tensor, ...]:
    """A_logs (K*D, N), Ds (K*D,), dt weight (K, D, R), dt bias (K, D), as the official `ssm_init` of that name."""
    Ds = torch.ones(K * d_inner)
    if initialize == "v0":  # S4D-real A; steps log-uniform in [0.001, 0.1]
        A_logs = torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(K * d_inner, 1)
        dt_weight = torch.empty(K, d_inner, dt_rank).uniform_(-(dt_rank**-0.5), dt_rank**-0.5)
        steps = torch.exp(math.log(0.001) + torch.rand(K, d_inner) * math.log(100.0))
        return A_logs, Ds, dt_weight, steps + torch.log(-torch.expm1(-steps))  # the inverse of softplus
    if initialize == "v1":
        A_logs = torch.randn(K * d_inner, d_state)
        return A_logs, Ds, 0.1 * torch.randn(K, d_inner, dt_rank), 0.1 * torch.randn(K, d_inner)
    if initialize == "v2":
        A_logs = torch.zeros(K * d_inner, d_state)
        return A_logs, Ds, 0.1 * torch.rand(K, d_inner, dt_rank), 0.1 * torch.rand(K, d_inner)
    raise ValueError(f"ssm_init must be 'v0', 'v1' or 'v2', not {initialize!r}")


def _depthwise(channels: int, kernel_size: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel_size, padding=(kernel_size - 1) // 2, groups=channels, bias=bias)


def make_out_norm(kind: str, channels: int, channel_first: bool) -> nn.Module:
    """What follows the merge: a LayerNorm, or one of the alternatives the `_on...` tags name."""
    if kind == "onnone":
        return nn.Identity()
    if kind == "onsoftmax":
        return SpatialSoftmax(channel_first)
    if kind == "onsigmoid":
        return nn.Sigmoid()
    if kind == "ln":
        return LayerNorm(channels, channel_first)
    to_first = nn.Identity() if channel_first else Permute(0, 3, 1, 2)
    to_last = nn.Identity() if channel_first else Permute(0, 2, 3, 1)
    conv = _depthwise(channels, 3, bias=False)
    if kind == "ondwconv3":
        return nn.Sequential(to_first, conv, to_last)
    return nn.Sequential(LayerNorm(channels, channel_first), to_first, conv, to_last)


class SS2D(nn.Module):
    """Forward types v01 to v05 and their tags: (B, C, H, W), or (B, H, W, C) if not `channel_first`, to the same shape.

    in_proj -> [gate z] -> depthwise conv -> act -> cross scan -> x_proj, dt_projs -> selective scan
            -> cross merge -> out_norm -> [GELU] -> [* z] -> out_proj
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | str = "auto",
        act_layer: type[nn.Module] = nn.SiLU,
        d_conv: int = 3,
        conv_bias: bool = True,
        dropout: float = 0.0,
        initialize: str = "v0",
        forward_type: str = "v05",
        channel_first: bool = False,
    ):
        super().__init__()
        kind = parse_forward_type(forward_type)
        self.d_inner = int(ssm_ratio * d_model)
        self.d_state = d_state
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.channel_first = channel_first
        self.scan_mode = kind.scan_mode
        self.gate, self.gate_act = kind.gate, kind.gate_act

        self.in_proj = Linear(d_model, self.d_inner * (2 if kind.gate else 1), bias=False, channel_first=channel_first)
        self.act = act_layer()
        self.conv2d = _depthwise(self.d_inner, d_conv, conv_bias) if d_conv > 1 else None
        self.x_proj = GroupedLinear(self.d_inner, self.dt_rank + 2 * d_state, groups=K)
        self.dt_projs = GroupedLinear(self.dt_rank, self.d_inner, groups=K)
        A_logs, Ds, dt_weight, dt_bias = initial_scan_parameters(self.d_inner, d_state, self.dt_rank, initialize)
        nn.init.trunc_normal_(self.x_proj.weight, std=0.02)
        with torch.no_grad():
            self.dt_projs.weight.copy_(dt_weight.flatten(0, 1))
        self.A_logs, self.Ds, self.dt_projs_bias = nn.Parameter(A_logs), nn.Parameter(Ds), nn.Parameter(dt_bias)
        self.out_norm = make_out_norm(kind.out_norm, self.d_inner, channel_first)
        self.out_act = nn.GELU() if kind.out_act else nn.Identity()
        self.out_proj = Linear(self.d_inner, d_model, bias=False, channel_first=channel_first)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        if self.gate:
            x, z = x.chunk(2, dim=1 if self.channel_first else -1)
            z = self.act(z) if self.gate_act else z
        if not self.channel_first:
            x = x.permute(0, 3, 1, 2).contiguous()
        if self.conv2d is not None:
            x = self.conv2d(x)
        x = self.act(x)
        y = self._cascade(x) if self.scan_mode == "cascade2d" else self._scan(x)
        if not self.channel_first:
            y = y.permute(0, 2, 3, 1).contiguous()
        y = self.out_act(self.out_norm(y).to(x.dtype))
        if self.gate:
            y = y * z
        return self.dropout(self.out_proj(y))

    def _scan(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D, H, W): scan in all directions and merge."""
        B, D, H, W = x.shape
        L = H * W
        N, R = self.d_state, self.dt_rank
        xs = cross_scan(x, self.scan_mode).view(B, K * D, L)
        features = self.x_proj(xs).view(B, K, R + 2 * N, L)
        dts, Bs, Cs = torch.split(features, [R, N, N], dim=2)
        dts = self.dt_projs(dts.reshape(B, K * R, L))
        # Ds has the dtype of the out norm's weights, which is what the result is for: under autocast the inputs are
        # half precision and the sum over directions and steps stays in fp32, as in the official "oflex" kernel.
        ys = selective_scan(
            xs, dts, state_matrix(self.A_logs), Bs, Cs, self.Ds,
            delta_bias=self.dt_projs_bias.flatten(), delta_softplus=True, out_dtype=self.Ds.dtype,
        )  # fmt: skip
        return cross_merge(ys.view(B, K, D, L), H, W, self.scan_mode)

    def _cascade(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D, H, W): every row by itself in both directions, then every column of the result."""
        for group, axis in ((slice(0, 2), 2), (slice(2, 4), 3)):
            x = x.permute(0, 2, 3, 1)
            x = F.layer_norm(x, (self.d_inner,))  # no weights: keeps the second scan's input bounded
            x = self._scan_lines(x.transpose(1, 2) if axis == 3 else x, group)
            x = x.permute(0, 2, 1, 3) if axis == 2 else x.permute(0, 2, 3, 1)
        return x

    def _scan_lines(self, x: Tensor, group: slice) -> Tensor:
        """(B, lines, length, D) -> (B, lines, D, length): two scans of each line with the weights of two directions."""
        B, lines, length, D = x.shape
        N, R = self.d_state, self.dt_rank
        x = x.reshape(B * lines, length, D).transpose(1, 2)
        xs = torch.stack([x, x.flip(-1)], dim=1)
        x_weight = self.x_proj.weight.view(K, R + 2 * N, D)[group]
        dt_weight = self.dt_projs.weight.view(K, D, R)[group]
        dts, Bs, Cs = torch.split(torch.einsum("bkdl,kcd->bkcl", xs, x_weight), [R, N, N], dim=2)
        dts = torch.einsum("bkrl,kdr->bkdl", dts, dt_weight)
        ys = selective_scan(
            xs.flatten(1, 2), dts.flatten(1, 2), state_matrix(self.A_logs).view(K, D, N)[group].flatten(0, 1), Bs, Cs,
            self.Ds.view(K, D)[group].flatten(), delta_bias=self.dt_projs_bias[group].flatten(),
            delta_softplus=True, out_dtype=self.Ds.dtype,
        )  # fmt: skip
        # The reversed sequence is not turned back before the sum: neither does the official code, and its weights expect that.
        return ys.view(B, lines, 2, D, length).sum(2)


class SS2DV0(nn.Module):
    """Forward type v0, the first VMamba, (B, H, W, C) -> (B, H, W, C): always gated, always a 3x3 depthwise conv.

    "v0seq" is the same function: the official code runs the four directions in four calls there.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | str = "auto",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.d_inner = int(ssm_ratio * d_model)
        self.d_state = d_state
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.act = nn.SiLU()
        self.conv2d = _depthwise(self.d_inner, 3, bias=True)
        bound = self.d_inner**-0.5
        rows = self.dt_rank + 2 * d_state
        self.x_proj_weight = nn.Parameter(torch.empty(K, rows, self.d_inner).uniform_(-bound, bound))
        A_logs, Ds, dt_weight, dt_bias = initial_scan_parameters(self.d_inner, d_state, self.dt_rank)
        self.A_logs, self.Ds = nn.Parameter(A_logs), nn.Parameter(Ds)
        self.dt_projs_weight, self.dt_projs_bias = nn.Parameter(dt_weight), nn.Parameter(dt_bias)
        self.out_norm = nn.LayerNorm(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        z = self.act(z)
        x = self.act(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))
        B, D, H, W = x.shape
        L = H * W
        N, R = self.d_state, self.dt_rank
        xs = cross_scan(x)
        features = torch.einsum("bkdl,kcd->bkcl", xs, self.x_proj_weight)
        dts, Bs, Cs = torch.split(features, [R, N, N], dim=2)
        # Contiguous, or einsum picks view or copy by the sizes, and an exported graph is tied to that choice.
        dts = torch.einsum("bkrl,kdr->bkdl", dts.contiguous(), self.dt_projs_weight)
        ys = selective_scan(
            xs.view(B, K * D, L), dts.reshape(B, K * D, L), state_matrix(self.A_logs), Bs, Cs, self.Ds,
            delta_bias=self.dt_projs_bias.flatten(), delta_softplus=True, out_dtype=self.Ds.dtype,
        )  # fmt: skip
        y = cross_merge(ys.view(B, K, D, L), H, W).permute(0, 2, 3, 1)
        y = self.out_norm(y) * z
        return self.dropout(self.out_proj(y))


def make_ss2d(d_model: int, *, forward_type: str, channel_first: bool, **options) -> nn.Module:
    """The SS2D module of a forward type; `options` are those of `SS2D`.

    As in the official code v0 has fixed activations, convolution and initialisation and ignores these options.
    """
    if forward_type not in ("v0", "v0seq"):
        return SS2D(d_model, forward_type=forward_type, channel_first=channel_first, **options)
    if channel_first:
        raise ValueError(f"forward_type {forward_type!r} is channel-last only: use norm_layer='ln'")
    kept = {name: options[name] for name in ("d_state", "ssm_ratio", "dt_rank", "dropout") if name in options}
    return SS2DV0(d_model, **kept)
