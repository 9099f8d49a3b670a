"""Bootstrap intervals cover the mean as often as they say; rank correlation as scipy has it."""

import pytest
import torch

from vmeanba_fx.calibration.bootstrap import intervals, resampled_means, spearman, told_apart

ONE = torch.ones(64, dtype=torch.float64)


def draw(kind, n, generator):
    if kind == "normal":
        return torch.randn(n, generator=generator, dtype=torch.float64)
    if kind == "exponential":  # as skew as differences of losses
        return -torch.rand(n, generator=generator, dtype=torch.float64).log() - 1
    return torch.randint(-1, 2, (n,), generator=generator).double()  # as differences of accuracies


@pytest.mark.parametrize("kind, low", [("normal", 0.92), ("exponential", 0.89), ("signs", 0.92)])
def test_coverage(kind, low):
    """64 images, 400 repetitions as columns: the true mean is 0."""
    generator = torch.Generator().manual_seed(0)
    values = torch.stack([draw(kind, 64, generator) for _ in range(400)], 1)
    found = intervals(ONE, values, seed=1)
    share = sum(a <= 0 <= b for a, b in found) / 400
    assert low <= share <= 0.98
    assert sum(b - a for a, b in found) / 400 == pytest.approx(2 * 1.96 * float(values.std()) / 8, rel=0.1)


def test_narrower_confidence_is_narrower():
    values = torch.randn(64, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (a, b), (c, d) = (intervals(ONE, values, confidence=c)[0] for c in (0.95, 0.5))
    assert a < c < float(values.mean()) < d < b and (b - a) / (d - c) == pytest.approx(1.96 / 0.674, rel=0.1)


def test_blocks_count_by_their_images():
    """Two blocks of 1 and 99 images: the mean is that of 100 images, and a resample is of one of three kinds."""
    counts, sums = torch.tensor([1.0, 99.0], dtype=torch.float64), torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    means = resampled_means(counts, sums, seed=0, draws=500)
    assert sorted({round(float(m), 6) for m in means}) == [0.0, 0.01, 1.0]


def test_the_same_every_time_and_no_global_state():
    values = torch.randn(64, 3, dtype=torch.float64)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert intervals(ONE, values, seed=3) == intervals(ONE, values, seed=3) != intervals(ONE, values, seed=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_changed_is_not_certainty():
    """64 images whose prediction stayed say that at most about 3 in 64 may change; with losses there is no such bound."""
    values = torch.zeros(64, 2, dtype=torch.float64)
    values[:5, 1] = 1
    still, moved = intervals(ONE, values, span=1.0)
    assert still == (pytest.approx(-3 / 64, rel=1e-5), pytest.approx(3 / 64, rel=1e-5))
    assert moved == intervals(ONE, values)[1] and intervals(ONE, values)[0] == (0.0, 0.0)


def test_one_block_tells_nothing():
    assert intervals(ONE[:1], torch.ones(1, 2, dtype=torch.float64)) == []
    assert told_apart(ONE[:1], torch.ones(1, 2, dtype=torch.float64), [0, 1]) == []


def test_neighbours_are_compared_image_by_image():
    """Two sites that lose on the same images are told apart by a difference that is lost in the spread of either."""
    generator = torch.Generator().manual_seed(0)
    common = 10 * torch.randn(64, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(64, 3, generator=generator, dtype=torch.float64)
    sums = common[:, None] + noise - noise.mean(0) + torch.tensor([0.0, 0.5, 0.5])
    assert told_apart(ONE, sums, [0, 1, 2]) == [True, False]
    assert told_apart(ONE, sums, [2, 1, 0]) == [False, True]


@pytest.mark.parametrize("a, b, expected", [
    ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
    ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
    ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),
    ([1, 1, 2, 3], [1, 2, 2, 3], 5 / 6),  # average ranks for ties, as scipy.stats.spearmanr
    ([1, 1, 1], [1, 2, 3], None),
    ([1], [1], None),
])  # fmt: skip
def test_spearman(a, b, expected):
    found = spearman(a, b)
    assert found is None if expected is None else found == pytest.approx(expected)


def test_few_samples_widen_the_interval():
    """The bootstrap's variance of a mean is too small by (n - 1) / n."""
    counts, values = torch.ones(4, dtype=torch.float64), torch.tensor([[0.0], [1.0], [2.0], [5.0]], dtype=torch.float64)
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(resampled_means(counts, values)[:, 0], tails).tolist()
    [(a, b)] = intervals(counts, values)
    assert b - a == pytest.approx((high - low) * (4 / 3) ** 0.5, rel=1e-4)
