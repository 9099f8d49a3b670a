"""``capture``: one graph that computes what the model computes, for any batch, with the caller's model left alone."""

import copy

import pytest
import torch
from torch import fx, nn

from tests import zoo
from tests.capturing.models import InPlaceBlock, StaticBatch, StaticSize
from tests.helpers import agrees, relative_error
from vmeanba_fx import transform
from vmeanba_fx.capturing.capture import capture, capture_info
from vmeanba_fx.errors import CaptureError, GuardError
from vmeanba_fx.graph import mutates, scan_nodes
from vmeanba_fx.sites import find_sites


@pytest.fixture(scope="module")
def captured():
    """(model, its capture)."""
    model = zoo.tiny()
    return model, capture(model, zoo.images(3))


def test_the_scans_of_the_zoo_matter():
    """Otherwise every equality in these tests would hold whatever the scans compute."""
    for model in (zoo.tiny(), zoo.live()):
        with torch.no_grad():
            expected = model(zoo.images())
        assert relative_error(zoo.without_scan(model, zoo.images()), expected) > 0.1


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch(captured, batch):
    model, gm = captured
    assert capture_info(gm).batch_dynamic
    assert agrees(gm, model, zoo.images(batch))


def test_batch_of_one_is_enough_to_capture():
    model = zoo.tiny(1)
    gm = capture(model, zoo.images(1))
    assert agrees(gm, model, zoo.images(4))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_dtypes(dtype, bound):
    model = zoo.tiny().to(dtype)
    gm = capture(model, zoo.images(3, dtype=dtype))
    sites = find_sites(gm)
    assert {s.dtype for s in sites} == {str(dtype).removeprefix("torch.")}
    assert agrees(gm, model, zoo.images(5, dtype=dtype), bound=bound)


def test_the_graph_is_flat_named_and_free_of_its_makers_traces(captured):
    _, gm = captured
    assert [node.meta["vmeanba_fx.site"] for _, node in scan_nodes(gm)] == ["blocks.0.op", "blocks.1.op"]
    assert not gm.training
    for node in gm.graph.nodes:
        assert not {"stack_trace", "from_node", "torch_fn"} & set(node.meta)
        if node.op == "call_function":
            assert "promote_types" not in str(node.target) and "_assert_tensor_metadata" not in str(node.target)


def test_dynamic_size():
    model = zoo.tiny(1)
    gm = capture(model, zoo.images(3), dynamic_size=True)
    assert {dim for _, dim in capture_info(gm).dynamic} == {0, 2, 3}
    for batch, height, width in [(1, 12, 20), (2, 8, 8), (5, 16, 24), (1, 13, 22)]:
        assert agrees(gm, model, torch.randn(batch, 3, height, width))


def as_class(cls, model):
    model.__class__ = cls
    return model


def test_model_that_specialises_its_batch():
    model = as_class(StaticBatch, zoo.tiny(1))
    gm = capture(model, zoo.images(3))
    info = capture_info(gm)
    assert not info.batch_dynamic
    assert info.notes == ("the model specialises its batch size: the graph runs for batch 3 only",)
    assert agrees(gm, model, zoo.images(3))
    with pytest.raises(GuardError, match=r"x.size\(\)\[0\] == 3"):
        gm(zoo.images(2))


def test_model_that_specialises_its_size():
    model = as_class(StaticSize, zoo.tiny(1))
    gm = capture(model, zoo.images(3), dynamic_size=True)
    info = capture_info(gm)
    assert info.dynamic == (("x", 0),)
    assert info.notes == ("the model specialises its height and width: the graph runs for the captured size only",)
    assert agrees(gm, model, zoo.images(2))
    with pytest.raises(GuardError, match=r"x.size\(\)\[2\] == 12"):
        gm(torch.randn(2, 3, 16, 20))


class WithOptions(nn.Module):
    """Keyword inputs of several kinds, outputs in a dictionary."""

    def __init__(self):
        super().__init__()
        self.net = zoo.tiny(1)

    def forward(self, pixel_values, *, scale=None, negate=False):
        logits = self.net(pixel_values)
        if scale is not None:
            logits = logits * scale[:, None]
        return {"logits": -logits if negate else logits, "more": (logits.sum(), [pixel_values.mean()])}


def test_keyword_inputs_and_structured_outputs():
    model = WithOptions()
    inputs = {"pixel_values": zoo.images(3), "scale": torch.rand(3), "negate": True}
    gm = capture(model, (), inputs)
    five = {"negate": True, "scale": torch.rand(5), "pixel_values": zoo.images(5)}
    with torch.no_grad():
        found, expected = gm(**five), model.eval()(**five)
    assert list(found) == ["logits", "more"] and isinstance(found["more"], tuple)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class TakesAnything(WithOptions):
    def forward(self, images, **further):
        return super().forward(images, **{k: v for k, v in sorted(further.items()) if k != "text"})


