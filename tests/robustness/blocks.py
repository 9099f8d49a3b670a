"""Random small networks with selective scans, and an independent reference for any of them with some scans replaced.

A network is drawn as plain data (``Net``, ``Block``), so that a failing one prints as what it is. Every module has two
forwards: the one that is captured, and one in which each scan is a loop over time, or the paper's block
(``tests/paper_block.py``) where it is to be replaced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import zoo
from tests.paper_block import paper_block

CALLS = ("mamba_ssm", "vmamba", "function")
NORMS = ("layer", "layer_2d", "rms", "none", "group", "no_affine")
GATES = ("none", "in_call", "silu", "sigmoid")
MIXERS = ("none", "dwconv", "conv1x1")


@dataclass(frozen=True)
class Block:
    """What a block looks like. ``walk``: a cross scan of 1, 2 or 4 directions, or a sequence, one way or both ways."""

    walk: str
    directions: int
    state: int
    inner: int
    call: str
    norm: str
    gate: str
    before: str
    behind: str
    channels_first: bool
    three_dim_B: bool
    skip: bool
    bias: bool
    softplus: bool
    affine: bool
    residual: bool


@dataclass(frozen=True)
class Net:
    blocks: tuple[Block, ...]
    height: int
    width: int
    dim: int
    dtype: torch.dtype
    seed: int


@st.composite
def blocks(draw) -> Block:
    walk = draw(st.sampled_from(("cross", "cross", "sequence", "both_ways")))
    directions = draw(st.sampled_from((1, 2, 4))) if walk == "cross" else 1
    gate = draw(st.sampled_from(GATES))
    call = "mamba_ssm" if gate == "in_call" else draw(st.sampled_from(CALLS))
    return Block(
        walk, directions, draw(st.integers(1, 3)), draw(st.integers(3, 6)), call, draw(st.sampled_from(NORMS)), gate,
        draw(st.sampled_from(MIXERS)), draw(st.sampled_from(MIXERS)), draw(st.booleans()),
        directions == 1 and draw(st.booleans()), draw(st.booleans()), draw(st.booleans()), draw(st.booleans()),
        draw(st.booleans()), draw(st.booleans()),
    )  # fmt: skip


@st.composite
def nets(draw) -> Net:
    dtype = draw(st.sampled_from((torch.float64, torch.float64, torch.float32, torch.bfloat16)))
    return Net(
        tuple(draw(st.lists(blocks(), min_size=1, max_size=3))), draw(st.integers(2, 4)), draw(st.integers(2, 4)),
        draw(st.integers(3, 6)), dtype, draw(st.integers(0, 2**16)),
    )  # fmt: skip


class Mixer(nn.Module):
    """(B, dim, H, W) or (B, H, W, dim) -> the same layout."""

    def __init__(self, spec: Block, dim: int) -> None:
        super().__init__()
        self.spec, D, N = spec, spec.inner, spec.state
        K, rank = spec.directions, 2
        scans = 2 if spec.walk == "both_ways" else 1
        self.split = [rank, N, N]
        first = spec.channels_first
        self.in_proj = nn.Conv2d(dim, D, 1) if first else nn.Linear(dim, D)
        self.out_proj = nn.Conv2d(D, dim, 1) if first else nn.Linear(D, dim)
        if spec.gate != "none":
            self.gate_proj = nn.Conv2d(dim, D, 1) if first else nn.Linear(dim, D)
        for name in ("before", "behind"):
            kind = getattr(spec, name)
            if kind != "none":
                conv = nn.Conv2d(D, D, 3, padding=1, groups=D) if kind == "dwconv" else nn.Conv2d(D, D, 1)
                setattr(self, name, conv)
        if spec.norm in ("layer", "layer_2d"):
            self.norm = nn.LayerNorm(D, elementwise_affine=spec.affine)
        elif spec.norm == "group":
            self.norm = nn.GroupNorm(1, D)
        elif spec.norm == "rms":
            self.norm = zoo.RMSNorm(D)
        self.x_proj = nn.ParameterList([torch.randn(K, sum(self.split), D) * D**-0.5 for _ in range(scans)])
        self.dt_proj = nn.ParameterList([torch.randn(K, D, rank) * 0.7 for _ in range(scans)])
        self.A_log = nn.ParameterList([torch.randn(K * D, N) * 0.3 for _ in range(scans)])
        self.D = nn.ParameterList([torch.randn(K * D) * 0.5 for _ in range(scans)])
        self.dt_bias = nn.ParameterList([torch.randn(K * D) * 0.3 - 0.5 for _ in range(scans)])
        self.replaced: dict[int, str] | None = None  # None: as captured; else scan index -> mean, in the reference

    def _call(self, i: int, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> Tensor:
        spec = self.spec
        D = self.D[i] if spec.skip else None
        bias = self.dt_bias[i] if spec.bias else None
        if spec.three_dim_B:
            B, C = B[:, 0], C[:, 0]
        if self.replaced is None:
            if spec.call == "vmamba":
                return zoo.vmamba_scan_fn(u, delta, A, B, C, D, bias, spec.softplus, False)
            if spec.call == "function":
                return zoo.ScanFunction.apply(u, delta, A, B, C, D, bias, spec.softplus)
            return zoo.selective_scan_fn(u, delta, A, B, C, D, z, bias, spec.softplus)
        B, C = (t[:, None] if t.dim() == 3 else t for t in (B, C))
        if i in self.replaced:
            return paper_block(u, delta, A, B, C, D, z, bias, spec.softplus, mean=self.replaced[i])
        return zoo.loop_scan(u, delta, A, B, C, D, z, bias, spec.softplus)[0].to(u.dtype)

    def scan(self, i: int, us: Tensor, z: Tensor | None) -> Tensor:
        """(B, K, D, L) -> the same."""
        features = torch.einsum("bkdl,kcd->bkcl", us, self.x_proj[i])
        dt, B, C = features.split(self.split, dim=2)
        delta = torch.einsum("bkrl,kdr->bkdl", dt, self.dt_proj[i]).flatten(1, 2)
        if not self.spec.softplus:
            delta = delta.abs()
        y = self._call(i, us.flatten(1, 2), delta, -torch.exp(self.A_log[i]), B, C, z)
        return y.unflatten(1, us.shape[1:3])

    def walk(self, u: Tensor, z: Tensor | None) -> Tensor:
        """(B, D, H, W) -> the same."""
        height, width = u.shape[2:]
        rows = None if z is None else z.flatten(2)
        if self.spec.walk == "cross":
            us = zoo.cross_scan(u, self.spec.directions)
            wide = None if rows is None else rows.repeat(1, self.spec.directions, 1)
            return zoo.cross_merge(self.scan(0, us, wide), height, width)
        flat = u.flatten(2)
        y = self.scan(0, flat[:, None], rows)[:, 0]
        if self.spec.walk == "both_ways":
            back = self.scan(1, flat.flip(-1)[:, None], None if rows is None else rows.flip(-1))[:, 0]
            y = y + back.flip(-1)
        return y.unflatten(-1, (height, width))

    def normed(self, y: Tensor) -> Tensor:
        """(B, D, H, W) -> the same."""
        if self.spec.norm == "layer_2d":
            return self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.spec.norm in ("layer", "rms"):
            return self.norm(y.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(-1, y.shape[2:])
        if self.spec.norm == "group":
            return self.norm(y)
        if self.spec.norm == "no_affine":
            return F.layer_norm(y.permute(0, 2, 3, 1), (y.shape[1],)).permute(0, 3, 1, 2)
        return y

    def forward(self, x: Tensor) -> Tensor:
        def maps(t: Tensor) -> Tensor:
            return t if self.spec.channels_first else t.permute(0, 3, 1, 2)

        u = maps(self.in_proj(x))
        if self.spec.before != "none":
            u = self.before(u)
        u = F.silu(u)
        gate = maps(self.gate_proj(x)) if self.spec.gate != "none" else None
        y = self.normed(self.walk(u, gate if self.spec.gate == "in_call" else None))
        if self.spec.gate == "silu":
            y = y * F.silu(gate)
        elif self.spec.gate == "sigmoid":
            y = y * torch.sigmoid(gate)
        if self.spec.behind != "none":
            y = self.behind(y)
        y = self.out_proj(y if self.spec.channels_first else y.permute(0, 2, 3, 1))
        return x + y if self.spec.residual else y


class Model(nn.Module):
    """(B, dim, H, W) -> (B, 4)."""

    def __init__(self, spec: Net) -> None:
        super().__init__()
        self.spec = spec
        self.mixers = nn.ModuleList(Mixer(block, spec.dim) for block in spec.blocks)
        self.head = nn.Linear(spec.dim, 4)

    def forward(self, x: Tensor) -> Tensor:
        for mixer in self.mixers:
            if mixer.spec.channels_first:
                x = mixer(x)
            else:
                x = mixer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


def build(spec: Net) -> Model:
    """The model of ``spec`` in its dtype; its weights depend on ``spec`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = Model(spec)
    return model.to(spec.dtype).eval()


def images(spec: Net, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(spec.seed + batch)
    shape = (batch, spec.dim, spec.height, spec.width)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(spec.dtype)


def site_names(spec: Net) -> dict[str, tuple[int, int]]:
    """Site name -> (mixer, scan in it)."""
    names = {}
    for i, block in enumerate(spec.blocks):
        if block.walk == "both_ways":
            names |= {f"mixers.{i}#0": (i, 0), f"mixers.{i}#1": (i, 1)}
        else:
            names[f"mixers.{i}"] = (i, 0)
    return names


def reference(model: Model, x: Tensor, replaced: dict[str, str]) -> Tensor:
    """The outputs with the sites in ``replaced`` (name -> mean) replaced by the paper's block; nothing of ours runs."""
    places = site_names(model.spec)
    for i, mixer in enumerate(model.mixers):
        mixer.replaced = {places[n][1]: mean for n, mean in replaced.items() if places[n][0] == i}
    try:
        with torch.no_grad():
            return model(x)
    finally:
        for mixer in model.mixers:
            mixer.replaced = None
