"""Scans under the names, layouts and results that public code gives them: taken where they compute a scan, else refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vmeanba_fx
from tests import zoo
from tests.helpers import relative_error
from tests.paper_block import paper_block
from vmeanba_fx.capturing.registry import find_spec, parameter_names


class LengthFirst(nn.Module):
    """(B, L, D) and B, C (B, L, N), the step after its softplus: mambapy's and mamba-minimal's method."""

    def selective_scan(self, x, delta, A, B, C, D):
        return zoo.loop_scan(x.mT, delta.mT, A, B.mT, C.mT, D)[0].mT


def length_first(u, delta, A, B, C, D, bias):
    step = F.softplus(delta + bias[:, None])
    return LengthFirst().selective_scan(u.mT, step.mT, A, B[:, 0].mT, C[:, 0].mT, D).mT


def hidden_states_scan(
    hidden_states, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False,
    use_mambapy=False, use_associative_scan=False, **kwargs,
):  # fmt: skip
    y, state = zoo.loop_scan(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus)
    return (y, state) if return_last_state else y


def transformers_like(u, delta, A, B, C, D, bias):
    y, _ = hidden_states_scan(u, delta, A, B[:, 0], C[:, 0], D, torch.ones_like(u), bias, True, True, use_mambapy=True)
    return y


def odd_order(A, B, C, xs, dts, dt_softplus=True, dt_bias=None, chunk=64):
    return zoo.loop_scan(xs, dts, A, B, C, None, None, dt_bias, dt_softplus)[0]


def any_order(u, delta, A, B, C, D, bias):
    return odd_order(A, B, C, xs=u, dts=delta, dt_bias=bias) + D[:, None] * u


def state_scan(u, delta, A, B, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """h (B, D, 1, L) of one state per channel."""
    return zoo.loop_scan(u, delta, A, B, torch.ones_like(B), None, None, delta_bias, delta_softplus)[0].unsqueeze(2)


def states_outside(u, delta, A, B, C, D, bias):
    h = state_scan(u, delta, A, B, None, None, bias, True)
    read = C[:, :, 0].repeat_interleave(u.shape[1] // C.shape[1], dim=1)
    return h.squeeze(2) * read + D[:, None] * u


def chunk_scan(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, dt_softplus=False,
    dt_limit=(0.0, float("inf")), return_final_states=False, backend=None,
):  # fmt: skip
    """Mamba-2: x, z (B, L, H, P), dt (B, L, H), A (H,), B, C (B, L, G, N); written with the loop, not in chunks."""
    heads, width = x.shape[2:]
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)

    def wide(t):
        return t.repeat_interleave(width, dim=0)

    y, state = zoo.loop_scan(
        x.permute(0, 2, 3, 1).flatten(1, 2),
        dt.mT.repeat_interleave(width, dim=1),
        wide(A)[:, None].expand(-1, B.shape[3]),
        B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1),
        None if D is None else (D.flatten() if D.dim() == 2 else wide(D)),
    )
    y = y.unflatten(1, (heads, width)).permute(0, 3, 1, 2)
    y = y if z is None else y * F.silu(z)
    return (y, state.unflatten(1, (heads, width))) if return_final_states else y


def transformers_chunk_scan(
    hidden_states, dt, A, B, C, chunk_size, D=None, dt_bias=None, initial_states=None, dt_softplus=False,
    dt_limit=(0.0, float("inf")), return_final_states=False, **kwargs,
):  # fmt: skip
    """Hugging Face's Mamba-2: no z, y in float32."""
    options = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit, **kwargs}
    return chunk_scan(hidden_states.float(), dt, A, B, C, chunk_size, return_final_states=return_final_states, **options)


def mamba2(scan=chunk_scan, **options):
    """Heads of one channel each make a Mamba-2 call of any scan whose A has one value per channel."""

    def call(u, delta, A, B, C, D, bias):
        x = u.mT.unflatten(-1, (-1, 1))  # (B, L, H, 1)
        out = scan(
            x, delta.mT, A[:, 0], B.permute(0, 3, 1, 2), C.permute(0, 3, 1, 2), 4, D, dt_bias=bias, dt_softplus=True, **options
        )
        y = out[0] if isinstance(out, tuple) else out
        return y.flatten(2).mT

    return call


def discretised_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, deltaA=None, delta_softplus=False, return_last_state=False,
    discretization="mamba",
):  # fmt: skip
    """As lrnnx has it; ``deltaA`` is a step of its own for the decay, here as large."""
    return zoo.loop_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)[0]


