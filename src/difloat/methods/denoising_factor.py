"""How much an error of the denoiser's output moves the sampler: the weights of MSFP's DFA loss (arXiv:2505.21591).

For the ancestral step of DDPM the paper's factor is ``(1 - a_t) / (sqrt(a_t) sqrt(1 - abar_t))``. Every sampler's step is an
affine function of the denoiser's output, so the factor is read off the step of the scheduler in use, whichever it is and
whatever its output stands for (noise, velocity, sample, flow).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_PROBES = 64  # values of the sample that a step is tried on


def denoising_factors(scheduler: Any, steps: int, **timestep_arguments: Any) -> dict[float, float]:
    """The factor of the denoiser's output in every step, by timestep as the scheduler names it, in the sampler's order.

    Multistep schedulers use an output again in later steps; what counts is the step that is taken with it.

    Args:
        scheduler: Of diffusers; stays untouched.
        steps: Sampler steps.
        timestep_arguments: Further arguments of `set_timesteps`, such as `mu`.

    Raises:
        ValueError: if a step is no affine function of the output (a scheduler that thresholds samples, say).
    """
    probe = copy.deepcopy(scheduler)
    probe.set_timesteps(steps, **timestep_arguments)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 1, 1, _PROBES, generator=generator, dtype=torch.float64)
    output = torch.zeros_like(sample)
    factors: dict[float, float] = {}
    for timestep in probe.timesteps:
        moved = [_step(copy.deepcopy(probe), output + size, timestep, sample) for size in (0.0, 0.5, 1.0)]
        half, whole = (float((other - moved[0]).mean()) for other in moved[1:])
        if abs(whole - 2 * half) > 1e-3 * max(abs(whole), 1e-6):
            raise ValueError(
                f"a step of {type(scheduler).__name__} must be affine in the denoiser's output, but is not at timestep "
                f"{float(timestep):g}; switch off thresholding or clipping of samples"
            )
        factors[float(timestep)] = abs(whole)
        sample = _step(probe, output, timestep, sample)
    return factors


def _step(scheduler: Any, output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    scale = getattr(scheduler, "scale_model_input", None)
    if scale is not None:
        scale(sample, timestep)  # some schedulers insist on having been asked
    arguments: dict[str, Any] = {"return_dict": False}
    if "generator" in inspect.signature(scheduler.step).parameters:
        arguments["generator"] = torch.Generator().manual_seed(1)  # the same noise whatever the output
    result: Tensor = scheduler.step(output, timestep, sample, **arguments)[0]
    return result


def normalised(factors: Mapping[float, float]) -> dict[float, float]:
    """Factors with mean 1, so that a learning rate means the same for every sampler."""
    mean = sum(factors.values()) / len(factors)
    return {timestep: value / mean for timestep, value in factors.items()}