def test_inputs_in_kwargs_are_dynamic_too():
    model = TakesAnything().eval()
    gm = capture(model, (zoo.images(3),), {"scale": torch.rand(3), "negate": True, "text": "a"})
    for batch in (1, 5):
        given = {"text": "a", "negate": True, "scale": torch.rand(batch)}
        with torch.no_grad():
            found, expected = gm(zoo.images(batch), **given), model(zoo.images(batch), **given)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_positional_and_nested_inputs():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = zoo.tiny(1)

        def forward(self, batch, offset):
            return self.net(batch["views"][0] + batch["views"][1]) + offset

    model = Nested().eval()

    def inputs(n):
        return ({"views": [zoo.images(n), zoo.images(n, seed=9)]}, torch.ones(n, 1))

    gm = capture(model, inputs(3))
    assert agrees(gm, model, *inputs(5))


# -- the caller's model stays as it is -------------------------------------------------------------------------------


class Lively(nn.Module):
    """Dropout, batch norm, a lambda that refers to the module itself, and a counter."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.net = zoo.tiny(1)
        self.calls = 0
        self.through = lambda x: self.net(self.drop(self.norm(x)))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return self.through(x)


def test_the_callers_model_is_not_touched():
    torch.manual_seed(3)
    model = Lively().train()
    model.net.eval()
    model.norm.running_mean.fill_(0.5)
    state, modes = copy.deepcopy(model.state_dict()), {n: m.training for n, m in model.named_modules()}
    attributes, rng = set(vars(model)), torch.get_rng_state()
    gm = capture(model, zoo.images(3))
    assert torch.equal(torch.get_rng_state(), rng)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert set(vars(model)) == attributes and model.calls == 0
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # the graph has weights of its own
    fresh = Lively().eval()
    fresh.load_state_dict(state)
    assert agrees(gm, fresh, zoo.images(3))


class KeepsFeatures(zoo.TinyNet):
    """Holds on to a tensor with a history, as models do that show their features or their loss."""

    def forward(self, x):
        self.kept = {"features": [self.features(x)]}
        return self.head(self.kept["features"][0])


class Averages(nn.Module):
    """Subtracts a running mean, in evaluation too."""

    def __init__(self):
        super().__init__()
        self.net = zoo.live(1)
        self.register_buffer("mean", torch.zeros(3, 1, 1))

    def forward(self, x):
        self.mean.mul_(0.5).add_(x.mean((0, 2, 3))[:, None, None])
        return self.net(x - self.mean)


def test_a_model_that_writes_into_its_buffers_starts_where_it_was():
    gm = capture(Averages(), zoo.images(3))
    (note,) = capture_info(gm).notes
    assert "writes into its buffers (mean)" in note
    replaced = transform(gm, [zoo.images(3)], sites="*", verify=True)
    exact = transform(gm, [zoo.images(3)], k=0, verify=True)
    assert not bool(gm.mean.any()) and not bool(replaced.mean.any())
    model = Averages().eval()
    for seed in range(3):
        assert agrees(exact, model, zoo.images(2, seed=seed))
    torch.testing.assert_close(exact.mean, model.mean)


@pytest.mark.skipif(torch.__version__.startswith("2.9."), reason="torch.export of PyTorch 2.9 refuses such models")
def test_results_of_the_last_forward_are_no_obstacle():
    model = as_class(KeepsFeatures, zoo.tiny(1))
    model(zoo.images())
    kept = model.kept["features"][0]
    assert kept.grad_fn is not None
    assert agrees(capture(model, zoo.images(3)), zoo.tiny(1), zoo.images(5))
    assert model.kept["features"][0] is kept


class Noisy(zoo.TinyNet):
    """Draws random numbers also in evaluation, as routing by a Gumbel softmax does."""

    def forward(self, x):
        return super().forward(x + 0 * torch.rand_like(x))


def test_random_models_are_noted(captured):
    (note,) = capture_info(capture(as_class(Noisy, zoo.tiny(1)), zoo.images(2))).notes
    assert "draws random numbers (aten.rand_like.default)" in note
    assert not capture_info(captured[1]).notes


def test_capture_of_a_capture_is_a_copy(captured):
    model, gm = captured
    again = capture(gm, zoo.images(3))
    assert again is not gm and again.graph is not gm.graph
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert agrees(gm, model, zoo.images(2))


# -- in-place operators ----------------------------------------------------------------------------------------------


def in_place_net():
    model = zoo.live()
    model.blocks = nn.ModuleList(InPlaceBlock(6, block.op) for block in model.blocks)
    return model.eval()


def test_in_place_operators_become_data_flow():
    model = in_place_net()
    gm = capture(model, zoo.images(3))
    assert not any(mutates(node) for node in gm.graph.nodes)
    assert [s.name for s in find_sites(gm)] == ["blocks.0.op", "blocks.1.op"]
    assert agrees(gm, model, zoo.images(5))


class EarlyView(zoo.TinyNet):
    """Reads a view of a fresh tensor that was taken before the tensor is written to."""

    def forward(self, x):
        fresh = x.new_zeros(x.shape)
        early = fresh[:, 0]
        fresh[:, 0] = x[:, 1]
        fresh[:, 1] = 2 * x[:, 2]
        return super().forward(fresh + early.unsqueeze(1))


def test_views_from_before_a_write_see_it():
    model = as_class(EarlyView, zoo.tiny(1))
    gm = capture(model, zoo.images(3))
    assert agrees(gm, model, zoo.images(5))


# -- bad input -------------------------------------------------------------------------------------------------------


def test_meta_device():
    with pytest.raises(CaptureError, match="meta device: load its weights"):
        capture(zoo.tiny(1).to("meta"), zoo.images())


def test_inputs_that_do_not_fit():
    model = zoo.tiny(1)
    with pytest.raises(CaptureError, match=r"does not run on the example input \(\(2, 5, 8, 8\)\)"):
        capture(model, torch.randn(2, 5, 8, 8))
    with pytest.raises(CaptureError, match="no example input"):
        capture(model, ())
    with pytest.raises(CaptureError, match="batch size 0"):
        capture(model, torch.randn(0, 3, 12, 20))


def test_outputs_of_an_unknown_type_are_named_with_a_remedy():
    class Answer:
        def __init__(self, logits):
            self.logits = logits

    class Answers(zoo.TinyNet):
        def forward(self, x):
            return Answer(super().forward(x))

    with pytest.raises(CaptureError, match=r"Answer.*not a known type.*register_dataclass.*use_cache = False"):
        capture(as_class(Answers, zoo.tiny(1)), zoo.images())


class Branches(nn.Module):
    """Goes another way depending on the data, around a part that has the scans."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict({"net": zoo.tiny(2)})

    def forward(self, x):
        y = self.backbone["net"](x)
        return -y if x.abs().max() > 1 else y