def discretised(u, delta, A, B, C, D, bias):
    return discretised_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)


# name: (call, options of the model)
SIGNATURES = {
    "length first": (length_first, {"directions": 1}),
    "transformers": (transformers_like, {"directions": 1}),
    "any order of parameters": (any_order, {}),
    "a choice of discretisation": (discretised, {}),
    "states without C": (states_outside, {"state": 1}),
    "Mamba-2": (mamba2(), {"state": 1}),
    "Mamba-2, final states dropped": (mamba2(return_final_states=True), {"state": 1}),
    "Mamba-2 of Hugging Face": (mamba2(transformers_chunk_scan, seq_idx=None), {"state": 1}),
    "Mamba-2, limited step": (mamba2(dt_limit=(0.05, 0.6)), {"state": 1}),
}


def reference(name):
    """The paper's block in place of the call, with what the call adds around it."""
    low, high = (0.05, 0.6) if "limited" in name else (0.0, float("inf"))

    def call(u, delta, A, B, C, D, bias):
        step = F.softplus(delta + bias[:, None]).clamp(low, high)
        if name == "states without C":  # the mean is over the states, each channel reads its own
            h = paper_block(u, step, A, B, torch.ones_like(B))
            return h * C[:, :, 0].repeat_interleave(u.shape[1] // C.shape[1], dim=1) + D[:, None] * u
        gate = torch.ones_like(u) if name == "transformers" else None
        return paper_block(u, step, A, B, C, D, gate)

    return call


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    call, options = SIGNATURES[name]
    model, x = zoo.live(call=call, **options), zoo.images(3)
    gm = vmeanba_fx.capture(model, x)
    sites = vmeanba_fx.find_sites(gm)
    assert [s.name for s in sites] == ["blocks.0.op", "blocks.1.op"] and not sites.refused
    replaced = zoo.live(call=reference(name), **options)
    exact, lossy = (vmeanba_fx.transform(gm, [x], k=k) for k in (0, 2))
    with torch.no_grad():
        for batch in (1, 2, 5):
            images = zoo.images(batch)
            assert relative_error(exact(images), model(images)) <= 1e-5
            assert relative_error(lossy(images), replaced(images)) <= 1e-5
        assert relative_error(lossy(x), model(x)) > 0.01


def test_a_layer_norm_absorbs_what_is_read_outside_of_the_call():
    """C and D outside: between the scan and the sum in which it can be left out lies a product."""

    def call(u, delta, A, B, C, D, bias):
        return state_scan(u, delta, A, B, None, None, bias, True).squeeze(2) * C[:, 0] + D[:, None] * u

    model, x = zoo.tiny(call=call, state=1, directions=1), zoo.images(3)
    gm = vmeanba_fx.capture(model, x)
    sites = vmeanba_fx.find_sites(gm)
    assert [s.kind for s in sites] == ["annihilated"] * 2
    replaced = vmeanba_fx.transform(gm, [x], k=2)
    assert not any("scan" in str(node.target) for node in replaced.graph.nodes)
    with torch.no_grad():
        assert relative_error(replaced(x), zoo.without_scan(model, x)) <= 1e-5


def test_heads_wider_than_one_channel():
    """Two heads of three channels, two groups: A, dt and D are shared inside a head."""
    g = torch.Generator().manual_seed(0)

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(6, 6 + 2 + 2 * 2 * 4)
            self.A, self.D = nn.Parameter(-torch.rand(2, generator=g)), nn.Parameter(torch.randn(2, 3, generator=g))

        def forward(self, x):  # (B, L, 6)
            u, dt, B, C = self.mix(x).split([6, 2, 8, 8], dim=-1)
            heads = u.unflatten(-1, (2, 3))
            y = chunk_scan(
                heads, dt, self.A, B.unflatten(-1, (2, 4)), C.unflatten(-1, (2, 4)), 4, self.D, z=heads, dt_softplus=True
            )
            return y.flatten(2)

    model, x = Heads().eval(), torch.randn(3, 9, 6, generator=g)
    gm = vmeanba_fx.capture(model, x)
    (site,) = vmeanba_fx.find_sites(gm)
    assert (site.groups, site.channels, site.state) == (2, 3, 4) and site.skip and site.gate
    with torch.no_grad():
        assert relative_error(gm(x), model(x)) <= 1e-5


def given_state(x, dt, A, B, C, initial_state):
    y, _ = zoo.loop_scan(x, dt, A, B, C)
    return y + initial_state


def complex_scan(u, delta, A, B, C):
    return zoo.loop_scan(u, delta, A.real, B, C)[0]


def scan_of_one(u, delta, A, B, C):
    """Starts from no tensor of its own: torch cannot export one that is made under vmap."""
    h, ys = 0.0, []
    for t in range(u.shape[-1]):
        step = delta[..., t, None]
        h = torch.exp(step * A) * h + step * B[..., t].repeat_interleave(6, dim=-2) * u[..., t, None]
        ys.append((h * C[..., t].repeat_interleave(6, dim=-2)).sum(-1))
    return torch.stack(ys, dim=-1)


REFUSED = {
    "under vmap": (
        lambda u, d, A, B, C: torch.vmap(scan_of_one, in_dims=(0, 0, None, 0, 0))(u, d, A, B, C), "under torch.vmap"
    ),
    "another discretisation": (lambda *call: discretised_scan(*call, discretization="zoh"), "discretises by 'zoh'"),
    "a decay of its own": (lambda u, d, *call: discretised_scan(u, d, *call, deltaA=d), "given deltaA"),
    "initial state": (lambda u, d, A, B, C: given_state(u, d, A, B, C, torch.ones_like(u)), "a tensor 'initial_state'"),
    "complex A": (lambda u, d, A, B, C: complex_scan(u, d, A + 0j, B, C), "A is complex"),
    "states kept": (lambda u, d, A, B, C: state_scan(u, d, A, B[:, 0]).squeeze(2), "3 per channel; one is supported"),
    "final states read": (
        lambda u, d, A, B, C: chunk_scan(
            u.mT[..., None], d.mT, A[:, 0], B.permute(0, 3, 1, 2), C.permute(0, 3, 1, 2), 4, initial_states=u[:, :, :1]
        ).flatten(2).mT,
        "initial_states",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_sentence_and_the_rest_works(name):
    scan, why = REFUSED[name]
    model, x = zoo.tiny(), zoo.images(3)
    model.blocks[1].op.call = lambda u, delta, A, B, C, D, bias: scan(u, F.softplus(delta + bias[:, None]), A, B, C)
    gm = vmeanba_fx.capture(model, x)
    sites = vmeanba_fx.find_sites(gm)
    assert [s.name for s in sites] == ["blocks.0.op"]
    assert [where for where, _ in sites.refused] == ["blocks.1.op"] and why in sites.refused[0][1]
    with torch.no_grad():
        assert relative_error(vmeanba_fx.transform(gm, [x], k=0)(x), model(x)) <= 1e-5


def test_parts_by_name_need_a_proof():
    """The parts of a scan in a function that computes something else: left as it is, and named."""

    def half(x, dt, A, B, C):
        return zoo.loop_scan(x, dt, A, B, C)[0] / 2

    model, x = zoo.tiny(1), zoo.images(3)
    model.blocks[0].op.call = lambda u, delta, A, B, C, D, bias: half(u, F.softplus(delta + bias[:, None]), A, B, C)
    gm = vmeanba_fx.capture(model, x)
    with pytest.raises(vmeanba_fx.NoSitesError, match=r"half\(x, dt, A, B, C\), but on its own inputs it differs"):
        vmeanba_fx.find_sites(gm)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-6)


def scan_with_sizes(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, HH=None, WW=None):
    """2DVMamba's wrapper, which has the parameters of a 2-D recurrence also where it runs along one sequence."""
    return zoo.vmamba_scan_fn(u, delta, A, B, C, D, delta_bias, delta_softplus)


def test_a_scan_inside_of_what_is_refused_is_no_refusal():
    def call(u, delta, A, B, C, D, bias):
        return scan_with_sizes(u, delta, A, B, C, D, bias)

    gm = vmeanba_fx.capture(zoo.tiny(1, call=call), zoo.images(2))
    sites = vmeanba_fx.find_sites(gm)
    assert [s.name for s in sites] == ["blocks.0.op"] and not sites.refused


def test_the_chunked_signature_is_its_own_family():
    assert find_spec(transformers_chunk_scan, parameter_names(transformers_chunk_scan)).name == "chunked scan (Mamba-2)"
    assert find_spec(chunk_scan, parameter_names(chunk_scan)).name == "chunked scan (Mamba-2)"
