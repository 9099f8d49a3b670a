"""The solves behind rank-r scans and refits, against dense solutions in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from vmeanba_fx.fitting import least_squares
from vmeanba_fx.fitting.least_squares import RIDGES, Layout, Sums, Weighting, auto_rank, fit_low_rank, refit_linear

NO_RIDGE = (1e-13,)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(sources: int, channels: int, rows: int = 200, noise: float = 0.3, seed: int = 0) -> Tensor:
    """(1, rows, width) of [Z | U | Y | 1]: Y a map of Z of falling singular values, plus noise and a constant."""
    Z = normal(rows, sources * channels, seed=seed) + 0.5
    M = normal(sources * channels, channels, seed=seed + 1)
    U, S, V = torch.linalg.svd(M, full_matrices=False)
    Y = Z @ (U * S * 0.5 ** torch.arange(channels)) @ V + noise * normal(rows, channels, seed=seed + 2) + 1.0
    x = normal(rows, channels, seed=seed + 3)
    return torch.cat([Z, x, Y, torch.ones(rows, 1, dtype=torch.float64)], 1)[None]


def summed(rows: Tensor, width: int, parts: int = 2) -> Sums:
    """Parts go to both halves in turn."""
    sums = Sums(rows.shape[0], width, torch.device("cpu"))
    for i, part in enumerate(rows.chunk(parts, dim=1)):
        sums.add(part, i % 2)
    return sums


def weightings(layout: Layout, project: bool = False, weights: Tensor | None = None) -> list[Weighting]:
    """Of one head."""
    return [Weighting.of(layout.channels, project=project, device=torch.device("cpu"), weights=weights)]


def fitted(rows: Tensor, layout: Layout, rank: int, project=False, skip=False, ridges=NO_RIDGE, weights=None):
    measure = weightings(layout, project, weights)
    [fit], energy = fit_low_rank(summed(rows, layout.width), layout, rank, weightings=measure, skip=skip, ridges=ridges)
    return fit, energy


def predicted(fit, rows: Tensor, layout: Layout) -> Tensor:
    Z = rows[0, :, layout.z()].unflatten(1, (layout.sources, layout.channels))
    return torch.einsum("nkd,krd,ker->ne", Z, fit.W, fit.V) + rows[0, :, layout.u] * fit.s + fit.b


def dense_low_rank(Z: np.ndarray, Y: np.ndarray, rank: int) -> np.ndarray:
    """The least-squares map Z -> Y of that rank: the unrestricted solution, its output on its leading directions."""
    M = np.linalg.lstsq(Z, Y, rcond=None)[0]
    V = np.linalg.svd(Z @ M, full_matrices=False)[2][:rank]
    return Z @ M @ V.T @ V


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_equals_the_dense_reduced_rank_regression(rank):
    layout = Layout(1, 5)
    rows = rows_of(1, 5)
    fit, energy = fitted(rows, layout, rank)
    Z, Y = rows[0, :, layout.z()].numpy(), rows[0, :, layout.y].numpy()
    expected = dense_low_rank(Z - Z.mean(0), Y - Y.mean(0), rank)
    found = predicted(fit, rows, layout).numpy() - Y.mean(0)
    np.testing.assert_allclose(found, expected, atol=1e-7)
    error = np.square(Y - Y.mean(0) - expected).sum() / np.square(Y - Y.mean(0)).sum()
    assert energy == pytest.approx(1 - error, abs=1e-9)
    assert fit.W.shape == (1, rank, 5) and fit.V.shape == (1, 5, rank)


def test_nothing_is_fitted_to_what_does_not_vary():
    """Calibration images of one colour: u is the same everywhere, and no share of the scan may be put down to it."""
    layout, rows = Layout(2, 4), rows_of(2, 4)
    rows[..., layout.u] = 0.5
    fit, energy = fitted(rows, layout, 2, skip=True)
    without, expected = fitted(rows, layout, 2, skip=False)
    assert energy == pytest.approx(expected, abs=1e-6) and float(fit.s.abs().max()) < 1e-3
    torch.testing.assert_close(predicted(fit, rows, layout), predicted(without, rows, layout), rtol=1e-4, atol=1e-4)


def test_full_rank_is_least_squares_over_all_directions_and_the_skip():
    layout = Layout(3, 4)
    rows = rows_of(3, 4)
    fit, _ = fitted(rows, layout, 4)
    Z, Y = rows[0, :, layout.z()].numpy(), rows[0, :, layout.y].numpy()
    with_one = np.c_[Z, np.ones(len(Z))]
    expected = with_one @ np.linalg.lstsq(with_one, Y, rcond=None)[0]
    np.testing.assert_allclose(predicted(fit, rows, layout).numpy(), expected, atol=1e-6)


def test_the_directions_are_fitted_together():
    """Two directions that see the same input: fitted apart each would explain all of it, and their sum twice that."""
    layout = Layout(2, 3)
    rows = rows_of(2, 3, noise=0.0)
    rows[0, :, layout.z(1)] = rows[0, :, layout.z(0)] + 0.01 * normal(200, 3, seed=9)
    rows[0, :, layout.y] = rows[0, :, layout.z(0)]
    fit, energy = fitted(rows, layout, 3, ridges=(1e-9,))
    assert energy > 0.999
    error = predicted(fit, rows, layout) - rows[0, :, layout.y]
    assert error.abs().max() < 0.05


def test_the_skip_is_found():
    layout = Layout(2, 4)
    rows = rows_of(2, 4, noise=0.0)
    s = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    low, _ = fitted(rows, layout, 2, skip=True)
    rows[0, :, layout.y] = predicted(low, rows, layout) + (s - low.s) * rows[0, :, layout.u]
    fit, energy = fitted(rows, layout, 2, skip=True)
    assert energy == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(fit.s, s, atol=0.02, rtol=0.02)


def test_what_a_layer_norm_absorbs_does_not_count():
    layout = Layout(2, 4)
    rows = rows_of(2, 4)
    shifted = rows.clone()
    shifted[0, :, layout.y] += 10 * normal(200, 1, seed=5)
    plain, shifted_fit = (fitted(r, layout, 2, project=True, skip=True)[0] for r in (rows, shifted))
    torch.testing.assert_close(plain.V, shifted_fit.V, atol=1e-8, rtol=1e-6)
    assert fitted(shifted, layout, 2)[1] > fitted(shifted, layout, 2, project=True)[1] - 1.0
    assert plain.V.sum(1).abs().max() < 1e-9  # nothing is spent on it


@pytest.mark.parametrize("parts", [4, 50])
def test_streamed_sums_equal_those_of_one_batch(parts):
    layout = Layout(2, 3)
    rows = rows_of(2, 3)
    one, many = summed(rows, layout.width), Sums(1, layout.width, torch.device("cpu"))
    for half, part in enumerate(rows.chunk(2, dim=1)):
        for piece in part.chunk(parts // 2, dim=1):
            many.add(piece, half)
    torch.testing.assert_close(many.halves, one.halves, rtol=1e-12, atol=1e-9)
    found, expected = (fit_low_rank(s, layout, 2, weightings=weightings(layout, True), skip=True)[0][0] for s in (many, one))
    torch.testing.assert_close(found.V, expected.V, rtol=1e-6, atol=1e-8)


def test_eigenvectors_have_fixed_signs():
    """Else the same data would give W and V of other signs, and other bytes, with another LAPACK."""
    gram = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors = least_squares._leading(gram @ gram.T, 4)
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_same_sums_give_the_same_bytes():
    layout = Layout(2, 4)
    a, b = (fitted(rows_of(2, 4), layout, 2, project=True, skip=True, ridges=RIDGES)[0] for _ in range(2))
    for name in ("W", "V", "s", "b"):
        assert torch.equal(getattr(a, name), getattr(b, name))


def test_more_rank_explains_more_and_auto_takes_the_least_that_is_enough():
    layout = Layout(2, 8)
    rows = rows_of(2, 8, noise=0.05)
    energies = {r: fitted(rows, layout, r, ridges=RIDGES)[1] for r in (1, 2, 4, 8)}
    assert list(energies.values()) == sorted(energies.values())
    sums = summed(rows, layout.width)
    for rank, energy in energies.items():
        assert auto_rank(sums, layout, energy - 1e-6, weightings=weightings(layout), skip=False) == rank
    assert auto_rank(sums, layout, 1.0, weightings=weightings(layout), skip=False) == 8


def test_the_ridge_is_judged_on_the_other_half():
    """As many variables as rows and pure noise: the largest ridge errs least on data it has not seen."""
    layout = Layout(4, 6)
    rows = rows_of(4, 6, rows=60, noise=0.0)
    rows[0, :, layout.y] = normal(60, 6, seed=7)
    chosen, _ = fitted(rows, layout, 2, ridges=(1e-9, 10.0))
    small, _ = fitted(rows, layout, 2, ridges=(1e-9,))
    assert predicted(chosen, rows, layout).std() < 0.5 * predicted(small, rows, layout).std()
    plain = rows_of(4, 6, noise=0.0)  # nothing but the map itself: now the smallest errs least
    chosen, _ = fitted(plain, layout, 6, ridges=(1e-9, 10.0))
    left = predicted(chosen, plain, layout) - plain[0, :, layout.y]
    assert left.abs().max() < 1e-4


# -- refitted linear layers -------------------------------------------------------------------------------------------


def refit_rows(error: Tensor, x: Tensor) -> Sums:
    rows = torch.cat([x, error, torch.ones(len(x), 1, dtype=torch.float64)], 1)[None]
    return summed(rows, rows.shape[-1])


def test_a_layer_without_error_stays_as_it_is():
    change, bias, left = refit_linear(refit_rows(torch.zeros(100, 3, dtype=torch.float64), normal(100, 5)), 5, RIDGES)
    assert not change.any() and not bias.any() and left == 1.0


def test_a_linear_error_is_removed():
    x, change, bias = normal(100, 5), normal(3, 5, seed=1), normal(3, seed=2)
    found, found_bias, left = refit_linear(refit_rows(x @ change.T + bias, x), 5, NO_RIDGE)
    torch.testing.assert_close(found, change)
    torch.testing.assert_close(found_bias, bias)
    assert left < 1e-12


def test_noise_is_not_learned():
    x = normal(40, 30)
    change, _, _ = refit_linear(refit_rows(normal(40, 3, seed=3), x), 30, (1e-9, 100.0))
    free, _, _ = refit_linear(refit_rows(normal(40, 3, seed=3), x), 30, (1e-9,))
    assert change.norm() < 0.2 * free.norm()


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_a_map_of_one_position_is_fitted(rank):
    """There all directions scan the same, and two images give two rows for 4 * rank columns: the Gram matrix is singular."""
    layout = Layout(4, 24)
    one = rows_of(1, 24, rows=2)
    rows = torch.cat([one[..., :24]] * 3 + [one], dim=2)
    fit, energy = fitted(rows, layout, rank, project=True, skip=True, ridges=RIDGES)
    assert bool(torch.isfinite(predicted(fit, rows, layout)).all()) and 0.0 <= energy <= 1.0


def test_errors_count_by_the_metric():
    """Rank 1 under e^T G e: the dense solution for Y root, mapped back."""
    layout = Layout(1, 5)
    rows = rows_of(1, 5)
    G = torch.diag(torch.tensor([0.0, 1.0, 4.0, 0.5, 2.0], dtype=torch.float64)) + 0.1 * torch.ones(5, 5, dtype=torch.float64)
    [weighting] = weightings(layout, weights=G)
    one = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(weighting.root @ weighting.root, G + 0.1 * G.diagonal().mean() * one)
    torch.testing.assert_close(weighting.root @ weighting.inverse, one)
    fit, energy = fitted(rows, layout, 1, weights=G)
    Z, Y = (rows[0, :, part] - rows[0, :, part].mean(0) for part in (layout.z(), layout.y))
    expected = torch.from_numpy(dense_low_rank(Z.numpy(), (Y @ weighting.root).numpy(), 1))
    found = predicted(fit, rows, layout) - rows[0, :, layout.y].mean(0)
    torch.testing.assert_close(found, expected @ weighting.inverse, atol=1e-7, rtol=1e-6)
    error = (Y - found) @ weighting.root
    assert energy == pytest.approx(1 - float(error.square().sum() / (Y @ weighting.root).square().sum()), abs=1e-9)


def test_at_full_rank_no_metric_makes_a_difference():
    layout = Layout(2, 4)
    rows = rows_of(2, 4)
    G = normal(4, 4, seed=3) @ normal(4, 4, seed=3).T
    (plain, _), (weighted, _) = fitted(rows, layout, 4), fitted(rows, layout, 4, weights=G)
    torch.testing.assert_close(predicted(plain, rows, layout), predicted(weighted, rows, layout), atol=1e-5, rtol=1e-5)


def test_what_the_layer_norm_absorbs_stays_out_of_the_metric():
    layout = Layout(2, 4)
    rows = rows_of(2, 4)
    G = normal(4, 4, seed=3) @ normal(4, 4, seed=3).T
    fit, _ = fitted(rows, layout, 2, project=True, skip=True, weights=G)
    assert fit.V.sum(1).abs().max() < 1e-9 and fit.b.sum().abs() < 1e-9
    assert weightings(layout, True, torch.zeros(4, 4, dtype=torch.float64))[0].root.equal(weightings(layout, True)[0].root)


def test_a_linear_layer_stays_where_every_change_does_harm():
    rows = torch.cat([normal(1, 40, 30), normal(1, 40, 4, seed=1), torch.ones(1, 40, 1, dtype=torch.float64)], 2)
    change, bias, left = refit_linear(summed(rows, 35), 30, (1e-9, 1e-8))
    assert not change.any() and not bias.any() and left == 1.0
