"""The lossy rewrite against the paper's block written once more as plain loops (``paper_block``)."""

import pytest
import torch
from torch import nn
from vmeanba_fx.passes import drop_annihilated, mean_scan
from vmeanba_fx.passes.mean_scan import BROADCAST, mean_scan_tensors

import vmeanba_fx
from tests import zoo
from tests.helpers import relative_error
from tests.paper_block import paper_block
from vmeanba_fx.capturing.capture import capture
from vmeanba_fx.errors import SiteError
from vmeanba_fx.graph import MADE_BY, copy_graph, scan_nodes

OURS = torch.ops.vmeanba_fx
MEANS = ("direction", "all", "input")
BOUND = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def names_of(gm):
    """Names of our ops in a graph and its sub-graphs, once per node."""
    graphs = [m.graph for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]
    ops = [str(n.target) for g in graphs for n in g.nodes if str(n.target).startswith("vmeanba_fx.")]
    return [name.split(".")[1] for name in ops]


def patched(model, mean, x, which=None):
    """The eager model with the paper's block in place of the scans of blocks ``which`` (all), D skip per channel."""

    def call(u, delta, A, B, C, D, bias):
        return paper_block(u, delta, A, B, C, D, None, bias, True, mean=mean)

    for i, op in enumerate(zoo.scanners(model)):
        op.call = call if which is None or i in which else None
    try:
        with torch.no_grad():
            return model(x)
    finally:
        for op in zoo.scanners(model):
            op.call = None


@pytest.fixture(scope="module")
def captures():
    """(model, capture) by directions K, states N, dtype and whether the sites are live; made once each."""
    made = {}

    def get(directions, state, dtype, live=True):
        key = (directions, state, dtype, live)
        if key not in made:
            build = zoo.live if live else zoo.tiny
            model = build(2, directions=directions, state=state, dim=4).to(dtype)
            made[key] = model, capture(model, zoo.images(3, dtype=dtype))
        return made[key]

    return get


# -- the block on tensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("state", [1, 3, 16])
@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_block_equals_the_papers(dtype, directions, state, mean):
    a = zoo.scan_inputs(2, directions, 5, state, 7, dtype=dtype)
    for softplus, bias in ((True, a["delta_bias"]), (False, None)):
        delta = a["delta"] if softplus else a["delta"].abs()
        given = (a["u"], delta, a["A"], a["B"], a["C"])
        found = mean_scan_tensors(mean, *given, bias, softplus, None)
        expected = paper_block(*given, None, None, bias, softplus, mean=mean)
        assert found.dtype == dtype and relative_error(found, expected) <= BOUND[dtype]


def test_the_block_is_not_the_scan():
    """Otherwise the comparisons above would also hold for a rewrite that does nothing."""
    a = zoo.scan_inputs(2, 4, 5, 3, 7)
    given = (a["u"], a["delta"], a["A"], a["B"], a["C"], None, None, a["delta_bias"], True)
    exact, _ = zoo.loop_scan(*given)
    blocks = [paper_block(*given, mean=mean) for mean in MEANS]
    for i, block in enumerate(blocks):
        assert relative_error(block, exact) > 0.1
        assert all(relative_error(block, other) > 0.01 for other in blocks[:i])


@pytest.mark.parametrize("mean", MEANS)
def test_equal_channels_make_the_block_exact(mean):
    """One channel scanned stands for all where all are the same; over directions as well where those are the same."""
    a = zoo.scan_inputs(2, 1 if mean == "all" else 2, 1, 3, 7)
    rows = torch.arange(a["u"].shape[1]).repeat_interleave(4)
    u, delta, A, bias = a["u"][:, rows], a["delta"][:, rows], a["A"][rows], a["delta_bias"][rows]
    found = mean_scan_tensors(mean, u, delta, A, a["B"], a["C"], bias, True, None)
    expected, _ = zoo.loop_scan(u, delta, A, a["B"], a["C"], None, None, bias, True)
    assert relative_error(found, expected) <= 1e-12


def test_half_precision_computes_in_float32():
    a = zoo.scan_inputs(2, 2, 5, 3, 7, dtype=torch.bfloat16)
    given = (a["u"], a["delta"], a["A"].float(), a["B"], a["C"], a["delta_bias"].float(), True)
    wide = mean_scan_tensors("direction", *given, torch.float32)
    expected = paper_block(*(t.float() for t in given[:5]), None, None, given[5], True)
    assert wide.dtype == torch.float32 and relative_error(wide, expected) <= 1e-5
    narrow = mean_scan_tensors("direction", *given, None)
    assert torch.equal(narrow, wide.bfloat16())


