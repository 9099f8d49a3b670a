"""Our VMamba by itself: official numbers, shapes, odd sizes, gradients, dtypes, export."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.export import Dim

from tests.helpers import make_scan_matter, relative_error, without_scans
from vmeanba_fx import models
from vmeanba_fx.models import ss2d

HERE = Path(__file__).parent
KEYS = json.loads((HERE / "official_keys.json").read_text())
OUTPUTS = json.loads((HERE / "official_outputs.json").read_text())
V0 = dict(forward_type="v0", downsample_version="v1", norm_layer="ln")
V05 = dict(forward_type="v05_noz", downsample_version="v3", norm_layer="ln2d", patchembed_version="v2")


def small(seed: int = 0, **config) -> models.VSSM:
    """A two-stage model whose scans matter."""
    base = dict(depths=(1, 1), dims=16, num_classes=5, ssm_d_state=2, drop_path_rate=0.0)
    return make_scan_matter(models.VSSM(**{**base, **config}), seed).eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", KEYS)
def test_state_dict_is_the_official_one(name):
    with torch.device("meta"):
        model = getattr(models, name)()
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == KEYS[name]


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_the_official_code(name):
    """The numbers were computed with the official file; tests/models/test_official.py compares with it directly."""
    case = OUTPUTS[name]
    model = make_scan_matter(models.VSSM(**case["config"])).eval()
    expected = torch.tensor(case["output"])
    with torch.no_grad():
        x = images(2, 3, 32, 32)
        assert relative_error(without_scans(model)(x), expected) > 0.1
        torch.testing.assert_close(model(x), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("config", [V0, V05, dict(V05, downsample_version="v1"), dict(V05, norm_layer="ln")])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (40, 9)])
def test_any_size(config, size):
    model = small(**config)
    with torch.no_grad():
        assert model(images(3, 3, *size)).shape == (3, 5)


def test_patch_merging_pads_odd_sizes_with_zeros():
    from vmeanba_fx.models.layers import PatchMerge

    x = images(2, 3, 5, 7)
    padded = torch.nn.functional.pad(x, (0, 1, 0, 1))
    merged = PatchMerge(channel_first=True)(x)
    assert merged.shape == (2, 12, 3, 4)
    assert torch.equal(merged, PatchMerge(channel_first=True)(padded))
    assert torch.equal(merged.permute(0, 2, 3, 1), PatchMerge(channel_first=False)(x.permute(0, 2, 3, 1)))


@pytest.mark.parametrize("mode", ["cross2d", "bidi", "unidi"])
def test_cross_scan_order(mode):
    x = torch.arange(6.0).view(1, 1, 2, 3)
    rows, columns = [0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]
    expected = {
        "cross2d": [rows, columns, rows[::-1], columns[::-1]],
        "bidi": [rows, rows, rows[::-1], rows[::-1]],
        "unidi": [rows] * 4,
    }[mode]
    assert ss2d.cross_scan(x, mode)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["cross2d", "bidi", "unidi"])
def test_cross_merge_is_the_transpose_of_cross_scan(mode):
    x, y = images(2, 3, 4, 5).double(), images(2, 4, 3, 20).double()
    torch.testing.assert_close(
        (ss2d.cross_scan(x, mode) * y).sum(), (ss2d.cross_merge(y, 4, 5, mode) * x).sum(), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("tag", ["v05", "v05_onnone_noz"])
def test_channel_first_and_last_agree(tag):
    first = small(**{**V05, "forward_type": tag})
    last = small(**{**V05, "forward_type": tag, "norm_layer": "ln"})
    last.load_state_dict(first.state_dict())
    x = images(2, 3, 33, 47)
    with torch.no_grad():
        torch.testing.assert_close(last(x), first(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [V0, V05, dict(V05, forward_type="v05", use_checkpoint=True, posembed=True, imgsize=32)])
def test_every_parameter_gets_a_gradient(config):
    model = small(**config, ssm_drop_rate=0.1).train()
    model(images(2, 3, 32, 32)).square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert without == []


def test_gradients_reach_through_the_scan():
    """The gradient of x_proj by finite differences in float64."""
    model = small(**V05, depths=(1,)).double()
    x = images(1, 3, 16, 16).double()
    weight = model.layers[0].blocks[0].op.x_proj.weight
    loss = model(x).square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        weight += 1e-5 * direction
        up = model(x).square().sum()
        weight -= 2e-5 * direction
        down = model(x).square().sum()
    torch.testing.assert_close((gradient * direction).sum(), (up - down) / 2e-5, rtol=1e-6, atol=1e-8)


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation():
    from vmeanba_fx.models.layers import DropPath

    torch.manual_seed(0)
    layer, x = DropPath(0.25), torch.ones(4000, 1, 1, 2)
    y = layer.train()(x)
    assert sorted(y.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert y.mean().item() == pytest.approx(1.0, abs=0.05)
    assert (y[..., 0] == y[..., 1]).all()
    assert layer.eval()(x) is x


def test_state_matrix_is_never_in_low_precision():
    logs = torch.tensor([[0.3]])
    assert ss2d.state_matrix(logs.bfloat16()).dtype == torch.float32
    assert ss2d.state_matrix(logs.double()).item() == -math.exp(logs.double().item())


@pytest.mark.parametrize("config", [V0, V05])
def test_dtypes(config):
    model = small(**config)
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        exact = model.double()(x.double())
        assert exact.dtype == torch.float64
        assert relative_error(model.float()(x).double(), exact) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(model(x).double(), exact) < 0.1
        low = model.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert relative_error(low.double(), exact) < 0.2


@pytest.mark.parametrize("config", [V0, dict(V05, downsample_version="v1")])
def test_exports_with_any_batch_height_and_width(config):
    model = small(**config)
    sizes = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    with torch.no_grad():
        exported = torch.export.export(model, (images(2, 3, 32, 40),), dynamic_shapes=(sizes,)).module()
        for shape in ((1, 3, 32, 40), (5, 3, 36, 28), (3, 3, 43, 51)):
            x = images(*shape)
            torch.testing.assert_close(exported(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(forward_type="v9"), "forward_type 'v9'"),
        (dict(forward_type="v05_onnone_onsigmoid"), "forward_type"),
        (dict(forward_type="v05_noz_noz"), "forward_type"),
        (dict(forward_type="v0", norm_layer="ln2d"), "channel-last"),
        (dict(norm_layer="bn"), "norm_layer must be one of 'ln', 'ln2d', not 'bn'"),
        (dict(downsample_version="v4"), "downsample_version"),
        (dict(patchembed_version="v3"), "patchembed_version"),
        (dict(patchembed_version="v2", patch_size=1), "patch_size"),
        (dict(ssm_act_layer="tanh"), "ssm_act_layer"),
        (dict(ssm_init="v7"), "ssm_init"),
        (dict(dims=(8, 16, 32)), "3 dims, 2 depths"),
        (dict(gmlp=True), "gmlp"),
    ],
)
def test_bad_arguments_are_explained(config, message):
    with pytest.raises(ValueError, match=message):
        models.VSSM(**{"depths": (1, 1), "dims": 8, **config})


def test_factories_take_overrides_and_explain_wrong_ones():
    with torch.device("meta"):
        model = models.vmamba_tiny_s1l8(num_classes=7, in_chans=1, channel_first=False)
    assert model.classifier.head.out_features == 7 and not model.channel_first
    assert models.vmamba_tiny_s1l8.__name__ == "vmamba_tiny_s1l8"
    with pytest.raises(TypeError, match=r"no argument 'num_class'; did you mean 'num_classes'\?"):
        models.vmamba_tiny_s1l8(num_class=7)
    with pytest.raises(ValueError, match="load_checkpoint"):
        models.vmamba_tiny_s1l8(pretrained=True)
    with pytest.raises(ValueError, match="no VMamba is called 'vmamba_huge'"):
        models.backbone("vmamba_huge")
