"""Least squares from streamed sums: what a rank-r scan, a refitted linear layer and a refitted LayerNorm are solved from.

Rows are observations (a position of an image), columns are variables. Nothing but the columns' Gram matrix is kept, in
float64 and for two halves of the images apart, so memory does not depend on the number of images, and every ridge can be
judged on the half that it was not fitted to. All solves are float64 and deterministic.

Rank-r scan of one site. Z_k (n, D) is the shared-decay scan of u in direction k, linear in u; Y (n, D) the true scan,
summed over the K directions where they are merged; U (n, D) the un-scanned map that the D skip reads::

    Y ~ sum_k Z_k W_k^T V_k^T + U diag(s) + 1 b^T         W_k (r, D), V_k (D, r), s (D,), b (D,)

``s`` costs nothing at run time: it goes into the D of the skip. An error e (D,) of one position counts as e^T G e
(:class:`Weighting`): G = 1, less what is constant over the channels where a LayerNorm over them follows, or the model's own
sensitivity (:mod:`.sensitivity`).

Ridge rule: lambda times the mean diagonal of the regressors' Gram matrix, lambda the value of ``RIDGES`` with the least
error on the other half, both halves taking turns. For a rank-r scan that error is the one of the map of full rank, which
needs no eigenvectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-5, 1e-3, 1e-2)
AUTO_RANKS = (1, 2, 4, 8, 16)
_SWEEPS = 2
_POLISH = 8
_FLOOR = 0.1


def halves_of(items: int, batch_index: int, step: int) -> Iterator[tuple[int, slice]]:
    """(half, items) of a batch for :class:`Sums`, at most ``step`` items at a time.

    Halves of the batch, so that windows of one image stay together; batches of a single item take turns.
    """
    middle = items // 2 if items > 1 else (batch_index + 1) % 2
    for half, (start, stop) in enumerate(((0, middle), (middle, items))):
        for low in range(start, stop, step):
            yield half, slice(low, min(low + step, stop))


class Sums:
    """Gram matrices of rows (heads, n, width), one for each half of the images."""

    def __init__(self, heads: int, width: int, device: torch.device) -> None:
        self.halves = torch.zeros(2, heads, width, width, dtype=torch.float64, device=device)

    def add(self, rows: Tensor, half: int) -> None:
        """``rows`` (heads, n, width) in float64."""
        self.halves[half].baddbmm_(rows.transpose(1, 2), rows)

    @property
    def whole(self) -> Tensor:
        return self.halves[0] + self.halves[1]

    def splits(self) -> list[tuple[Tensor, Tensor]]:
        """(fit, judge) Gram matrices, both halves in turn; empty where one half has no rows."""
        a, b = self.halves[0], self.halves[1]
        if not (bool(a[:, -1, -1].min() > 0) and bool(b[:, -1, -1].min() > 0)):
            return []
        return [(a, b), (b, a)]


@dataclass(frozen=True)
class Layout:
    """Columns of a site's rows: [Z_1 .. Z_K | U | Y | 1], each block ``channels`` wide."""

    sources: int
    channels: int

    @property
    def width(self) -> int:
        return (self.sources + 2) * self.channels + 1

    def z(self, k: int | None = None) -> slice:
        D = self.channels
        return slice(0, self.sources * D) if k is None else slice(k * D, (k + 1) * D)

    @property
    def u(self) -> slice:
        return slice(self.sources * self.channels, (self.sources + 1) * self.channels)

    @property
    def y(self) -> slice:
        return slice((self.sources + 1) * self.channels, (self.sources + 2) * self.channels)


@dataclass(frozen=True)
class LowRank:
    """W (K, r, D), V (K, D, r), s (D,), b (D,) of one head."""

    W: Tensor
    V: Tensor
    s: Tensor
    b: Tensor


