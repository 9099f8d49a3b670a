"""`ss2d` on the GPU against the plain loops of `naive` in float64: sizes, layouts, dtypes, directions, use."""

import pytest
import torch

from vmeanba_fx import ops
from vmeanba_fx.ops import cuda_ss2d, naive
from vmeanba_fx.ops.directions import direction_table
from vmeanba_fx.ops.library import is_channels_last

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
# Arithmetic is float32 on the inputs as given; what is left is how softplus is fitted and how the output is rounded.
TOLERANCE = {FLOAT: 1e-5, HALF: 1e-3, BF16: 6e-3}
FOUR = [0, 1, 2, 3]


def records(values, padding=0):
    """(B, K, F, H, W) laid out as the records of positions, `padding` NaNs after each direction's."""
    batch, K, count, height, width = values.shape
    stored = values.new_full((batch, height, width, K, count + padding), float("nan"))
    return stored[..., :count].copy_(values.permute(0, 3, 4, 1, 2)).permute(0, 3, 4, 1, 2)


def make(batch, D, H, W, R, N=1, K=4, dtype=HALF, padding=0, seed=0):
    """Random arguments whose scan term is as large as the D*x term."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    return {
        "x": normal(batch, D, H, W).to(dtype),
        "feats": records(normal(batch, K, R + 2 * N, H, W).to(dtype), padding),
        "dt_weight": (normal(K, D, R) / R**0.5).to(dtype),
        "A": -(torch.rand(K * D, N, device="cuda", generator=generator) * 2 + 0.1),
        "D": normal(D),
        "delta_bias": normal(K * D) - 1,
    }


def check(arguments, directions=None, order=None, softplus=True, out_dtype=FLOAT, tolerance=None):
    directions = FOUR if directions is None else directions
    x = arguments["x"]
    exact = {name: None if t is None else t.double() for name, t in arguments.items()}
    expected = naive.ss2d(**exact, directions=directions, order=order, delta_softplus=softplus, out_dtype=torch.float64)
    poison = torch.full(x.shape, float("nan"), dtype=out_dtype, device="cuda")
    del poison  # the allocator hands this block to the output
    out = ops.ss2d(**arguments, directions=directions, order=order, delta_softplus=softplus, out_dtype=out_dtype)
    assert out.dtype == out_dtype and out.shape == x.shape
    assert (out.permute(0, 2, 3, 1) if is_channels_last(x) else out).is_contiguous()
    error = ((out.double() - expected).norm() / expected.norm()).item()
    limit = tolerance or max(TOLERANCE[out_dtype], 2e-5 if x.dtype != FLOAT else 0)
    assert error < limit, f"relative error {error:.2e}"
    return out


@pytest.mark.parametrize("dtype", [HALF, BF16, FLOAT])
@pytest.mark.parametrize(
    ("D", "side", "R"),
    [(96, 56, 6), (192, 28, 12), (384, 14, 24), (768, 7, 48), (128, 56, 8), (256, 28, 16), (512, 14, 32), (1024, 7, 64)],
)
def test_stages_of_vmamba(D, side, R, dtype):
    arguments = make(2, D, side, side, R, dtype=dtype, padding=-(R + 2) % 8)
    check(arguments)
    check(arguments, out_dtype=dtype)


@pytest.mark.parametrize("dtype", [HALF, FLOAT])
@pytest.mark.parametrize(("H", "W"), [(1, 1), (1, 9), (9, 1), (7, 5), (33, 47), (12, 16), (20, 30), (64, 64)])
@pytest.mark.parametrize(("D", "R", "padding"), [(1, 2, 0), (13, 6, 0), (21, 10, 3)])
def test_odd_sizes(H, W, D, R, padding, dtype):
    check(make(3, D, H, W, R, dtype=dtype, padding=padding))


@pytest.mark.parametrize("dtype", [HALF, FLOAT])
@pytest.mark.parametrize(
    ("D", "H", "W"), [(96, 14, 14), (24, 56, 8), (21, 9, 7), (3, 1, 5), (20, 5, 1), (16, 96, 80), (8, 12, 16)]
)
def test_channels_last(D, H, W, dtype):
    arguments = make(3, D, H, W, 6, dtype=dtype)
    arguments["x"] = arguments["x"].to(memory_format=torch.channels_last)
    check(arguments)
    check(arguments, out_dtype=dtype)


@pytest.mark.parametrize("directions", [[0], [3], [2, 1], [0, 1, 2, 3, 4, 5, 6, 7], [7, 7, 0], [0, 2, 1, 3]])
@pytest.mark.parametrize(("H", "W"), [(14, 28), (11, 13)])
def test_directions(directions, H, W):
    check(make(2, 16, H, W, 6, K=len(directions)), directions)


def test_more_directions_than_codes_fit():
    check(make(1, 8, 6, 7, 4, K=18), [k % 8 for k in range(18)])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_order_table(dtype):
    table = torch.stack([torch.randperm(15 * 18) for _ in range(3)]).to("cuda", dtype)
    check(make(2, 11, 15, 18, 6, K=3), directions=[], order=table)


def test_order_table_of_the_codes_gives_the_same():
    arguments = make(2, 16, 14, 14, 24, padding=6)
    by_code = check(arguments)
    by_table = check(arguments, directions=[], order=direction_table(FOUR, 14, 14).cuda())
    torch.testing.assert_close(by_code, by_table, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [HALF, BF16, FLOAT])
@pytest.mark.parametrize(("N", "side"), [(2, 9), (3, 14), (16, 28), (64, 7)])
def test_states(N, side, dtype):
    check(make(2, 24, side, side, 6, N=N, dtype=dtype, padding=2))


@pytest.mark.parametrize("dtype", [HALF, FLOAT])
def test_strided_inputs(dtype):
    arguments = make(2, 16, 14, 28, 6, dtype=dtype)
    x, feats = arguments["x"], arguments["feats"]
    layouts = {
        "channels last": x.to(memory_format=torch.channels_last),
        "a slice of channels": torch.cat([x, x], 1)[:, 16:],
        "off by one element": torch.cat([x.flatten(), x.new_zeros(1)])[1:].view(x.shape),
        "every other channel": x.repeat_interleave(2, 1)[:, ::2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "cropped": torch.nn.functional.pad(x, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
        "expanded": x[:1].expand(2, -1, -1, -1),
        "slice of channels last": torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, 4:20],
    }
    for layout in layouts.values():
        check({**arguments, "x": layout})
    wide = torch.nn.functional.pad(feats, (0, 1, 2, 0))
    for layout in (
        feats.contiguous(),
        records(feats, 1),
        records(feats, 8),
        wide[..., 2:, :-1],
        feats[:1].expand(2, -1, -1, -1, -1),
    ):
        check({**arguments, "feats": layout})


def test_odd_rank():
    check(make(2, 16, 14, 14, 7))


def test_mixed_dtypes_of_parameters():
    arguments = make(2, 16, 14, 14, 12, padding=2)
    check({**arguments, "dt_weight": arguments["dt_weight"].float() * 1.001})
    check({**arguments, **{name: arguments[name].to(HALF) for name in ("A", "D", "delta_bias")}})
    check({**arguments, "x": arguments["x"].float()})
    check({**arguments, "feats": arguments["feats"].float()})
    check({**arguments, "feats": arguments["feats"].to(BF16)})
    # Weights that start at an odd element: the kernel reads pairs of them.
    weight = arguments["dt_weight"]
    check({**arguments, "dt_weight": torch.cat([weight.flatten()[:1], weight.flatten()])[1:].view(weight.shape)})
    check(make(2, 768, 7, 7, 48, padding=6) | {"dt_weight": make(2, 768, 7, 7, 48, dtype=FLOAT)["dt_weight"]})


def test_absent_parameters():
    arguments = make(2, 16, 14, 14, 6, dtype=FLOAT)
    check({**arguments, "D": None})
    check({**arguments, "delta_bias": None})
    check({**arguments, "D": None, "delta_bias": None, "dt_weight": arguments["dt_weight"] / 20}, softplus=False)


def test_float64_and_float64_output():
    arguments = make(1, 8, 7, 5, 4, dtype=torch.float64)
    exact = {name: t.double() for name, t in arguments.items()}
    out = ops.ss2d(**exact, directions=FOUR, order=None, delta_softplus=True)
    expected = naive.ss2d(**exact, directions=FOUR, order=None, delta_softplus=True)
    torch.testing.assert_close(out, expected)
    single = {name: t.float() for name, t in arguments.items()}
    assert (
        ops.ss2d(**single, directions=FOUR, order=None, delta_softplus=True, out_dtype=torch.float64).dtype
        == torch.float64
    )


def test_small_steps_keep_their_relative_accuracy():
    arguments = make(2, 16, 14, 14, 6, dtype=FLOAT)
    for shift in (-8.0, -14.0, 25.0):
        check({**arguments, "D": None, "delta_bias": arguments["delta_bias"] + shift})


def test_maps_too_large_for_shared_memory():
    check(make(1, 9, 96, 80, 6))
    check(make(1, 9, 81, 83, 6, dtype=FLOAT))


def test_a_nan_stays_in_its_channel():
    arguments = make(2, 16, 14, 14, 24, padding=6)
    arguments["x"][1, 5, 3, 3] = float("nan")
    out = ops.ss2d(**arguments, directions=FOUR, order=None, delta_softplus=True)
    spoilt = out.isnan().flatten(2).any(2)
    assert spoilt.nonzero().tolist() == [[1, 5]]


def test_empty_batch():
    arguments = make(1, 8, 7, 7, 6)
    arguments |= {"x": arguments["x"][:0], "feats": arguments["feats"][:0]}
    assert ops.ss2d(**arguments, directions=FOUR, order=None, delta_softplus=True).shape == (0, 8, 7, 7)


@pytest.mark.parametrize(
    ("batch", "D", "side", "R"), [(24, 96, 56, 6), (64, 192, 28, 12), (64, 384, 14, 24), (64, 768, 7, 48)]
)
def test_repeated_runs_are_equal_bit_for_bit(batch, D, side, R):
    arguments = make(batch, D, side, side, R, padding=-(R + 2) % 8)
    first = ops.ss2d(**arguments, directions=FOUR, order=None, delta_softplus=True)
    for _ in range(10):
        again = ops.ss2d(**arguments, directions=FOUR, order=None, delta_softplus=True)
        assert torch.equal(first, again)
    alone = {**arguments, "x": arguments["x"][-1:], "feats": arguments["feats"][-1:]}
    torch.testing.assert_close(check(alone, out_dtype=HALF), first[-1:], rtol=2e-3, atol=2e-3)


def test_sizes_beyond_those_compiled_in(monkeypatch):
    monkeypatch.setattr(cuda_ss2d, "_MAX_BAKED", 0)
    monkeypatch.setattr(cuda_ss2d, "_baked", set())
    monkeypatch.setattr(cuda_ss2d, "_launches", cuda_ss2d.LaunchCache())
    for side in (14, 28):
        check(make(2, 16, side, side, 6))


def test_stream_graph_and_compile():
    arguments = make(2, 96, 28, 28, 12, padding=2)

    def run(x):
        return ops.ss2d(**{**arguments, "x": x}, directions=FOUR, order=None, delta_softplus=True) * 2

    x = arguments["x"]
    expected = run(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = run(x)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(on_side, expected)

    static, graph = torch.zeros_like(x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static)
    static.copy_(x)
    graph.replay()
    assert torch.equal(captured, expected)

    compiled = torch.compile(run, fullgraph=True)
    assert torch.equal(compiled(x), expected)


def test_opcheck():
    arguments = make(2, 16, 14, 14, 6)
    flat = (*arguments.values(), FOUR, None, True)
    torch.library.opcheck(torch.ops.vmeanba_fx.ss2d.default, flat, test_utils=("test_schema", "test_faketensor"))
    last = (flat[0].to(memory_format=torch.channels_last), *flat[1:])
    torch.library.opcheck(torch.ops.vmeanba_fx.ss2d.default, last, test_utils=("test_schema", "test_faketensor"))
