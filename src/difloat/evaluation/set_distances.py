"""Distances between two sets of pictures, on their features `[n, d]`: Fréchet and kernel distance, with intervals.

They are computed in float64 on the CPU, from the output of any feature network. Intervals are 95 % bootstrap intervals over
pictures and depend only on their seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from difloat.evaluation.picture_metrics import NORMAL_95, Estimate

Moments = tuple[Tensor | np.ndarray, Tensor | np.ndarray]
"""The mean `[d]` and covariance `[d, d]` of a set of features."""


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean `[d]` and unbiased covariance `[d, d]` of features `[n, d]`, in float64 on the CPU.

    >>> mean, covariance = moments(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    >>> mean.tolist(), covariance.tolist()
    ([1.0, 2.0], [[2.0, 4.0], [4.0, 8.0]])
    """
    exact = _features(features)
    return exact.mean(0), torch.cov(exact.T).reshape(exact.shape[1], exact.shape[1])


def frechet(features_a: Tensor, features_b: Tensor) -> float:
    """The Fréchet distance of two feature sets `[n, d]` and `[m, d]`, taken as Gaussians (FID, arXiv:1706.08500 Eq. 6).

    It is biased upwards by a term of order d / n (arXiv:1911.07023), so only values of the same n may be compared.

    >>> features = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    >>> round(frechet(features, features + 2.0), 3)                        # 3 channels, each moved by 2
    12.0
    """
    return frechet_from_moments(*moments(features_a), *moments(features_b))


def frechet_from_moments(
    mean_a: Tensor | np.ndarray,
    cov_a: Tensor | np.ndarray,
    mean_b: Tensor | np.ndarray,
    cov_b: Tensor | np.ndarray,
) -> float:
    """The Fréchet distance of two Gaussians: `|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((AB)^(1/2))`, in float64.

    The last trace is the sum of the singular values of `A^(1/2) B^(1/2)`. This is exact for singular covariances too, so
    nothing is added to the diagonal. A result that rounding puts below zero is returned as 0.

    >>> frechet_from_moments(torch.zeros(2), torch.eye(2), torch.ones(2), torch.eye(2))
    2.0

    Args:
        mean_a: The mean `[d]` of the first Gaussian.
        cov_a: The symmetric positive semidefinite covariance `[d, d]` of the first Gaussian.
        mean_b: The mean `[d]` of the second Gaussian.
        cov_b: The covariance `[d, d]` of the second Gaussian.

    Raises:
        ValueError: if the shapes differ.
    """
    if (
        mean_a.shape != mean_b.shape
        or cov_a.shape != cov_b.shape
        or cov_a.shape != (len(mean_a), len(mean_a))
    ):
        shapes = [tuple(x.shape) for x in (mean_a, cov_a, mean_b, cov_b)]
        raise ValueError(
            f"moments must be means [d] and covariances [d, d] of one d, got shapes {shapes}; "
            "use the same feature network for both sets."
        )
    return _frechet_to_root(_exact(mean_a), _exact(cov_a), _fixed_side((mean_b, cov_b)))


def frechet_interval(
    features_a: Tensor,
    features_b: Tensor | Moments,
    *,
    paired: bool = False,
    resamples: int = 100,
    seed: int = 0,
) -> Estimate:
    """The Fréchet distance with a bootstrap interval for its expectation at this number of samples.

    >>> features = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    >>> estimate = frechet_interval(features, features + 2.0, paired=True)
    >>> round(estimate.value, 3), estimate.low <= estimate.value <= estimate.high
    (12.0, True)

    The distance is biased upwards by a term of order d / n, and resampling adds that bias once more. A percentile interval
    would hence lie too high, often above the estimate itself. A basic interval (`2 value - quantile`) would lie too low,
    since it aims at the distance of infinitely many samples. All methods are compared at one n and share the bias, so the
    interval is `value +- 1.96 standard errors`, cut at 0. The standard error comes from the bootstrap. A shift of the draws
    does not touch it, and 100 resamples are enough for it, where tail quantiles would need thousands.

    Args:
        features_a: The first features `[n, d]`.
        features_b: The second features `[m, d]`, or the fixed `(mean, covariance)` of a data set.
        paired: Whether row i of both sets comes from the same seed, so that both are resampled with the same indices.
        resamples: How many bootstrap resamples are drawn.
        seed: The seed of the resampling.
    """
    a = _features(features_a)
    if isinstance(features_b, tuple):
        value = frechet_from_moments(*moments(a), *features_b)
        return _standard_error_interval(value, _frechet_draws(a, features_b, resamples, seed), floor=0.0)
    b = _features(features_b)
    value = frechet(a, b)
    weights_a = _bootstrap_weights(len(a), resamples, seed)
    weights_b = weights_a if paired else _bootstrap_weights(len(b), resamples, seed + 1)
    _check_pairs(a, b, paired)
    pairs = zip(_weighted_moments(a, weights_a), _weighted_moments(b, weights_b), strict=True)
    return _standard_error_interval(value, [frechet_from_moments(*x, *y) for x, y in pairs], floor=0.0)


