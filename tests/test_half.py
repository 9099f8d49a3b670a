"""Models in 16 bits: a transformed model that is cast afterwards, and a model that was cast before, at any k."""

import copy

import pytest
import torch

import vmeanba_fx
from tests.helpers import make_scan_matter, relative_error
from tests.passes.cases import COMMON, VARIANTS, planned
from vmeanba_fx.models import VSSM

BOUND = {torch.float16: 0.01, torch.bfloat16: 0.08}
LIVE = [{"mean": "direction"}, {"mean": "all"}, {"mean": "input"}, {"reduce": "rank", "rank": 2}]


@pytest.mark.parametrize("dtype", BOUND, ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ["v05_noz", "v05_onnone"])
def test_a_transformed_model_can_be_cast(name, dtype):
    plan, x = planned(name, torch.float32)
    for k in (0, len(plan.sites)):
        gm = plan.apply(k)
        with torch.no_grad():
            expected = gm(x)
            found = gm.to(dtype)(x.to(dtype))
        assert found.dtype == dtype
        assert relative_error(found.float(), expected) < BOUND[dtype]


@pytest.mark.parametrize("options", LIVE, ids=lambda o: "-".join(map(str, o.values())))
def test_live_sites_can_be_cast(options):
    model = make_scan_matter(VSSM(**COMMON, **VARIANTS["v05_onnone"])).eval()
    x = torch.randn(3, 3, 28, 44, generator=torch.Generator().manual_seed(0))
    gm = vmeanba_fx.transform(model, [x], sites=["*"], **options)
    with torch.no_grad():
        expected = gm(x)
        assert relative_error(gm.half()(x.half()).float(), expected) < BOUND[torch.float16]


@pytest.mark.parametrize("dtype", BOUND, ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ["v05_noz", "v05_onnone"])
def test_a_model_that_was_cast_is_transformed(name, dtype):
    plan, x = planned(name, torch.float32)
    model = make_scan_matter(VSSM(**COMMON, **VARIANTS[name])).eval()
    half = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        for sites in ([], [s.name for s in plan.sites]):
            expected = plan.apply(sites=sites)(x) if sites else model(x)
            gm = vmeanba_fx.transform(half, [x.to(dtype)], **({"sites": sites} if sites else {"k": 0}))
            assert relative_error(gm(x.to(dtype)).float(), expected) < BOUND[dtype]