# -- the rewritten graph ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("directions, state, dtype", [
    (1, 3, torch.float64), (2, 16, torch.float64), (4, 1, torch.float64), (4, 3, torch.float32),
    (2, 1, torch.bfloat16),
])  # fmt: skip
def test_replaced_sites_compute_the_papers_block(captures, directions, state, dtype, mean):
    model, captured = captures(directions, state, dtype)
    gm = mean_scan(copy_graph(captured), ["blocks.0.op", "blocks.1.op"], mean=mean)
    for batch in (1, 2, 5):
        x = zoo.images(batch, seed=batch, dtype=dtype)
        expected = patched(model, mean, x)
        assert relative_error(gm(x), expected) <= BOUND[dtype]
        assert relative_error(model(x), expected) > 0.02


def test_one_site_of_two(captures):
    model, captured = captures(4, 3, torch.float32)
    x = zoo.images(3)
    outputs = []
    for i in range(2):
        gm = mean_scan(copy_graph(captured), [f"blocks.{i}.op"])
        outputs.append(gm(x))
        assert relative_error(outputs[i], patched(model, "direction", x, {i})) <= 1e-5
        assert [node.meta["vmeanba_fx.site"] for _, node in scan_nodes(gm)] == [f"blocks.{1 - i}.op"]
    assert relative_error(outputs[0], outputs[1]) > 0.01


@pytest.mark.parametrize("mean", MEANS)
def test_only_one_channel_is_scanned(captures, mean):
    """The nodes of the literal block: K one-channel scans, or one for ``all``; a broadcast; D still one per channel."""
    _, captured = captures(4, 3, torch.float32)
    gm = mean_scan(copy_graph(captured), ["blocks.0.op"], mean=mean)
    assert names_of(gm) == ["shared_scan" if mean == "input" else "linear_scan", "selective_scan"]
    (scan,) = [n for n in gm.graph.nodes if n.target in (OURS.linear_scan.default, OURS.shared_scan.default)]
    assert tuple(scan.meta["val"].shape)[1:] == (1 if mean == "all" else 4, 1, 15)
    (broadcast,) = [n for n in gm.graph.nodes if BROADCAST in n.meta]
    assert broadcast.meta[BROADCAST] == 4 and tuple(broadcast.meta["val"].shape)[1:] == (16, 15)
    (user,) = broadcast.users  # y + D*u
    assert user.target is torch.ops.aten.add.Tensor and MADE_BY not in user.meta
    new = [n for n in gm.graph.nodes if MADE_BY in n.meta]
    assert {n.meta[MADE_BY] for n in new} == {"mean_scan"} and scan in new
    assert {n.meta["vmeanba_fx.site"] for n in new} == {"blocks.0.op"}


def test_the_skip_stays_per_channel():
    """With C = 0 the scan is silent and y = D*u, each channel by its own D."""

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.D = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 0.5, 7.0, -0.25]))

        def forward(self, u, delta, B, C):
            return zoo.vmamba_scan_fn(u, delta, -torch.ones(6, 3), B, C, self.D, None, True)

    a = zoo.scan_inputs(2, 2, 3, 3, 7, dtype=torch.float32)
    model, inputs = Bare(), (a["u"], a["delta"], a["B"], 0 * a["C"])
    gm = mean_scan(capture(model, inputs), [only_site(model, inputs)])
    torch.testing.assert_close(gm(*inputs), model.D[:, None] * a["u"], rtol=0, atol=0)


def only_site(model, inputs):
    (site,) = vmeanba_fx.find_sites(capture(model, inputs))
    return site.name


def test_the_gate_stays_per_channel():
    def call(u, delta, A, B, C, D, bias):
        return zoo.selective_scan_fn(u, delta, A, B, C, D, u.flip(1), bias, True)

    model = zoo.live(1, call=call).double()
    x = zoo.images(3, dtype=torch.float64)
    gm = mean_scan(capture(model, x), ["blocks.0.op"])
    for op in zoo.scanners(model):
        op.call = lambda u, delta, A, B, C, D, bias: paper_block(u, delta, A, B, C, D, u.flip(1), bias, True)
    assert relative_error(gm(x), model(x)) <= 1e-10


