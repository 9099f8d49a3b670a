"""Our ops in ATen: the same numbers as the plain reference, for any length, and nothing of ours left in a program."""

import pytest
import torch
from torch import nn

from tests.helpers import relative_error
from tests.ops import problems
from vmeanba_fx import ops
from vmeanba_fx.ops import decompositions, naive
from vmeanba_fx.ops.chunked import looped, unrolled

LENGTHS = {1: (1, 1), 7: (7, 1), 33: (3, 11), 1000: (25, 40)}
CODES = [0, 3, 5, 6]


def arguments(name, length, dtype=torch.float64, table=False):
    """Arguments of op ``name`` for a scan of ``length`` steps; ``table``: random orders in place of direction codes."""
    height, width = LENGTHS.get(length, (length, 1))
    directions = 3 if table else CODES
    made = {
        "selective_scan": lambda: problems.selective_scan(2, 3, 2, 3, length, dtype),
        "linear_scan": lambda: problems.linear_scan(2, 3, 2, 3, length, dtype),
        "shared_scan": lambda: problems.shared_scan(2, 3, 2, 3, length, dtype),
        "shared_scan2d": lambda: problems.shared_scan2d(2, directions, 2, 3, height, width, dtype, own_u=not table),
        "ss2d": lambda: problems.ss2d(2, directions, 3, 2, 2, height, width, dtype),
        "broadcast_add": lambda: problems.broadcast_add(2, 3, 2, length, dtype),
    }
    return made[name]()


SCANS = ["selective_scan", "linear_scan", "shared_scan", "shared_scan2d", "ss2d", "broadcast_add"]


def test_every_op_has_a_decomposition():
    """But for the gradients, which no exported program holds."""
    defined = {
        name.removeprefix("vmeanba_fx::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("vmeanba_fx::")
    }
    assert {name for name in defined if not name.endswith("_backward")} == {op._opname for op in decompositions.table(unrolled)}
    assert all(op.namespace == "vmeanba_fx" for op in decompositions.table(unrolled))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SCANS)
def test_float64_equals_the_reference(name, length):
    given = arguments(name, length)
    expected = getattr(naive, name)(**given)
    assert relative_error(getattr(decompositions, name)(**given), expected) < 1e-13
    if "directions" in given:
        given = arguments(name, length, table=True)
        assert relative_error(getattr(decompositions, name)(**given), getattr(naive, name)(**given)) < 1e-13


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["selective_scan", "linear_scan"])
def test_loops_equal_the_reference(name, length):
    """The two ways in which the other ops use a form; those are run as programs below."""
    given = arguments(name, length)
    assert relative_error(getattr(decompositions, name)(**given, form=looped), getattr(naive, name)(**given)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCANS)
def test_other_dtypes(name, dtype):
    given = arguments(name, 33, dtype)
    found, expected = getattr(decompositions, name)(**given), getattr(ops, name)(**given)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert relative_error(found, expected) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("form", [unrolled, looped])
def test_decays_that_are_zero_or_grow(form):
    """No product is divided by and no sum exponentiated: what a loop survives, this does."""
    given = problems.linear_scan(1, 1, 1, 2, 1000)
    given["a"][..., ::7] = 0
    given["a"][..., 300:320] = 1.5
    assert relative_error(decompositions.linear_scan(**given, form=form), naive.linear_scan(**given)) < 1e-13
    given = problems.selective_scan(1, 1, 2, 2, 1000, dtype=torch.float32, full=False)
    given["delta"] += 300.0  # every decay underflows, and so does any product of them
    found = decompositions.selective_scan(**given, form=form)
    assert found.isfinite().all() and relative_error(found, naive.selective_scan(**given)) < 1e-6


class Calls(nn.Module):
    """One call of an op: its tensors are the inputs, by position."""

    def __init__(self, name, given):
        super().__init__()
        self.op = getattr(ops, name)
        self.names = [k for k, v in given.items() if isinstance(v, torch.Tensor)]
        self.fixed = {k: v for k, v in given.items() if k not in self.names}
        self.inputs = tuple(given[k] for k in self.names)

    def forward(self, *inputs):
        return self.op(**dict(zip(self.names, inputs, strict=True)), **self.fixed)


def exported(module, form, dynamic=None):
    graph = torch.export.export(module, module.inputs, dynamic_shapes=dynamic and (dynamic,), strict=False).module()
    decompositions.decompose(graph, form)
    return torch.export.export(graph, module.inputs, dynamic_shapes=dynamic, strict=False)


@pytest.mark.parametrize("form", [unrolled, looped])
@pytest.mark.parametrize("name", SCANS)
def test_programs_hold_no_op_of_ours(name, form):
    given = arguments(name, 33)
    module = Calls(name, given)
    batched = [t.shape[0] == 2 and t.dim() > 2 for t in module.inputs]
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} if b else None for b in batched)
    lowered = exported(module, form, dynamic)
    assert not [n for n in lowered.graph.nodes if "vmeanba_fx" in str(n.target)]
    one = tuple(t[:1] if b else t for t, b in zip(module.inputs, batched, strict=True))
    for inputs in (module.inputs, one):
        assert relative_error(lowered.module()(*inputs), module(*inputs)) < 1e-13


def count(form, length):
    given = problems.selective_scan(2, 1, 1, 1, length, torch.float32, full=False)
    program = exported(Calls("selective_scan", given), form)
    return sum(len(m.graph.nodes) for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule))


def test_the_number_of_operators():
    """The same for every length as loops; written out, two levels more for 256 times the length."""
    assert count(looped, 12) == count(looped, 256) == count(looped, 16_383)
    few, many = count(unrolled, 16**2), count(unrolled, 16**4)
    assert few < many <= 2 * few + 16