def frechet_ratio_interval(
    features_quantized: Tensor,
    features_reference: Tensor,
    data_moments: Moments,
    *,
    resamples: int = 100,
    seed: int = 0,
) -> Estimate:
    """The ratio of the quantized to the full-precision Fréchet distance to data, with a paired bootstrap interval.

    >>> features = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    >>> data = (torch.ones(3), torch.eye(3))
    >>> frechet_ratio_interval(features, features, data)
    Estimate(value=1.0, low=1.0, high=1.0)

    Both sets come from the same seeds and are resampled with the same indices. So the luck of the drawn prompts and noises
    cancels, and the interval is much narrower than those of the two distances.

    Args:
        features_quantized: The features `[n, d]` of the quantized model.
        features_reference: The features `[n, d]` of the full-precision model, whose row i comes from the same seed.
        data_moments: The mean and covariance of the data's features.
        resamples: How many bootstrap resamples are drawn.
        seed: The seed of the resampling.

    Raises:
        ValueError: if the sets are not pairs, or the full-precision distance is 0.
    """
    quantized, reference = _features(features_quantized), _features(features_reference)
    _check_pairs(quantized, reference, paired=True)
    below = frechet_from_moments(*moments(reference), *data_moments)
    if below == 0.0:
        raise ValueError("the full-precision Fréchet distance to data must be above 0 for a ratio, got 0.")
    above = frechet_from_moments(*moments(quantized), *data_moments)
    draws_above = _frechet_draws(quantized, data_moments, resamples, seed)
    draws_below = _frechet_draws(reference, data_moments, resamples, seed)
    draws = [x / y for x, y in zip(draws_above, draws_below, strict=True)]
    return _standard_error_interval(above / below, draws, floor=0.0)


def kernel_distance(features_a: Tensor, features_b: Tensor, *, paired: bool = False) -> float:
    """The kernel distance (KID, arXiv:1801.01401), which is the unbiased squared MMD with the kernel `(x.y / d + 1)^3`.

    Because it is unbiased, it may be slightly negative, and may be compared across numbers of samples.

    >>> features = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    >>> kernel_distance(features, features, paired=True)
    0.0

    Args:
        features_a: The first features `[n, d]`.
        features_b: The second features `[m, d]`.
        paired: Whether row i of both sets comes from the same seed. Those dependent pairs are left out of the cross term
            (arXiv:0805.2368 Eq. 4), or two identical sets would have a negative distance instead of 0.
    """
    a, b = _features(features_a), _features(features_b)
    _check_pairs(a, b, paired)
    ones_a, ones_b = (torch.ones(1, len(x), dtype=torch.float64) for x in (a, b))
    return _kernel_draws(a, b, ones_a, ones_b, paired).item()


def kernel_interval(
    features_a: Tensor, features_b: Tensor, *, paired: bool = False, resamples: int = 100, seed: int = 0
) -> Estimate:
    """The kernel distance with its bootstrap interval, `value +- 1.96 standard errors`.

    A picture that a resample holds twice is not paired with itself, so the draws stay unbiased.

    >>> features = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    >>> kernel_interval(features, features, paired=True).value
    0.0

    Args:
        features_a: The first features `[n, d]`.
        features_b: The second features `[m, d]`.
        paired: Whether row i of both sets comes from the same seed, as in `kernel_distance`.
        resamples: How many bootstrap resamples are drawn.
        seed: The seed of the resampling.
    """
    a, b = _features(features_a), _features(features_b)
    _check_pairs(a, b, paired)
    weights_a = _bootstrap_weights(len(a), resamples, seed)
    weights_b = weights_a if paired else _bootstrap_weights(len(b), resamples, seed + 1)
    draws = _kernel_draws(a, b, weights_a, weights_b, paired).tolist()
    return _standard_error_interval(kernel_distance(a, b, paired=paired), draws)