@dataclass(frozen=True)
class Weighting:
    """How errors of D channels count: e^T G e, G = root root with root (D, D) symmetric, ``inverse`` its (pseudo-)inverse."""

    root: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, channels: int, *, project: bool, device: torch.device, weights: Tensor | None = None) -> Weighting:
        """``project``: what is constant over the channels does not count. ``weights`` (D, D): G up to its scale; every
        direction counts at least ``_FLOOR`` times their mean."""
        P = torch.eye(channels, dtype=torch.float64, device=device)
        if project:
            P -= 1.0 / channels
        if weights is None or not bool(weights.any()):
            return cls(P, P)
        G = P @ weights @ P
        values, vectors = torch.linalg.eigh(G + _FLOOR * G.diagonal().mean() * P)
        counts = values > 1e-3 * _FLOOR * values.mean()
        root = torch.where(counts, values, 0.0).sqrt()
        inverse = torch.where(counts, values, torch.inf).rsqrt()
        return cls((vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T)


class _Problem:
    """One head's normal equations with the constant column removed; what is fitted is Y root, where errors count alike."""

    def __init__(self, gram: Tensor, layout: Layout, weighting: Weighting) -> None:
        self.layout = layout
        self.weighting = weighting
        rows = gram[-1, -1].clamp_min(1.0)
        self.means = gram[-1, :-1] / rows
        full = gram[:-1, :-1] - rows * torch.outer(self.means, self.means)
        z, u, y = layout.z(), layout.u, layout.y
        self.root = weighting.root
        G = self.root @ self.root
        self.ZZ, self.ZU, self.UU = full[z, z], full[z, u], full[u, u] * G
        self.ZY, self.UY = full[z, y] @ self.root, (full[u, y] * G).sum(1)
        self.total = float((full[y, y] * G).sum())

    def loss(self, M: Tensor, s: Tensor) -> float:
        """Sum of squared residuals of Y root ~ Z M + U diag(s) root, M (K*D, D)."""
        cross = (M * (self.ZY - (self.ZU * s) @ self.root)).sum() + s @ self.UY
        square = (M * (self.ZZ @ M)).sum() + s @ (self.UU @ s)
        return float(self.total - 2.0 * cross + square)


def _penalty(gram: Tensor, ridge: float) -> Tensor:
    mean = gram.diagonal().mean()
    return ridge * torch.where(mean > 0, mean, 1.0)  # where nothing varies, nothing is fitted to it


def _cholesky(gram: Tensor, ridge: float) -> Tensor:
    """Where rounding leaves a singular Gram matrix indefinite (fewer rows than columns), with as much more as that takes."""
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(5):
        factor, failed = torch.linalg.cholesky_ex(gram + _penalty(gram, ridge) * eye)
        if not failed:
            return factor
        ridge = max(100.0 * ridge, 1e-12)
    return torch.linalg.cholesky(gram + _penalty(gram, ridge) * eye)


def _leading(gram: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading eigenvectors (D, rank) of a symmetric matrix, signs fixed."""
    vectors = torch.linalg.eigh(gram)[1][:, -rank:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


class _Solver:
    """Block coordinate descent over the directions: each step is the best rank-r map of Z_k to what the others leave."""

    def __init__(self, problem: _Problem, ridge: float, skip: bool) -> None:
        self.p = problem
        self.layout = problem.layout
        self.skip = skip
        K = self.layout.sources
        own = [problem.ZZ[self.layout.z(k), self.layout.z(k)] for k in range(K)]
        self.chol = [_cholesky(gram, ridge) for gram in own]
        self.penalty = torch.cat([_penalty(gram, ridge).expand(len(gram)) for gram in own])
        self.skip_chol = _cholesky(problem.UU, max(ridge, 1e-9)) if skip else None

    def run(self, rank: int, sweeps: int = _SWEEPS, polish: int = _POLISH) -> tuple[Tensor, Tensor, Tensor]:
        """W (K*D, K*r) block diagonal, V (D, K*r) of Y root, s (D,)."""
        p, K, D = self.p, self.layout.sources, self.layout.channels
        W = p.ZZ.new_zeros(K * D, K * rank)
        V = p.ZZ.new_zeros(D, K * rank)
        s = p.ZZ.new_zeros(D)
        for _ in range(sweeps):
            for k in range(K):
                own, cols = self.layout.z(k), slice(k * rank, (k + 1) * rank)
                left = self._left(W, V, s, own, cols)
                ols = torch.cholesky_solve(left, self.chol[k])
                E = _leading(left.T @ ols, rank)
                W[own, cols], V[:, cols] = ols @ E, E
            s = self._skip(W, V)
            if K == 1 and not self.skip:
                break
        for _ in range(polish):
            V = self._readout(W, s)
            s = self._skip(W, V)
            if K == 1:
                continue
            for k in range(K):
                own, cols = self.layout.z(k), slice(k * rank, (k + 1) * rank)
                left = self._left(W, V, s, own, cols)
                Vk = V[:, cols]
                right = torch.cholesky_solve((left @ Vk).T, _cholesky(Vk.T @ Vk, 1e-12)).T
                W[own, cols] = torch.cholesky_solve(right, self.chol[k])
        if polish:
            V = self._readout(W, s)
        return W, V, s

    def _left(self, W: Tensor, V: Tensor, s: Tensor, own: slice, cols: slice) -> Tensor:
        """Z_k^T (what the other directions and the skip leave), (D, D)."""
        p = self.p
        others = W.clone()
        others[:, cols] = 0.0
        return p.ZY[own] - (p.ZZ[own] @ others) @ V.T - (p.ZU[own] * s) @ p.root

    def _readout(self, W: Tensor, s: Tensor) -> Tensor:
        p = self.p
        gram = W.T @ (p.ZZ @ W + self.penalty[:, None] * W)
        right = W.T @ (p.ZY - (p.ZU * s) @ p.root)
        return torch.cholesky_solve(right, _cholesky(gram, 1e-12)).T

    def _skip(self, W: Tensor, V: Tensor) -> Tensor:
        if self.skip_chol is None:
            return V.new_zeros(len(V))
        p = self.p
        right = p.UY - ((W.T @ p.ZU) * (p.root @ V).T).sum(0)
        return torch.cholesky_solve(right[:, None], self.skip_chol)[:, 0]


def fit_low_rank(
    sums: Sums, layout: Layout, rank: int, *, weightings: Sequence[Weighting], skip: bool = True, bias: bool = True,
    ridges: tuple[float, ...] = RIDGES,
) -> tuple[list[LowRank], float]:  # fmt: skip
    """The fit of every head, and the share of the scan's energy (about its mean, in the weighting) that it explains."""
    ridge = _best_ridge(sums, layout, weightings, ridges)
    fits: list[LowRank] = []
    left = total = 0.0
    for gram, weighting in zip(sums.whole, weightings, strict=True):
        problem = _Problem(gram, layout, weighting)
        W, V, s = _Solver(problem, ridge, skip).run(rank)
        left += max(problem.loss(W @ V.T, s), 0.0)
        total += problem.total
        fits.append(_unpacked(problem, W, V, s, rank, bias))
    return fits, 1.0 - left / total if total > 0 else 1.0


def _best_ridge(sums: Sums, layout: Layout, weightings: Sequence[Weighting], ridges: tuple[float, ...]) -> float:
    splits = sums.splits()
    if len(ridges) == 1 or not splits:
        return ridges[-1]
    errors = [0.0] * len(ridges)
    for fit, judge in splits:
        for a, b, weighting in zip(fit, judge, weightings, strict=True):
            known, held_out = _Problem(a, layout, weighting), _Problem(b, layout, weighting)
            for i, ridge in enumerate(ridges):
                M = torch.cholesky_solve(known.ZY, _cholesky(known.ZZ, ridge))
                errors[i] += held_out.loss(M, M.new_zeros(layout.channels))
    return ridges[errors.index(min(errors))]


def _unpacked(problem: _Problem, W: Tensor, V: Tensor, s: Tensor, rank: int, bias: bool) -> LowRank:
    """Per direction, with W_k of unit rows, so that half precision can hold the hidden channels."""
    layout, K, D = problem.layout, problem.layout.sources, problem.layout.channels
    V = problem.weighting.inverse @ V
    Ws, Vs = [], []
    for k in range(K):
        Q, R = torch.linalg.qr(V[:, k * rank : (k + 1) * rank])
        w = R @ W[layout.z(k), k * rank : (k + 1) * rank].T  # (r, D)
        norm = w.norm(dim=1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        Ws.append(w / norm)
        Vs.append(Q * norm.T)
    b = s.new_zeros(D)
    if bias:
        means = problem.means
        b = problem.weighting.inverse @ problem.root @ (means[layout.y] - (means[layout.z()] @ W) @ V.T - means[layout.u] * s)
    return LowRank(torch.stack(Ws), torch.stack(Vs), s, b)


def auto_rank(sums: Sums, layout: Layout, energy: float, *, weightings: Sequence[Weighting], skip: bool) -> int:
    """The least of ``AUTO_RANKS`` whose fit explains ``energy`` of the scan; the largest where none does."""
    ranks = [r for r in AUTO_RANKS if r <= layout.channels]
    ridge = _best_ridge(sums, layout, weightings, RIDGES)
    for rank in ranks[:-1]:
        if fit_low_rank(sums, layout, rank, weightings=weightings, skip=skip, ridges=(ridge,))[1] >= energy:
            return rank
    return ranks[-1]


def refit_linear(sums: Sums, inputs: int, ridges: tuple[float, ...]) -> tuple[Tensor, Tensor, float]:
    """Changes of a linear layer's weight (out, in) and bias (out,) that leave the least of its error, drawn towards none.

    ``sums``: one head of rows [X | error | 1]; the error is what was wanted less what the layer gives. Returns the
    changes and the share of the squared error that is left. Nothing changes where there is no error, or where every ridge does
    harm on the half that it was not fitted to.
    """
    gram = sums.whole[0]
    before = float(gram[inputs:-1, inputs:-1].diagonal().sum())
    splits = sums.splits()
    best = ridges[-1]
    if splits and len(ridges) > 1:
        errors = [sum(_residual(*_ridge(fit[0], inputs, r), judge[0], inputs) for fit, judge in splits) for r in ridges]
        best = ridges[errors.index(min(errors))]
        if min(errors) >= before:  # worse on images it has not seen than no change
            return gram.new_zeros(gram.shape[0] - inputs - 1, inputs), gram.new_zeros(gram.shape[0] - inputs - 1), 1.0
    change, bias = _ridge(gram, inputs, best)
    share = _residual(change, bias, gram, inputs) / before if before > 0 else 1.0
    return change, bias, share


def _ridge(gram: Tensor, inputs: int, ridge: float) -> tuple[Tensor, Tensor]:
    rows = gram[-1, -1].clamp_min(1.0)
    means = gram[-1, :-1] / rows
    full = gram[:-1, :-1] - rows * torch.outer(means, means)
    solved = torch.cholesky_solve(full[:inputs, inputs:], _cholesky(full[:inputs, :inputs], ridge))  # (in, out)
    return solved.T, means[inputs:] - means[:inputs] @ solved


def _residual(change: Tensor, bias: Tensor, gram: Tensor, inputs: int) -> float:
    """Sum of squares of T' - X change^T - bias under a Gram matrix of [X | T' | 1]."""
    coefficients = torch.cat([-change, torch.eye(len(change), dtype=gram.dtype, device=gram.device), -bias[:, None]], 1)
    return float(((coefficients @ gram) * coefficients).sum())
