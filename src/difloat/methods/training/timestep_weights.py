"""The weight of a timestep's error in the loss: MSFP's DFA (arXiv:2505.21591).

For the ancestral step of DDPM the paper's factor is ``(1 - a_t) / (sqrt(a_t) sqrt(1 - abar_t))``. Every sampler's step is an
affine function of the denoiser's output. So the factor is read off the step of the scheduler in use, whichever it is and
whatever its output stands for (noise, velocity, sample, flow).

Some schedulers (Euler, Heun, EDM and their kin) keep the sample as ``x + sigma noise``, up to a hundred times as large as the
picture, and scale it only as the denoiser reads it. The move of such a sample in a step says how large the noise still is, and
nothing about the picture. So the factor is that of the sample as the denoiser will read it next, divided by
``sqrt(1 + sigma_next^2)``. In these coordinates, which are those of DDPM and DDIM, Euler's factor is DDIM's at the same noise
levels.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from difloat import torch_modes
from difloat.methods.task import Task

_CLIPPING = ("clip_sample", "clip_denoised", "thresholding")
# Errors of steps that take something else than a float sample.
_FAILURES = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_PROBES = 64  # values of a channel of the sample that a step is tried on
_WAY_OUT = "train without it: factor_power=0 (on the command line --set factor_power=0), for repair dfa=False (--no-dfa)"


def denoising_factors(
    scheduler: Any, steps: int | None = None, **timestep_arguments: Any
) -> dict[float, float]:
    """The factor of the denoiser's output in every step, by timestep as the scheduler names it, in the sampler's order.

    Samplers that call the denoiser several times at a timestep (PNDM, Heun) count with the mean of these calls. Where the
    scheduler was told the step that the pipeline's call begins with, as for image to image, the steps before it are left out.

    Multistep schedulers use an output again in later steps. The step that is taken with it counts. Clipping and thresholding
    of samples are left out, since the step is affine as far as they let it through.

    Args:
        scheduler: A scheduler of diffusers, which stays untouched.
        steps: The number of sampler steps to set first, or None for those that are set already.
        timestep_arguments: Further arguments of `set_timesteps`, such as `mu`.

    Raises:
        ValueError: if a step is no affine function of the output, or not one from output, timestep and sample to a sample.
    """
    return _by_timestep(_factors_of_calls(scheduler, steps, timestep_arguments))


def _by_timestep(calls: Sequence[tuple[float, float]]) -> dict[float, float]:
    """Mean factor of the calls at every timestep."""
    found: dict[float, list[float]] = {}
    for timestep, factor in calls:
        found.setdefault(timestep, []).append(factor)
    return {timestep: sum(factors) / len(factors) for timestep, factors in found.items()}


def _factors_of_calls(
    scheduler: Any, steps: int | None, timestep_arguments: Mapping[str, Any]
) -> list[tuple[float, float]]:
    """Timestep and factor of every call of the denoiser."""
    probe = _without_clipping(copy.deepcopy(scheduler))
    _check_step(probe)
    if steps is not None:
        probe.set_timesteps(steps, **timestep_arguments)
    if hasattr(probe, "noise_sampler"):  # Brownian noise, which no generator repeats
        probe.noise_sampler = _no_noise
    probe._step_index = None  # as before the first step, whatever the pipeline has asked it already
    timesteps = probe.timesteps[getattr(probe, "begin_index", None) or 0 :]
    learned = str(getattr(probe.config, "variance_type", "")).startswith("learned")
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 3, 1, _PROBES, generator=generator, dtype=torch.float64)
    output = torch.zeros(1, 6 if learned else 3, 1, _PROBES, dtype=torch.float64)
    factors: list[tuple[float, float]] = []
    in_sigma_space = _read(copy.deepcopy(probe), timesteps[0]) != 1.0
    for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        # Two sizes of change tell whether the step is affine, and its slope.
        nudges = [torch.zeros_like(output), *(_nudge(output, size) for size in (0.5, 1.0))]
        moved = [_step(copy.deepcopy(probe), nudge, timestep, sample) for nudge in nudges]
        half, whole = (float((other - moved[0]).mean()) for other in moved[1:])
        if abs(whole - 2 * half) > 1e-3 * max(abs(whole), 1e-6):
            raise ValueError(
                f"a step of {type(scheduler).__name__} must be affine in the denoiser's output, but is not at timestep "
                f"{float(timestep):g}; {_WAY_OUT}"
            )
        sample = _step(probe, output, timestep, sample)
        spread = _spread(probe, following) if in_sigma_space else 1.0
        factors.append((float(timestep), abs(whole) / spread))
    return factors


def _read(scheduler: Any, timestep: Any) -> float:
    """The factor that the scheduler multiplies a sample by before the denoiser reads it."""
    scale = getattr(scheduler, "scale_model_input", None)
    return 1.0 if scale is None else float(scale(torch.ones(1, dtype=torch.float64), timestep))


def _spread(scheduler: Any, following: Any) -> float:
    """How many times as wide as a clean sample a sample in sigma space is that the call at `following` will read.

    Schedulers scale such samples to ``1 / sqrt(sigma^2 + sigma_data^2)``. After the last step (`following` None) nothing is
    read any more, and the last of the sigmas counts.
    """
    clean = float(scheduler.config.get("sigma_data") or 1.0)  # of EDM; the others have no such entry
    if following is None:
        return math.hypot(float(scheduler.sigmas[-1]), clean) / clean
    return 1 / (_read(scheduler, following) * clean)


def _check_step(scheduler: Any) -> None:
    """Refuse schedulers whose step is not one from output, timestep and sample to a sample."""
    step = getattr(scheduler, "step", None)
    given = {} if step is None else inspect.signature(step).parameters
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [n for n, one in given.items() if one.default is one.empty and one.kind not in several]
    if [*given][2:3] != ["sample"] or len(needed) > 3:
        raise ValueError(
            f"a step of {type(scheduler).__name__} must be made of the denoiser's output, a timestep and a sample, got "
            f"step({', '.join(needed)}); {_WAY_OUT}"
        )


def _without_clipping(scheduler: Any) -> Any:
    """The scheduler itself, on the CPU, that clips nothing."""
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor):
            setattr(scheduler, name, value.cpu())
    clipping = [name for name in _CLIPPING if scheduler.config.get(name)]
    scheduler.register_to_config(**dict.fromkeys(clipping, False))
    return scheduler


def _no_noise(*_: Any) -> Tensor:
    return torch.zeros(1, dtype=torch.float64)


def _nudge(output: Tensor, size: float) -> Tensor:
    """The output moved in the channels of the sample. A learned variance stays."""
    moved = output.clone()
    moved[:, :3] += size
    return moved


def _step(scheduler: Any, output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    _read(scheduler, timestep)  # some schedulers insist on having been asked
    arguments: dict[str, Any] = {"return_dict": False}
    if "generator" in inspect.signature(scheduler.step).parameters:
        arguments["generator"] = torch.Generator().manual_seed(1)  # the same noise whatever the output
    try:
        result: Tensor = scheduler.step(output, timestep, sample, **arguments)[0]
        if not result.is_floating_point():
            raise TypeError(f"a sample must be of floats, got {result.dtype}")
    except _FAILURES as error:  # of tokens, of a grid of policies, of timesteps by row, ...
        raise ValueError(
            f"a step of {type(scheduler).__name__} must be that of a float sample, but fails on one ({error}); {_WAY_OUT}"
        ) from error
    return result


@torch_modes.plain()
def loss_weights(task: Task, power: float) -> dict[float, float]:
    """Weight of the squared error at every timestep of the calibration rows: the denoising factor to `power`, mean 1.

    A row's factor is that of its timestep where the denoiser is called with the scheduler's own timesteps, else that of its
    step (pipelines may pass them on scaled).

    Raises:
        ValueError: if the sampler is not known, is one that `denoising_factors` refuses, or is not what the rows are of.
    """
    data = task.calibration
    if not power:
        return dict.fromkeys(data.timesteps, 1.0)
    if task.scheduler is None:
        raise ValueError(
            f"the denoising-factor loss must know the sampler, got a plain module; pass the pipeline, or {_WAY_OUT}"
        )
    calls, steps = _factors_of_calls(task.scheduler(), None, {}), data.steps
    by_timestep, factors = _by_timestep(calls), [factor for _, factor in calls]
    if any(step is None or step >= len(factors) for step in steps):
        raise ValueError(
            f"calibration rows must be of the sampler's {len(factors)} steps, one denoiser call each, but are not; "
            f"calibrate with timesteps='sampler', or {_WAY_OUT}"
        )
    if not set(data.timesteps) <= set(by_timestep):
        by_timestep = {
            timestep: factors[step]
            for timestep, step in zip(data.timesteps, steps, strict=True)
            if step is not None
        }
    return normalised({timestep: by_timestep[timestep] ** power for timestep in data.timesteps})


def normalised(factors: Mapping[float, float]) -> dict[float, float]:
    """Factors with mean 1, so that a learning rate means the same for every sampler."""
    mean = sum(factors.values()) / len(factors)
    return {timestep: value / mean for timestep, value in factors.items()}
