"""What public code puts around its scans: wrappers, hooks, regions, scripted and compiled parts, dictionaries."""

import collections

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import vmeanba_fx
from tests import zoo
from tests.helpers import relative_error
from tests.paper_block import paper_block

X = zoo.images(3)
Output = collections.namedtuple("Output", "logits extra")


def with_blocks(forward):
    """A network whose blocks run ``forward(self, x)``."""
    model = zoo.live(1)
    kind = type("Other", (zoo.Block,), {"forward": forward})
    model.blocks = nn.ModuleList(kind(6, block.op) for block in model.blocks)
    return model.eval()


class Around(nn.Module):
    """``forward`` is given, and has the network as ``net``."""

    def __init__(self, forward):
        super().__init__()
        self.net = zoo.live(1)
        self.around = forward

    def forward(self, *args):
        return self.around(self.net, *args)


def hooked():
    model = zoo.live(1)
    model.blocks[0].register_forward_hook(lambda module, args, out: 2 * out)
    model.blocks[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model


def normalised():
    model = zoo.live(1)
    model.head = parametrizations.weight_norm(model.head)
    return model


def compiled_block():
    model = zoo.live(1)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    return model


@torch.jit.script
def scripted(a: Tensor, b: Tensor) -> Tensor:
    return a * torch.sigmoid(b) + F.silu(a)


class CastsItsInputs(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(cast_inputs=torch.float32, device_type="cuda")
    def forward(ctx, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, nrows=1):
        return zoo.vmamba_scan_fn(u, delta, A, B, C, D, delta_bias, delta_softplus)


def cast_up(self, x):
    return x + self.op(self.norm(x).float())


def recomputed(self, x):
    return x + checkpoint(self.op, self.norm(x), use_reentrant=True)


def without_gradients(self, x):
    with torch.no_grad():
        y = self.norm(x)
    return x + self.op(y)


def cast(u, delta, A, B, C, D, bias):
    return CastsItsInputs.apply(u, delta, A, B, C, D, bias, True)


def compiled(u, delta, A, B, C, D, bias):
    return torch.compile(zoo.selective_scan_fn, backend="eager")(u, delta, A, B, C, D, None, bias, True)


CASES = {
    "DataParallel": lambda: nn.DataParallel(zoo.live(1)),
    "training mode": lambda: zoo.live(1).train(),
    "hooks": hooked,
    "parametrised weights": normalised,
    "compiled block": compiled_block,
    "compiled scan": lambda: zoo.live(1, call=compiled),
    "custom_fwd": lambda: zoo.live(1, call=cast),
    "scripted helper": lambda: Around(lambda net, x: scripted(net(x), x.mean())),
    "autocast as a decorator": lambda: with_blocks(torch.amp.autocast("cuda", enabled=False)(cast_up)),
    "reentrant checkpoint": lambda: with_blocks(recomputed),
    "no_grad region": lambda: with_blocks(without_gradients),
    "inference_mode": lambda: with_blocks(torch.inference_mode()(cast_up)),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:.*torch.jit.script")
@pytest.mark.parametrize("name", CASES)
def test_surroundings(name):
    with torch.no_grad():
        expected = CASES[name]().eval()(X)
    gm = vmeanba_fx.capture(CASES[name](), X)
    sites = vmeanba_fx.find_sites(gm)
    assert len(sites) == 1 and not sites.refused and not sites[0].annihilated
    with torch.no_grad():
        assert relative_error(vmeanba_fx.transform(gm, [X], k=0)(X), expected) <= 1e-5


def test_a_part_in_half_precision_is_verified_as_that():
    """Its outputs are float32, their rounding is not."""
    model = with_blocks(lambda self, x: x + self.op(self.norm(x).bfloat16()).float())
    model.blocks[0].op.bfloat16()
    replaced = vmeanba_fx.transform(model, [X], sites="*", verify=True)
    model.blocks[0].op.call = lambda u, delta, A, B, C, D, bias: paper_block(u, delta, A, B, C, D, None, bias, True)
    with torch.no_grad():
        assert relative_error(replaced(X), model(X)) <= 2e-2


def test_a_dictionary_in_and_a_dictionary_out():
    def forward(net, batch):
        return {"logits": net(batch["image"] * batch["scale"]), "more": Output(batch["image"].mean(), None), "count": 3}

    model = Around(forward).eval()

    def batch(size):
        return {"image": zoo.images(size), "scale": torch.rand(size, 1, 1, 1), "name": "a"}

    gm = vmeanba_fx.capture(model, (batch(3),))
    assert len(vmeanba_fx.find_sites(gm)) == 1
    given = batch(5)
    with torch.no_grad():
        found, expected = gm(given), model(given)
    assert found["count"] == 3 and isinstance(found["more"], Output) and found["more"].extra is None
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
