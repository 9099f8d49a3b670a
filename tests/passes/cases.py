"""What the tests of the exact passes share: own VMambas of every kind, planned once, and a cross scan given by tables."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

import vmeanba_fx
from tests import zoo
from tests.helpers import make_scan_matter
from vmeanba_fx.models import VSSM

EXACT = ("drop_annihilated", "merge_skips", "fuse_ss2d", "join_scans", "fuse_shared", "fuse_means", "channels_last",
         "flatten_positions", "cleanup")  # fmt: skip
BOUND = {torch.float32: 1e-5, torch.float64: 1e-12}
OURS = torch.ops.vmeanba_fx
COMMON = {"depths": [1, 1], "dims": 12, "patch_size": 4, "in_chans": 3, "num_classes": 5, "imgsize": 32}
V05 = {
    "ssm_d_state": 1, "ssm_ratio": 1.0, "ssm_conv_bias": False, "mlp_ratio": 2.0, "norm_layer": "ln2d",
    "downsample_version": "v3", "patchembed_version": "v2",
}  # fmt: skip
V0 = {
    "ssm_d_state": 4, "ssm_ratio": 2.0, "mlp_ratio": 0.0, "norm_layer": "ln", "downsample_version": "v1",
    "patchembed_version": "v1", "forward_type": "v0",
}  # fmt: skip
VARIANTS = {
    "v05_noz": V05 | {"forward_type": "v05_noz"},
    "v05": V05 | {"forward_type": "v05", "ssm_d_state": 3, "ssm_ratio": 2.0},
    "v05_noz, channels last": V05 | {"forward_type": "v05_noz", "norm_layer": "ln"},
    "v05_onnone": V05 | {"forward_type": "v05_onnone_noz"},
    "v05_ondwconv3": V05 | {"forward_type": "v05_ondwconv3_noz"},
    "v05_onsoftmax": V05 | {"forward_type": "v05_onsoftmax_noz"},
    "unidi": V05 | {"forward_type": "v051d_noz"},
    "bidi": V05 | {"forward_type": "v052d_noz"},
    "v0": V0,
}


def targets(gm) -> list:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


@functools.cache
def planned(name: str, dtype: torch.dtype):
    """(plan, images) of an own VMamba at an odd size; captured once."""
    height, width = (28, 44) if name != "v0" else (32, 64)
    model = make_scan_matter(VSSM(**COMMON, **VARIANTS[name])).eval().to(dtype)
    x = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    return vmeanba_fx.calibrate(model, [x], score_sites=False), x


class Walks(nn.Module):
    """Two directions given by index tables, merged by their inverses; the tables are buffers."""

    def __init__(self, tables: torch.Tensor, channels: int, state: int, last: bool = False) -> None:
        super().__init__()
        directions, length = tables.shape
        self.last, self.rank, self.state = last, 2, state
        self.register_buffer("tables", tables)
        self.register_buffer("inverse", torch.argsort(tables, dim=1))
        g = torch.Generator().manual_seed(directions * length)

        def normal(*shape):
            return nn.Parameter(torch.randn(*shape, generator=g))

        self.x_proj = normal(directions, self.rank + 2 * state, channels)
        self.dt_proj = normal(directions, channels, self.rank)
        self.bias, self.A_log = normal(directions * channels), normal(directions * channels, state)
        self.D = normal(directions * channels)

    def split(self, u):
        features = torch.einsum("bkdl,kcd->bkcl", u, self.x_proj)
        return features.split([self.rank, self.state, self.state], dim=2)

    def steps(self, dt):
        return torch.einsum("bkrl,kdr->bkdl", dt, self.dt_proj).flatten(1, 2)

    def scanned(self, u):
        return u

    def merge(self, y):
        return sum(y[:, k][:, :, self.inverse[k]] for k in range(len(self.tables)))

    def forward(self, x):
        x = F.silu(x)
        flat = x.flatten(1, 2).transpose(1, 2) if self.last else x.flatten(2)
        u = torch.stack([flat[:, :, table] for table in self.tables], dim=1)
        dt, B, C = self.split(u)
        delta = self.steps(dt)
        y = zoo.selective_scan_fn(
            self.scanned(u).flatten(1, 2), delta, -self.A_log.exp(), B, C, self.D, None, self.bias, delta_softplus=True
        )
        return self.merge(y.unflatten(1, (len(self.tables), -1)))
