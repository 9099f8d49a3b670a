import pytest
import torch

from tests.ops.problems import Maker
from vmeanba_fx.ops import recurrence
from vmeanba_fx.ops.tiles import tiles


def loop(a, b):
    h, states = torch.zeros_like(b[..., 0]), []
    for t in range(b.shape[-1]):
        h = a[..., t] * h + b[..., t]
        states.append(h)
    return torch.stack(states, -1)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 31, 32, 33, 100, 1000])
@pytest.mark.parametrize("window", [(1, 1), (4, 1), (32, 8192), (1, 10**9)], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_rows(length, window, reverse, monkeypatch):
    shortest, elements = window
    monkeypatch.setattr(recurrence, "_SHORTEST_WINDOW", shortest)
    monkeypatch.setattr(recurrence, "_BLOCK_ELEMENTS", elements)
    make = Maker()
    a, b = 1.1 * make.normal(3, 1, length).sigmoid(), make.normal(3, 2, length)
    turn = (lambda x: x.flip(-1)) if reverse else (lambda x: x)
    expected = turn(loop(turn(a), turn(b)))
    before = a.clone(), b.clone()
    torch.testing.assert_close(recurrence.scan_rows(a, b, reverse=reverse), expected)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])
    torch.testing.assert_close(recurrence.scan_rows(a, b, spoil=True, reverse=reverse), expected)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("width", [5, 70_000])
def test_steps(foreach, width, monkeypatch, two_threads):
    """Both ways to issue the steps, also on vectors long enough for PyTorch to use several threads."""
    monkeypatch.setattr(recurrence, "_foreach_is_sequential", lambda: foreach)
    make = Maker()
    a, b = make.normal(width, 12).sigmoid().t().contiguous(), make.normal(width, 12).t().contiguous()
    expected = loop(a.t(), b.t()).t()
    recurrence.scan_steps_(a.unbind(0), b.unbind(0))
    torch.testing.assert_close(b, expected)


def test_foreach_is_used_with_this_torch():
    """Not needed for a right result; without it the scan over many channels is slower than README says."""
    assert recurrence._foreach_is_sequential()


@pytest.mark.parametrize("sizes", [(3, 4, 5), (1, 1, 1), (0, 2, 2), (2, 1, 7)])
@pytest.mark.parametrize("budget", [1, 7, 30, 70, 10**6])
def test_tiles_cover_everything_once_within_the_budget(sizes, budget):
    cost, seen = 3, torch.zeros(sizes)
    for tile in tiles(*sizes, cost, budget):
        seen[tile] += 1
        assert seen[tile].numel() * cost <= max(budget, cost)
    assert torch.equal(seen, torch.ones(sizes))
