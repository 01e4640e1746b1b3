"""Which timestep the denoiser is called with, for layers whose state depends on it.

The timestep is read off the denoiser's own arguments, never found by counting calls: guidance in two calls, profilers and
restarted samplers do not disturb it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

TIMESTEP_NAMES = (
    "timestep",
    "timesteps",
    "time_step",
    "t",
    "sigma",
    "sigmas",
    "time",
    "noise_labels",
    "noise_level",
    "c_noise",
    "log_snr",
)


@final
class Clock:
    """Forward pre-hook of a denoiser: notes which entry of a timestep grid is nearest to the call's timestep."""

    def __init__(self, module: nn.Module, grid: Sequence[float]) -> None:
        """For calls of `module`.

        Raises:
            ValueError: if its forward has no parameter that is a timestep by name.
        """
        names = list(inspect.signature(module.forward).parameters)
        self.name = next((name for name in TIMESTEP_NAMES if name in names), None)
        if self.name is None:
            raise ValueError(
                f"forward of {type(module).__name__} must have a parameter called {', '.join(TIMESTEP_NAMES[:4])} or the "
                "like, got none; a plan that depends on the timestep cannot be carried out on it"
            )
        self.position = names.index(self.name)
        self.grid = tuple(grid)
        self.index: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the timestep of one call; ValueError if its rows are nearest to different entries of the grid."""
        assert self.name is not None
        value = kwargs[self.name] if self.name in kwargs else args[self.position]
        timestep = torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1)
        grid = torch.tensor(self.grid, dtype=torch.float32, device=timestep.device)
        nearest = (timestep - grid).abs().argmin(dim=1)
        if not torch.compiler.is_compiling() and bool((nearest != nearest[0]).any()):
            raise ValueError(
                f"all rows of a call must have one timestep, got {timestep.flatten().tolist()[:4]}...; "
                "call the quantized model once per timestep"
            )
        self.index = nearest[0]

    def entry(self) -> Tensor:
        """Number of the nearest entry in the current call.

        Raises:
            RuntimeError: if the denoiser was not called yet.
        """
        if self.index is None:
            raise RuntimeError(
                "a layer that depends on the timestep must be called by its denoiser, got a call on its own; "
                "call the whole denoiser"
            )
        return self.index
