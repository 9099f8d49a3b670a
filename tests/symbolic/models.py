"""Small models for the tests of symbolic tracing, whose forward is written as public code writes it."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from vmeanba_fx.symbolic import check_guard

CHANNELS, STATES = 4, 2


def scan_fn(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False):
    """u, delta (B, K*D, L); A (K*D, N); B, C (B, K, N, L). A loop over L, which would fill the graph if traced into."""
    if delta_softplus:
        delta = F.softplus(delta if delta_bias is None else delta + delta_bias[:, None])
    repeats = u.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(repeats, 1), C.repeat_interleave(repeats, 1)
    h = u.new_zeros(*u.shape[:2], A.shape[1])
    ys = []
    for t in range(u.shape[2]):
        h = torch.exp(delta[..., t, None] * A) * h + delta[..., t, None] * B[..., t] * u[..., t, None]
        ys.append((h * C[..., t]).sum(-1))
    y = torch.stack(ys, -1)
    return y if D is None else y + D[:, None] * u


class ScanFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, nrows=1):
        ctx.nrows = nrows
        return scan_fn(u, delta, A, B, C, D, delta_bias, delta_softplus)


class HidingFunction(torch.autograd.Function):
    """Calls a scan inside of its forward, under a signature that is not a scan's."""

    @staticmethod
    def forward(ctx, us, A, B, C):
        ctx.save_for_backward(us)
        return scan_fn(us, us.abs(), A, B, C) * 2


class Doubled(torch.autograd.Function):
    """Has a backward that is not the derivative of its forward."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 100


def make_closure(softplus):
    def closure_scan(u, delta, A, B, C):
        return scan_fn(u, delta, A, B, C, None, None, softplus)

    return closure_scan


class Wrapped(nn.Module):
    """``call`` is whatever the scan is called through; the rest gives it arguments."""

    def __init__(self, call=None):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.project = nn.Conv2d(3, CHANNELS, 1)
        self.A = nn.Parameter(-torch.rand(2 * CHANNELS, STATES, generator=generator))
        self.features = nn.Conv1d(2 * CHANNELS, 2 * 2 * STATES, 1, groups=2)
        self.call = call

    def arguments(self, x):
        x = self.project(x)
        B, C, H, W = x.shape
        xs = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2).flip(-1)], dim=1).view(B, 2 * C, H * W)
        b, c = self.features(xs).view(B, 2, 2 * STATES, -1).chunk(2, dim=2)
        return xs, F.softplus(xs), self.A, b, c

    def forward(self, x):
        return self.call(*self.arguments(x)).sum(1)


class ByGlobal(Wrapped):
    def forward(self, x):
        return scan_fn(*self.arguments(x)).mean(1)


class ByKeyword(Wrapped):
    def forward(self, x):
        u, delta, A, B, C = self.arguments(x)
        return scan_fn(u=u, delta=delta, A=A, B=B, C=C, delta_softplus=True)


class ByDefaultArgument(Wrapped):
    def forward(self, x, scan=scan_fn):
        return scan(*self.arguments(x))


class ByMethod(Wrapped):
    def selective_scan(self, u, delta, A, B, C):
        return scan_fn(u, delta, A, B, C) + self.A.sum()

    def forward(self, x):
        return self.selective_scan(*self.arguments(x))


class ScanModule(nn.Module):
    """A scan that is a module: ``forward`` has the signature."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Linear(1, 1)

    def forward(self, u, delta, A, B, C):
        return scan_fn(u, delta, A, B, C) * self.gain.weight


class ByLocalWrapper(Wrapped):
    """The official v05: a closure with a scan's signature, defined while the model runs, around the real one."""

    def forward(self, x):
        softplus = self.A.shape[0] > 0

        def selective_scan(u, delta, A, B, C, D=None, delta_bias=None):
            return scan_fn(u, delta, A, B, C, D, delta_bias, softplus)

        return selective_scan(*self.arguments(x))


class Parent(nn.Module):
    """As the official SS2D: ``forward`` is set on the instance."""

    def __init__(self, child):
        super().__init__()
        self.child = child
        self.forward = functools.partial(self.forward_v2, scale=2.0)

    def forward_v2(self, x, scale):
        return self.child(x) * scale


def decorated(fn):
    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        return fn(*args, **kwargs)

    return wrapper


def images(batch=2, height=4, width=6, seed=0, **options):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed), **options)


def calls_of(gm, target):
    return [n for n in gm.graph.nodes if n.op == "call_function" and target in (n.target, n.target.__name__)]


def guards_of(gm):
    return [n.args[2] for n in calls_of(gm, check_guard)]


def assert_equal(gm, model, *inputs):
    with torch.no_grad():
        torch.testing.assert_close(gm(*inputs), model(*inputs), rtol=0, atol=0)


class Small(nn.Module):
    """One function of the input as a module; with a submodule, or it would be a layer and so a single node."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.inner = nn.Identity()
        self.weight = nn.Parameter(torch.arange(1.0, 4.0))

    def forward(self, x):
        return self.function(self, x)


def pad_to_even(self, x):
    _, _, H, W = x.shape
    if (W % 2 != 0) or (H % 2 != 0):
        x = F.pad(x, (0, W % 2, 0, H % 2))
    return torch.cat([x[..., 0::2, 0::2], x[..., 1::2, 1::2]], 1)
