"""Compiled companions of scans, which raise on a CPU: a capture has PyTorch code in their place and the same numbers."""

import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vmeanba_fx
from tests import zoo
from tests.helpers import relative_error
from vmeanba_fx.capturing.discovery import discover
from vmeanba_fx.capturing.intercept import intercept
from vmeanba_fx.capturing.standins import causal_convolution, convolution_pybind

try:
    import causal_conv1d_cuda
except ImportError:
    causal_conv1d_cuda = None  # as mamba-ssm does it


def gpu_only(*_):
    raise RuntimeError("Expected x.is_cuda() to be true, but got false.")


class AddNorm(torch.autograd.Function):
    """Parameters of mamba-ssm's fused add + norm."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual=None, eps=1e-6, prenorm=False, residual_in_fp32=False, is_rms_norm=False):
        return gpu_only()


class GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True, is_rms_norm=False):
        return gpu_only()


class Fused(torch.autograd.Function):
    """Convolution, projections and scan in one, on compiled functions: mamba-ssm's fast path in short."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx, xz, conv_weight, conv_bias, x_proj, A, D):
        x, z = xz.chunk(2, dim=1)
        x = causal_conv1d_cuda.causal_conv1d_fwd(x, conv_weight, conv_bias, None, None, None, True)
        delta, B, C = torch.einsum("bdl,rd->brl", x, x_proj).split([x.shape[1], 3, 3], dim=1)
        _, _, out = selective_scan_cuda.fwd(x, delta.contiguous(), A, B[:, None], C[:, None], D, z, None, True)  # noqa: F821
        return out


class Block(nn.Module):
    """Add + norm, and a scan behind it; ``compiled`` says which code runs."""

    def __init__(self, compiled):
        super().__init__()
        g = torch.Generator().manual_seed(0)

        def normal(*shape):
            return nn.Parameter(torch.randn(*shape, generator=g) * shape[-1] ** -0.5)

        self.compiled = compiled
        self.weight, self.bias, self.widen = normal(6), normal(6), normal(12, 6)
        self.conv, self.conv_bias, self.x_proj = normal(6, 4), normal(6), normal(12, 6)
        self.A, self.D = nn.Parameter(-torch.rand(6, 3, generator=g)), normal(6)

    def forward(self, x):  # (B, L, 6)
        if self.compiled:
            y, total = AddNorm.apply(x, self.weight, self.bias, x.flip(1), 1e-5, True, True, True)
            y = GatedNorm.apply(y, self.weight, None, total, 1e-5, 3, False, True)
            xz = (y @ self.widen.t()).mT
            return Fused.apply(xz, self.conv, self.conv_bias, self.x_proj, self.A, self.D).mT + total
        total = x + x.flip(1)
        y = F.rms_norm(total, (6,), self.weight, 1e-5) + self.bias
        y = F.rms_norm((y * F.silu(total)).unflatten(-1, (2, 3)), (3,), None, 1e-5).flatten(-2) * self.weight
        x, z = (y @ self.widen.t()).mT.chunk(2, dim=1)
        padded = F.pad(x, (3, 0)).unfold(-1, 4, 1)  # (B, D, L, 4)
        x = F.silu((padded * self.conv[:, None]).sum(-1) + self.conv_bias[:, None])
        delta, B, C = torch.einsum("bdl,rd->brl", x, self.x_proj).split([6, 3, 3], dim=1)
        return zoo.loop_scan(x, delta, self.A, B, C, self.D, z, None, True)[0].mT + total


def test_a_fused_path_of_compiled_code_is_captured():
    model, plain, x = Block(True).eval(), Block(False).eval(), torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(1))
    with pytest.raises(RuntimeError, match="is_cuda"):
        model(x)
    gm = vmeanba_fx.capture(model, x)
    (site,) = vmeanba_fx.find_sites(gm)
    assert site.skip and site.gate and not site.annihilated
    exact = vmeanba_fx.transform(gm, [x], k=0)
    with torch.no_grad():
        for batch in (1, 2, 5):
            images = torch.randn(batch, 9, 6, generator=torch.Generator().manual_seed(batch))
            assert relative_error(exact(images), plain(images)) <= 1e-5
    assert causal_conv1d_cuda is None and "selective_scan_cuda" not in globals()


def test_code_that_runs_keeps_running():
    """A companion that runs on this machine is left alone: it may be another implementation."""

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(x, weight, bias, residual, prenorm, residual_in_fp32, is_rms_norm, eps):
            return 3 * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

    class Model(nn.Module):
        def forward(self, x):
            return Norm.apply(x, None, None, None, False, False, True, 1e-5)

    x = torch.randn(2, 3)
    torch.testing.assert_close(vmeanba_fx.capture(Model(), x)(x), 3 * x)


