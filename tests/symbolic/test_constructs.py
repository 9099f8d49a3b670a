"""Python constructs that plain fx does not trace: for other sizes too, the graph computes what the model does, bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.symbolic.models import Small, assert_equal, images
from vmeanba_fx.symbolic import symbolic_trace


def star_unpacking(self, x):
    first, *rest = x.unbind(1)
    B, *_, W = x.shape
    return first.view(B, -1, W) + sum(rest)


def named_results(self, x):
    best = x.max(dim=1)
    values, indices = x.topk(2, dim=1)
    return best.values + values[:, 1] + indices[:, 0]


def item_assignment(self, x):
    B, C, H, W = x.shape
    y = x.new_empty((B, 2, C, H * W))
    y[:, 0] = x.flatten(2)
    y[:, 1] = torch.flip(y[:, 0], dims=[-1])
    return y


def in_place_through_views(self, x):
    y = x.clone()
    z = y
    y += 1
    y[0].mul_(3)  # the result is not used, the effect is
    row = y[:, 0]
    row -= 2
    return y + z


def turned_in_place(self, x):
    y = x.clone()
    H = y.shape[2]
    y.transpose_(2, 3)
    return y.flatten(1).view(y.shape[0], y.shape[3], -1) + H * y.shape[2]


def factories(self, x):
    B, C, H, W = x.shape
    y = torch.zeros(C, H, W)  # fresh in every call
    y += x.sum(0)
    z = torch.ones(B, 1, H, W) * torch.arange(W) + torch.full((H, 1), 2.0)
    return y + z + torch.tensor([1.0, 2.0, 3.0])[:, None, None] + torch.linspace(0, 1, W)


def sizes_everywhere(self, x):
    H, W = x.shape[2:]
    assert isinstance(H, int) and isinstance(x, torch.Tensor) and isinstance(x.shape, torch.Size)
    L = x.shape[2:].numel()
    y = x.reshape(*x.shape[:2], L)[:, :, : L // 2] * (L**-0.5)
    rows, left = divmod(H + W, 2)
    y = F.interpolate(x, size=(2 * H, W + 1)).flatten(2)[..., : L // 2] + y * rows + left
    return y.mean() + torch.tensor(H * W) + (H - W) / L


def real_tensors(self, x):
    weights = [p for p in self.parameters()]  # not read through the module, so no proxies at first
    return x * (weights[0] * 2).view(1, -1, 1, 1) + torch.exp(weights[0]).sum()


def shaped_by_data(self, x):
    kept = self.weight.nonzero()
    return x * kept.shape[0] + self.weight[self.weight > 1].numel()


def by_checkpoint(self, x):
    return checkpoint(lambda y, scale: y * scale, x, 3.0, use_reentrant=False)


def dictionaries(self, x):
    out = {"a": x, "b": [x + 1, (x.shape[0], x * 2)]}
    a = {**out}
    return {"sum": a["a"] + out["b"][1][1], "parts": out["b"][:1], "batch": out["b"][1][0]}


def functional(self, x):
    return F.dropout(F.softmax(x, dim=-1), 0.5, self.training) + torch.einsum("bchw,c->bhw", x, self.weight)[:, None]


def random_numbers(self, x):
    return x + torch.rand_like(x) + torch.rand(x.shape[-1])


@pytest.mark.parametrize(
    "function",
    [
        star_unpacking, named_results, item_assignment, in_place_through_views, turned_in_place, factories,
        sizes_everywhere, real_tensors, shaped_by_data, by_checkpoint, dictionaries, functional,
    ],
)  # fmt: skip
def test_python_constructs(function):
    model = Small(function).eval()
    gm = symbolic_trace(model, images())
    gm.graph.eliminate_dead_code()
    gm.recompile()
    gm.graph.lint()
    for sizes in ((2, 4, 6), (1, 4, 6), (5, 3, 8), (5, 3, 8)):
        assert_equal(gm, model, images(*sizes))
    with torch.no_grad():
        model.weight.mul_(torch.tensor([-1.5, 0.0, 2.0]))  # parameters are read when the graph runs
    assert_equal(gm, model, images())


def test_random_functions_are_nodes():
    gm = symbolic_trace(Small(random_numbers), images())
    torch.manual_seed(5)
    expected = Small(random_numbers)(images(3))
    torch.manual_seed(5)
    assert torch.equal(gm(images(3)), expected)


def test_lazily_built_and_plain_tensors_are_kept():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = None
            self.plain = torch.full((3, 1, 1), 2.0)

        def forward(self, x):
            if self.table is None:
                self.table = torch.arange(3.0).view(3, 1, 1)
            return x * self.table + self.plain

    model = Lazy()
    gm = symbolic_trace(model, images())
    assert model.table is None and not gm.state_dict()
    assert_equal(gm, Lazy(), images(3))
    assert gm.double()(images().double()).dtype == torch.float64
