"""The proof that rows of different timesteps may share one call of a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from difloat.calibration.batch_axis import prediction, rows_in_lists

Batch = Callable[[Sequence[int]], tuple[tuple[Any, ...], Mapping[str, Any]]]

_SCALAR_TIMESTEP = (
    "a denoiser must take the timestep as a [batch] tensor (one entry per row), so that rows of different "
    "timesteps can be merged"
)
_OWN_ROWS = "a denoiser must return one result per row when it is called with single rows of its own calls"
_CALLING = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def check_mergeable(module: nn.Module, timesteps: Sequence[float], batch: Batch) -> None:
    """Prove that two rows of different timesteps give in one call what they give in two.

    If all rows have the same timestep, there is nothing to prove.

    Args:
        module: The denoiser.
        timesteps: The timestep of every calibration row.
        batch: A function that returns the arguments of some rows.

    Raises:
        ValueError: if the module takes only a scalar timestep, mixes the rows of a batch, or cannot be called with one row.
    """
    other = max(range(len(timesteps)), key=lambda row: abs(timesteps[row] - timesteps[0]))
    if timesteps[other] == timesteps[0]:
        return

    def output(rows: list[int]) -> list[Tensor]:
        args, kwargs = batch(rows)
        return list(prediction(module(*args, **kwargs), rows_in_lists(args, kwargs)))

    with torch.no_grad():
        try:
            apart = output([0]) + output([other])
        except _CALLING as error:
            raise ValueError(f"{_OWN_ROWS}, got {type(error).__name__}: {_first_line(error)}") from error
        try:
            merged = output([0, other])
        except _CALLING as error:
            raise ValueError(f"{_SCALAR_TIMESTEP} in one call, got: {_first_line(error)}") from error
    if len(apart) != 2:
        raise ValueError(
            f"{_OWN_ROWS}, got {len(apart)} results for two rows; what returns features is no denoiser"
        )
    if [row.shape for row in merged] != [row.shape for row in apart]:
        raise ValueError(f"{_SCALAR_TIMESTEP} in one call, got outputs of other shapes")
    # Half precision sums in another order for another batch size; a wrong timestep is far outside of this.
    tolerance = 1e-3 if merged[0].dtype in (torch.float32, torch.float64) else 5e-2
    both, alone = (torch.cat([row.double().flatten() for row in rows]) for rows in (merged, apart))
    difference = float((both - alone).norm() / alone.norm().clamp_min(1e-12))
    if difference > tolerance:
        raise ValueError(f"{_SCALAR_TIMESTEP} in one call, got outputs that differ by {difference:.2g}")