def _features(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"features must be [n, d] with at least 2 samples, got shape {tuple(features.shape)}; generate more."
        )
    if not bool(features.isfinite().all()):
        raise ValueError(
            "features must be finite, got NaN or infinity; check the pictures and the feature network."
        )
    return features.detach().cpu().double()


def _check_pairs(a: Tensor, b: Tensor, paired: bool) -> None:
    if paired and a.shape != b.shape:
        raise ValueError(f"paired features must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}.")


def _bootstrap_weights(n: int, resamples: int, seed: int) -> Tensor:
    """How often every resample draws every sample, `[resamples, n]`."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(n, (n,), generator=generator).bincount(minlength=n) for _ in range(resamples)]
    return torch.stack(rows).double()


def _weighted_moments(features: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    n = len(features)
    for row in weights:
        mean = row @ features / n  # [d]
        centred = (features - mean) * row.sqrt()[:, None]  # [n, d]
        yield mean, centred.T @ centred / (n - 1)


def _exact(values: Tensor | np.ndarray) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


def _root(cov: Tensor) -> Tensor:
    """The symmetric square root. Rounding makes zero eigenvalues slightly negative, and those count as 0."""
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _fixed_side(side: Moments) -> tuple[Tensor, Tensor, float]:
    """The mean, root and trace of the set that stays the same over many draws."""
    mean, cov = _exact(side[0]), _exact(side[1])
    return mean, _root(cov), cov.trace().item()


def _frechet_to_root(mean: Tensor, cov: Tensor, fixed: tuple[Tensor, Tensor, float]) -> float:
    fixed_mean, fixed_root, fixed_trace = fixed
    overlap = torch.linalg.svdvals(_root(cov) @ fixed_root).sum()  # tr((AB)^(1/2))
    distance = (mean - fixed_mean).square().sum() + cov.trace() + fixed_trace - 2 * overlap
    return max(distance.item(), 0.0)


def _frechet_draws(features: Tensor, fixed: Moments, resamples: int, seed: int) -> list[float]:
    side = _fixed_side(fixed)
    weights = _bootstrap_weights(len(features), resamples, seed)
    return [_frechet_to_root(mean, cov, side) for mean, cov in _weighted_moments(features, weights)]


def _kernel_draws(a: Tensor, b: Tensor, weights_a: Tensor, weights_b: Tensor, paired: bool) -> Tensor:
    within_a = _kernel_mean(a, a, weights_a, weights_a, skip_diagonal=True)
    within_b = _kernel_mean(b, b, weights_b, weights_b, skip_diagonal=True)
    return within_a + within_b - 2 * _kernel_mean(a, b, weights_a, weights_b, skip_diagonal=paired)


def _kernel_mean(
    a: Tensor, b: Tensor, weights_a: Tensor, weights_b: Tensor, *, skip_diagonal: bool
) -> Tensor:
    """The weighted mean of the kernel over all pairs, `[resamples]`, in blocks of rows of the n x m matrix."""
    total = torch.zeros(len(weights_a), dtype=torch.float64)
    for start in range(0, len(a), 1000):
        rows = slice(start, start + 1000)
        kernel = (a[rows] @ b.T / a.shape[1] + 1) ** 3  # [rows, m]
        if skip_diagonal:
            kernel.diagonal(offset=start).zero_()
        total += (weights_a[:, rows] @ kernel * weights_b).sum(1)  # [resamples]
    pairs = weights_a.sum(1) * weights_b.sum(1)
    return total / (pairs - (weights_a * weights_b).sum(1) if skip_diagonal else pairs)


def _standard_error_interval(value: float, draws: Sequence[float], floor: float = -float("inf")) -> Estimate:
    margin = NORMAL_95 * torch.tensor(draws, dtype=torch.float64).std().item()
    return Estimate(value, max(value - margin, floor), value + margin)