def test_a_model_that_cannot_be_exported_says_which_part_can():
    with pytest.raises(CaptureError, match=r"Branches cannot be exported.*all its scans lie in 'backbone.net'") as caught:
        capture(Branches(), zoo.images())
    assert len(str(caught.value)) < 1000


class WantsCuda(nn.Module):
    """Names the device it was written for, as research code does."""

    def __init__(self):
        super().__init__()
        self.net = zoo.tiny(1)

    def forward(self, x):
        offset = torch.zeros(1, 3, 1, 1, device="cuda") + torch.ones(1, device=torch.device("cuda", 0))
        return self.net(x.cuda() + offset.to("cuda:0")).to(device="cuda")


@pytest.mark.filterwarnings("ignore:torch.ao.quantization", "ignore:.*TypedStorage", "ignore:.*quantize")
def test_quantised_layers_are_refused_with_a_remedy():
    model = torch.ao.quantization.quantize_dynamic(zoo.tiny(1), {"head"}, dtype=torch.qint8)
    with pytest.raises(CaptureError, match=r"does not take quantised layers.*rewrite the model first"):
        capture(model, zoo.images())


def test_code_that_names_cuda_is_captured_without_one():
    gm = capture(WantsCuda().eval(), zoo.images(3))
    x = zoo.images(5)
    assert agrees(gm, lambda x: zoo.tiny(1)(x + 1), x)
    assert not any("cuda" in str((node.args, node.kwargs)) for node in gm.graph.nodes)


def test_model_that_cannot_be_copied():
    model = zoo.tiny(1)
    model.lock = type("Locked", (), {"__deepcopy__": lambda self, memo: 1 / 0})()
    with pytest.raises(CaptureError, match="cannot be deep-copied"):
        capture(model, zoo.images())


def test_plain_graph_modules_carry_no_capture():
    with pytest.raises(CaptureError, match="was not made by"):
        capture_info(fx.symbolic_trace(nn.ReLU()))
