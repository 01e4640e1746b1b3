"""Means with their bootstrap intervals."""

from __future__ import annotations

import torch
from torch import Tensor

from difloat.plan.validation import record


@record("estimate", finite=False)
class Estimate:
    """A value with its 95 % interval `low <= high`, in the unit of the metric.

    >>> Estimate(value=27.0, low=26.1, high=27.9).value
    27.0
    """

    value: float
    low: float
    high: float


def mean_interval(values: Tensor, *, resamples: int = 1000, seed: int = 0) -> Estimate:
    """The mean of per-picture values with its percentile bootstrap interval.

    A mean is unbiased, so the plain percentile interval fits. A single value has an interval of width 0.

    >>> estimate = mean_interval(torch.tensor([20.0, 22.0, 24.0]))
    >>> estimate.value, estimate.low, estimate.high
    (22.0, 20.0, 24.0)

    Args:
        values: One number per picture, `[n]`.
        resamples: How many bootstrap resamples are drawn.
        seed: The seed of the resampling.

    Raises:
        ValueError: if the values are not one number per picture.
    """
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"values must be one number per picture [n], got shape {tuple(values.shape)}.")
    exact = values.detach().cpu().double()
    generator = torch.Generator().manual_seed(seed)
    n = len(exact)
    means = torch.stack([exact[torch.randint(n, (n,), generator=generator)].mean() for _ in range(resamples)])
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(exact.mean().item(), low, high)
