"""The segmentation head: shapes, gradients, and its arithmetic against a plain restatement."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import make_scan_matter, relative_error, without_scans
from vmeanba_fx import models
from vmeanba_fx.models.upernet import UperHead

CONFIG = dict(depths=(1, 1, 1, 1), dims=8, ssm_d_state=1, forward_type="v05_noz", norm_layer="ln2d", downsample_version="v3")


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(64, 64), (50, 70)])
def test_logits_have_the_size_of_the_image(size):
    backbone = make_scan_matter(models.Backbone(**CONFIG))
    model = models.UperNet(backbone, num_classes=5, channels=8).eval()
    x = images(2, 3, *size)
    with torch.no_grad():
        maps = backbone.eval()(x)
        y = model(x)
        assert relative_error(models.UperNet.forward(without_scans(model), x), y) > 0.05
    assert [m.shape[1] for m in maps] == [8, 16, 32, 64] == backbone.out_channels
    assert all(m.is_contiguous() for m in maps)
    assert y.shape == (2, 5, *size) and y.isfinite().all()


def test_channel_last_backbone_gives_the_same_maps():
    first = make_scan_matter(models.Backbone(**CONFIG)).eval()
    last = models.Backbone(**{**CONFIG, "norm_layer": "ln"}).eval()
    last.load_state_dict(first.state_dict())
    with torch.no_grad():
        for a, b in zip(first(images(1, 3, 40, 56)), last(images(1, 3, 40, 56)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_head_arithmetic():
    """Pyramid pooling and feature pyramid written out for two maps."""
    torch.manual_seed(0)
    head = UperHead([3, 6], num_classes=2, channels=4, pool_scales=(1, 2)).eval()
    fine, coarse = images(1, 3, 8, 6), images(1, 6, 4, 3)

    def block(module, x, padding):
        y = F.conv2d(x, module.conv.weight, padding=padding) / (1 + module.bn.eps) ** 0.5
        return y.clamp(min=0)

    def up(x, size):
        return F.interpolate(x, size, mode="bilinear", align_corners=False)

    with torch.no_grad():
        pools = [
            up(block(m[1], F.adaptive_avg_pool2d(coarse, s), 0), (4, 3)) for s, m in zip((1, 2), head.psp_modules, strict=True)
        ]
        top = block(head.bottleneck, torch.cat([coarse, *pools], 1), 1)
        lateral = block(head.lateral_convs[0], fine, 0) + up(top, (8, 6))
        joined = torch.cat([block(head.fpn_convs[0], lateral, 1), up(top, (8, 6))], 1)
        expected = F.conv2d(block(head.fpn_bottleneck, joined, 1), head.conv_seg.weight, head.conv_seg.bias)
        torch.testing.assert_close(head([fine, coarse]), expected, rtol=1e-5, atol=1e-6)


def test_every_parameter_gets_a_gradient():
    model = models.UperNet(make_scan_matter(models.Backbone(**CONFIG, drop_path_rate=0.0)), 5, channels=8).train()
    model(images(2, 3, 64, 64)).square().sum().backward()
    # The single-pixel pooling feeds a BatchNorm of two values per channel: its gradients may be tiny, not absent.
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_backbone_by_name_and_bad_arguments():
    backbone = models.backbone("vmamba_tiny_s1l8", out_indices=(1, 3), depths=(1, 1, 1, 1), dims=8)
    assert backbone.out_channels == [16, 64]
    assert [m.shape[-1] for m in backbone(images(1, 3, 64, 64))] == [8, 2]
    for wrong in ((), (0, 4), (1, 0), (0, 0)):
        with pytest.raises(ValueError, match=r"increasing stages in 0\.\.3"):
            models.Backbone(**CONFIG, out_indices=wrong)
    with pytest.raises(ValueError, match="out_channels"):
        models.UperNet(models.VSSM(**CONFIG), 5)
