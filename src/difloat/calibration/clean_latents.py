"""Calibration rows at raw timesteps 0, 1, 2, ... from almost clean latents, as the released code of FP4DiT takes them.

That code noises encoded photographs at the first timesteps of the schedule instead of following the sampler. Here the almost
clean latents are what the sampler hands to its last step, so no photographs are needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from difloat.calibration.rows import Recorder, recording
from difloat.calibration.sampler_runs import Sampling
from difloat.layers.timestep_clock import TIMESTEP_NAMES

RAW_TIMESTEPS = 20  # arXiv:2503.15465, code: `range(20)` for PixArt


@final
class LastCall:
    """A forward pre-hook (`with_kwargs=True`) that remembers the arguments of the newest call by their names."""

    def __init__(self, module: nn.Module) -> None:
        """Prepare for calls of a module."""
        self._names = list(inspect.signature(module.forward).parameters)
        self.arguments: dict[str, Any] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take one call."""
        self.arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}


def clean_calls(
    scheduler: Any, last: LastCall, images: int, generator: torch.Generator
) -> Iterator[dict[str, Any]]:
    """The calls with the latents of the sampler's last step, noised at the timesteps 0 to 19, for conditional rows only.

    Args:
        scheduler: A scheduler with `add_noise`.
        last: The sampler's last call of the denoiser, whose first tensor argument is the sample.
        images: How many pictures the batch has. The last so many rows of a guided call are the conditional ones.
        generator: The generator that draws the noise.

    Raises:
        ValueError: if the scheduler cannot add noise at a timestep, or the denoiser has no timestep by name.
    """
    names = [name for name in last.arguments if name in TIMESTEP_NAMES]
    if not hasattr(scheduler, "add_noise") or not names:
        raise ValueError(
            f"calibration setting 'timesteps' must be 'sampler' for {type(scheduler).__name__}, got 'clean'; it needs a "
            "scheduler with add_noise and a denoiser with a timestep"
        )
    sample_name = next(name for name, value in last.arguments.items() if isinstance(value, Tensor))
    batch = len(last.arguments[sample_name])

    def conditional(leaf: Tensor) -> Tensor:
        return leaf[batch - images :] if leaf.dim() and len(leaf) == batch else leaf

    call = pytree.tree_map_only(Tensor, conditional, last.arguments)
    sample = call[sample_name]
    for number in range(RAW_TIMESTEPS):
        timestep = torch.full((len(sample),), number, dtype=torch.int64)
        noise = torch.randn(sample.shape, generator=generator).to(sample)
        noisy = scheduler.add_noise(sample, noise, timestep)
        yield {**call, sample_name: noisy.to(sample.dtype), names[0]: timestep.to(sample.device)}


def record_clean(pipeline: Any, sampling: Sampling, batch: int, recorder: Recorder) -> None:
    """Sample a batch to its last step and record calls at the raw timesteps from there."""
    last = LastCall(sampling.denoiser)
    with recording(sampling.denoiser, last, sampling.seed(batch)):
        sampling.run(batch)
    generator = torch.Generator().manual_seed(sampling.seed(batch))
    for call in clean_calls(pipeline.scheduler, last, sampling.images, generator):
        recorder(sampling.denoiser, (), call)
