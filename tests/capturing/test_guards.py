"""What a captured graph does with inputs that it was not captured for, and that it is an ordinary module otherwise."""

import copy
import io
import pickle

import pytest
import torch
from torch import fx, nn

import vmeanba_fx
from tests import zoo
from tests.helpers import agrees
from vmeanba_fx import ExportError, GuardError, VMeanbaError, capture
from vmeanba_fx.capturing.guards import InputGuards, failed_guard, module_of
from vmeanba_fx.graph import GUARDS


def saved_and_loaded(gm):
    buffer = io.BytesIO()
    torch.save(gm, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def compiled(gm):
    torch._dynamo.reset()
    return torch.compile(gm, backend="aot_eager", fullgraph=True)


def exported(gm):
    batch = torch.export.Dim("batch")
    return torch.export.export(gm, (zoo.images(),), dynamic_shapes=({0: batch},), strict=False).module()


FORMS = {
    "as it is": lambda gm: gm,
    "copied": copy.deepcopy,
    "pickled": lambda gm: pickle.loads(pickle.dumps(gm)),
    "saved": saved_and_loaded,
    "saved twice": lambda gm: saved_and_loaded(saved_and_loaded(gm)),
    "saved and compiled": lambda gm: compiled(saved_and_loaded(gm)),
    "compiled": compiled,
    "exported": exported,
    "saved and exported": lambda gm: exported(saved_and_loaded(gm)),
    "traced by fx": fx.symbolic_trace,
}


TORCHS = {"compiled", "saved and compiled", "exported", "saved and exported"}  # which raise an AssertionError


@pytest.fixture(scope="module", params=["captured", "rewritten"])
def gm(request):
    captured = capture(zoo.live(2), zoo.images())
    return captured if request.param == "captured" else vmeanba_fx.transform(captured, [zoo.images()], k=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_an_ordinary_module_that_refuses_other_sizes(gm, form):
    found = FORMS[form](gm)
    for batch in (3, 1, 2):
        assert agrees(found, gm, zoo.images(batch))
    with pytest.raises(AssertionError if form in TORCHS else GuardError, match=r"x\.size\(\)\[2\] == 12"):
        found(torch.zeros(2, 3, 16, 20))


def test_the_refusal_says_what_to_do(gm):
    sentence = r"captured for inputs with x\.size\(\)\[3\] == 20; for others capture or .*dynamic_size"
    for call, error in ((gm, VMeanbaError), (compiled(gm), AssertionError)):
        with pytest.raises(error, match=sentence):
            call(torch.zeros(2, 3, 12, 16))
    with pytest.raises(VMeanbaError, match=r"with x\.dim\(\) == 4; .* These are \(3, 12, 20\)\."):
        gm(torch.zeros(3, 12, 20))


class Options(nn.Module):
    """Nested inputs, and some that are no tensors."""

    def __init__(self):
        super().__init__()
        self.net = zoo.live(1)

    def forward(self, batch, *more, scale=1.0, mode="sum", flag=False):
        out = self.net(batch["images"][0]) * scale + more[0]
        return out.sum(1) if mode == "sum" or flag else out


def test_inputs_of_every_kind_are_checked():
    def call(module, size=20, bias=7, **changed):
        options = {"scale": 2.0, "mode": "sum", "flag": False} | changed
        return module({"images": [torch.ones(2, 3, 12, size)]}, torch.ones(2, bias), **options)

    class Inputs(nn.Module):  # what `call` calls its module with
        def forward(self, *args, **kwargs):
            return args, kwargs

    model = Options().eval()
    args, kwargs = call(Inputs())
    gm = pickle.loads(pickle.dumps(capture(model, args, kwargs)))
    torch.testing.assert_close(call(gm), call(model))
    refused = {
        "batch\\['images'\\]\\[0\\].size\\(\\)\\[3\\] == 20": {"size": 16}, r"more_0.size\(\)\[1\] == 7": {"bias": 1},
        "scale == 2.0": {"scale": 3.0}, "mode == 'sum'": {"mode": "all"}, "flag == False": {"flag": True},
    }  # fmt: skip
    for message, change in refused.items():
        with pytest.raises(GuardError, match=message):
            call(gm, **change)


def test_graphs_with_regions_are_copied_but_not_pickled():
    """Without the refusal the loaded graph would compute in float32 what the model does in bfloat16."""
    class Lower(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = zoo.live(1)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x)

    gm = capture(Lower().eval(), zoo.images())
    assert agrees(copy.deepcopy(gm), gm, zoo.images(3))
    with pytest.raises(ExportError, match="autocast or checkpoint regions cannot be pickled"):
        saved_and_loaded(gm)


class Program:
    """Stands for an ``ExportedProgram``: a graph with guards as torch builds them."""

    def __init__(self, check):
        self.gm = capture(zoo.live(1), zoo.images())
        guards = nn.Module()
        guards.forward = check
        setattr(self.gm, GUARDS, guards)

    def module(self):
        return self.gm


def test_conditions_that_cannot_be_recorded_stay_with_torch():
    def decided(x):
        torch._assert(x.size()[0] == 2 or x.size()[0] == 5, "Guard failed: x.size()[0] == 2 or x.size()[0] == 5")

    def arithmetic(x):
        torch._assert(x.size()[0] % 3 != x.size()[1] // 2 - 1, "Guard failed: x.size()[0] % 3 != x.size()[1] // 2 - 1")

    for check, ours, refused in ((decided, False, 3), (arithmetic, True, 3)):
        gm = module_of(Program(check))
        assert isinstance(getattr(gm, GUARDS), InputGuards) == ours
        gm(zoo.images(2))
        assert failed_guard(gm, (zoo.images(2),), {}) == ""
        assert failed_guard(gm, (zoo.images(refused),), {}).startswith("x.size()[0]")
        with pytest.raises(GuardError if ours else AssertionError, match=r"x\.size\(\)\[0\]"):
            gm(zoo.images(refused))
