import pytest
import torch

from tests.ops import problems
from vmeanba_fx.ops import naive
from vmeanba_fx.ops.compose import ScanOrder
from vmeanba_fx.ops.directions import CODES, direction_table, inverse_table

# Flat positions of a 2 x 3 map, written out by hand.
BY_HAND = {
    0: [0, 1, 2, 3, 4, 5],
    1: [0, 3, 1, 4, 2, 5],
    2: [5, 4, 3, 2, 1, 0],
    3: [5, 2, 4, 1, 3, 0],
    4: [2, 1, 0, 5, 4, 3],
    5: [3, 0, 4, 1, 5, 2],
    6: [3, 4, 5, 0, 1, 2],
    7: [2, 5, 1, 4, 0, 3],
}


def test_table_by_hand():
    assert direction_table(list(BY_HAND), 2, 3).tolist() == list(BY_HAND.values())


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (3, 3), (5, 2)])
def test_table_agrees_with_the_reference_walk(size):
    H, W = size
    for code in CODES:
        walk = [h * W + w for h, w in naive._walk(0, [code], None, H, W)]
        assert direction_table((code,), H, W)[0].tolist() == walk


def test_table_is_cached():
    assert direction_table([0, 3], 4, 5) is direction_table((0, 3), 4, 5)


def test_cached_table_made_under_inference_mode_can_be_saved_for_backward():
    with torch.inference_mode():
        table = direction_table([1, 2], 7, 11)
    x = torch.randn(77, requires_grad=True)
    x[table[0]].sum().backward()
    assert torch.equal(x.grad, torch.ones(77))


def test_inverse():
    table = direction_table(list(CODES), 3, 5)
    inverse = inverse_table(table)
    assert torch.equal(inverse.gather(1, table), torch.arange(15).expand(8, 15))


@pytest.mark.parametrize(
    "table, message", [([[0, 1, 1]], "exactly once"), ([[0, 1, 3]], "positions 0 to 2"), ([[0, 1, -1]], "0 to 2")]
)
def test_inverse_of_no_permutation_is_refused(table, message):
    with pytest.raises(ValueError, match=message):
        inverse_table(torch.tensor(table))


@pytest.mark.parametrize("use_table", [False, True])
def test_scan_order_reads_and_puts_back(use_table):
    maps = problems.Maker().normal(2, 3, 4, 5)
    codes, table = list(CODES), direction_table(list(CODES), 4, 5)
    order = ScanOrder([], table, 4, 5) if use_table else ScanOrder(codes, None, 4, 5)
    for k in CODES:
        rows = order.read(maps, k)
        assert torch.equal(rows, maps.flatten(-2)[..., table[k]])
        assert torch.equal(order.put_back(rows, k), maps)