@pytest.mark.parametrize("between", [(), (None,), (None, None, None)])
def test_every_release_of_the_compiled_convolution(between):
    x, weight, bias = torch.randn(2, 6, 9), torch.randn(6, 4), torch.randn(6)
    expected = F.silu(F.conv1d(F.pad(x, (3, 0)), weight[:, None], bias, groups=6))
    torch.testing.assert_close(convolution_pybind(x, weight, bias, *between, True), expected)
    out = torch.full_like(x, torch.nan)
    convolution_pybind(x, weight, bias, None, None, out, None, True)
    torch.testing.assert_close(out, expected)
    plain = F.conv1d(F.pad(x, (3, 0)), weight[:, None], groups=6)
    torch.testing.assert_close(causal_convolution(x, weight, None, False), plain)
    with pytest.raises(NotImplementedError, match="states"):
        convolution_pybind(x, weight, bias, None, torch.zeros(2, 6, 3), None, True)


def mamba2_fused(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None, seq_idx=None,
    dt_limit=(0.0, float("inf")), return_final_states=False, activation="silu", rmsnorm_weight=None, rmsnorm_eps=1e-6,
    outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True,
):  # fmt: skip
    return gpu_only()


@pytest.mark.parametrize("norm", [False, True], ids=["gate", "gated norm"])
def test_mamba2_fused_path(norm):
    g = torch.Generator().manual_seed(0)
    heads, width, groups, state = 4, 3, 2, 5
    inner = heads * width
    mixed = inner + 2 * groups * state
    conv, conv_bias = torch.randn(mixed, 4, generator=g), torch.randn(mixed, generator=g)
    A, D, bias = -torch.rand(heads, generator=g), torch.randn(heads, generator=g), torch.randn(heads, generator=g) - 1
    weight, out = torch.randn(inner, generator=g) if norm else None, torch.randn(6, inner, generator=g) * 0.1

    class Model(nn.Module):
        def forward(self, packed):
            return mamba2_fused(
                packed, conv, conv_bias, bias, A, D, 4, rmsnorm_weight=weight, outproj_weight=out, headdim=width,
                ngroups=groups, norm_before_gate=False,
            )  # fmt: skip

    def plain(packed):
        z, x, dt = packed.split([inner, mixed, heads], dim=-1)
        x = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), conv[:, None], conv_bias, groups=x.shape[-1]))
        u, B, C = x.split([inner, groups * state, groups * state], dim=1)

        def wide(t):
            return t.repeat_interleave(width, dim=0)

        y, _ = zoo.loop_scan(
            u, dt.mT.repeat_interleave(width, dim=1), wide(A)[:, None].expand(-1, state), B.unflatten(1, (groups, state)),
            C.unflatten(1, (groups, state)), wide(D), None if norm else z.mT, wide(bias), True,
        )  # fmt: skip
        y = y.mT
        if norm:
            y = F.rms_norm((y * F.silu(z)).unflatten(-1, (groups, -1)), (inner // groups,), None, 1e-6).flatten(-2) * weight
        return y @ out.t()

    packed = torch.randn(3, 7, 2 * inner + 2 * groups * state + heads, generator=g)
    gm = vmeanba_fx.capture(Model(), packed)
    (site,) = vmeanba_fx.find_sites(gm)
    assert (site.groups, site.channels, site.state) == (groups, inner // groups, state)
    torch.testing.assert_close(gm(packed), plain(packed), rtol=1e-4, atol=1e-5)


def test_a_compiled_module_is_swapped_for_one_thread_and_put_back(monkeypatch):
    module = types.ModuleType("causal_conv1d_cuda")
    module.causal_conv1d_fwd = original = lambda *args: "original"
    monkeypatch.setitem(sys.modules, "causal_conv1d_cuda", module)
    seen = []
    with intercept(nn.Identity(), lambda call: None, lambda: "") as (_, found):
        assert module.causal_conv1d_fwd is not original and found.functions is not None
        thread = threading.Thread(target=lambda: seen.append(module.causal_conv1d_fwd(1, 2, 3)))
        thread.start()
        thread.join()
    assert seen == ["original"] and module.causal_conv1d_fwd is original


def test_companions_are_found_by_their_parameters():
    found = discover(Block(True))
    assert {AddNorm, GatedNorm} <= set(found.companion_classes)
    assert (globals(), "causal_conv1d_cuda") in found.missing_pybind