def test_a_step_without_softplus_or_bias():
    """What the call says about its step is taken over, not assumed."""

    def call(u, delta, A, B, C, D, bias):
        return zoo.selective_scan_fn(u, delta.abs(), A, B, C, D)

    model = zoo.live(1, call=call).double()
    x = zoo.images(3, dtype=torch.float64)
    gm = mean_scan(capture(model, x), ["blocks.0.op"])
    for op in zoo.scanners(model):
        op.call = lambda u, delta, A, B, C, D, bias: paper_block(u, delta.abs(), A, B, C, D, None, None, False)
    assert relative_error(gm(x), model(x)) <= 1e-10


def test_output_dtype_of_the_call():
    """VMamba's ``oflex``: half precision in, float32 out, also of the replaced scan."""

    def call(u, delta, A, B, C, D, bias):
        y = zoo.vmamba_scan_fn(u.bfloat16(), delta.bfloat16(), A, B.bfloat16(), C.bfloat16(), D, bias)
        assert y.dtype == torch.float32
        return y

    model, x = zoo.live(1, call=call), zoo.images(3)
    gm = mean_scan(capture(model, x), ["blocks.0.op"])
    for op in zoo.scanners(model):

        def reference(u, delta, A, B, C, D, bias):
            u, delta, B, C = (t.bfloat16().float() for t in (u, delta, B, C))
            return paper_block(u, delta, A, B, C, D, None, bias, True)

        op.call = reference
    assert relative_error(gm(x), model(x)) <= 1e-5


def test_scan_inside_an_autocast_region():
    class Autocast(zoo.Block):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x + self.op(self.norm(x)).float()

    model = zoo.live(1)
    model.blocks = nn.ModuleList([Autocast(6, model.blocks[0].op)]).eval()
    x = zoo.images(3)
    gm = mean_scan(capture(model, x), ["blocks.0.op"])
    assert names_of(gm) == ["linear_scan"]
    before = model(x)
    after = patched(model, "direction", x)
    assert relative_error(after, before) > 0.05
    assert relative_error(gm(x), after) <= 0.02


# -- what a LayerNorm annihilates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", MEANS)
def test_annihilated_sites_lose_their_scan(captures, mean):
    """Exact to float64 rounding, and nothing of the scan is left: no op, no projection, no parameter."""
    model, captured = captures(4, 3, torch.float64, live=False)
    literal = mean_scan(copy_graph(captured), ["blocks.0.op", "blocks.1.op"], mean=mean)
    clean = drop_annihilated(copy_graph(literal))
    x = zoo.images(5, dtype=torch.float64)
    assert relative_error(clean(x), literal(x)) <= 1e-12
    assert relative_error(clean(x), zoo.without_scan(model, x)) <= 1e-12
    assert relative_error(literal(x), patched(model, mean, x)) <= 1e-10
    assert len(names_of(literal)) == 2 and names_of(clean) == []
    left = {name.rsplit(".", 1)[-1] for name, _ in clean.named_parameters()}
    assert "D" in left and not left & {"x_proj", "dt_proj", "dt_bias", "A_log"}
    assert {"x_proj", "dt_proj", "dt_bias", "A_log"} <= {n.rsplit(".", 1)[-1] for n, _ in literal.named_parameters()}


def test_live_sites_keep_their_scan(captures):
    _, captured = captures(4, 3, torch.float32)
    literal = mean_scan(copy_graph(captured), ["blocks.0.op"])
    x = zoo.images(3)
    expected = literal(x)
    clean = drop_annihilated(literal)
    assert names_of(clean) == ["linear_scan", "selective_scan"] and torch.equal(clean(x), expected)


def test_a_kept_scan_in_front_of_a_norm_is_not_dropped(captures):
    _, captured = captures(4, 3, torch.float64, live=False)
    gm = drop_annihilated(copy_graph(captured))
    assert names_of(gm) == ["selective_scan", "selective_scan"]


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input(captures):
    _, captured = captures(4, 3, torch.float32)
    with pytest.raises(SiteError, match=r"no scan named blocks.7.op; the graph has: blocks.0.op, blocks.1.op"):
        mean_scan(copy_graph(captured), ["blocks.7.op"])
    with pytest.raises(ValueError, match="mean='median': choose one of 'direction', 'all', 'input'"):
        mean_scan(copy_graph(captured), [], mean="median")
