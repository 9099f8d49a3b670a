"""Sums over images that stay small, in halves, whatever the order of things."""

import json

import pytest
import torch

from vmeanba_fx.calibration import tally
from vmeanba_fx.calibration.tally import BlockSums, Tally, half_of


def values(n, columns=2, seed=0):
    return torch.randn(columns, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_units_stay_bounded_and_exact(monkeypatch):
    monkeypatch.setattr(tally, "_MOST_VALUES", 40)
    units, all_values = BlockSums(2), values(1000)
    for part in all_values.split(37, dim=1):
        units.add(part)
    assert len(units.counts) <= 20 and units.samples == 1000 and units.block >= 64
    assert units.means() == pytest.approx(all_values.mean(1).tolist(), abs=1e-12)
    counts, sums = units.tensors()
    expected = [float(block.sum()) for block in all_values[0].split(units.block)]
    assert counts.tolist() == [len(b) for b in all_values[0].split(units.block)]
    assert sums[:, 0].tolist() == pytest.approx(expected, abs=1e-12)


def test_a_value_for_a_batch_counts_its_images():
    units = BlockSums(1)
    units.add(torch.tensor([[3.0]]), weight=4)
    units.add(torch.tensor([[1.0]]), weight=12)
    assert units.samples == 16 and units.means() == [1.5]


def test_halves():
    one = Tally(2)
    one.add(values(5), 1)
    assert (one.ranking.samples, one.held_out.samples) == (3, 2)  # of one batch, every second image
    assert one.held_out.sums == values(5)[:, 1::2].T.tolist()
    one.add(values(4, seed=1), 1)
    assert (one.ranking.samples, one.held_out.samples) == (5, 4)  # of two, the second
    assert one.held_out.sums == values(4, seed=1).T.tolist() and one.all.samples == 9
    alone = Tally(1)
    alone.add(torch.ones(1, 1), 8)
    assert (alone.ranking.samples, alone.held_out.samples) == (8, 0)


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_as_json_and_on(batches):
    """A tally that was written and read goes on as if nothing had happened."""
    whole, saved = Tally(2), Tally(2)
    for i in range(batches):
        for t in (whole, saved):
            t.add(values(6, seed=i), 1)
        saved = Tally.from_dict(json.loads(json.dumps(saved.to_dict())), 2)
    for t in (whole, saved):
        t.add(values(6, seed=9), 1)
    assert whole.to_dict() == saved.to_dict() and whole.all.means() == saved.all.means()


@pytest.mark.parametrize("damage", [
    {"batches": 0}, {"halves": []}, {"halves": [{}, {}]}, {"head": {"values": [[1.0]], "weight": 1}},
    {"halves": [{"block": 1, "counts": [1], "sums": [[1.0]]}] * 2},
    {"halves": [{"block": 1, "counts": [1], "sums": [[1e999, 0.0]]}] * 2},
    {"halves": [{"block": 1, "counts": [0], "sums": [[1.0, 0.0]]}] * 2},
])  # fmt: skip
def test_damage_is_noticed(damage):
    good = Tally(2)
    good.add(values(3), 1)
    good.add(values(3), 1)
    with pytest.raises((KeyError, TypeError, ValueError)):
        Tally.from_dict(good.to_dict() | damage, 2)


def test_every_second_batch_is_held_out():
    values, nothing = torch.ones(2, 3), (2, 0)
    ranking, held_out = half_of(2, values, 1, 4)
    assert ranking is values and held_out.shape == nothing
    ranking, held_out = half_of(3, values, 1, 4)
    assert ranking.shape == nothing and held_out is values
