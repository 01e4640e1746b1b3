"""Drawing pictures, videos and sounds with any diffusers pipeline, each from its own seed, by one process or several."""

from __future__ import annotations

import functools
import inspect
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difloat import devices, distributed
from difloat.evaluation.outputs import outputs_of
from difloat.pipelines import (
    call,
    check_call,
    completed,
    condition_of,
    denoiser_of,
    draw_classes,
    for_pictures,
    generators_of,
    one_at_a_time,
    parameters_of,
    quiet,
    takes,
)

PER_CALL = 50  # pictures of a call of the pipeline


@dataclass(frozen=True, eq=False)
class Generated:
    """The samples of one pipeline, and the sampler's states on the way.

    >>> drawn = Generated(torch.zeros(6, 3, 8, 8), latents=None, timesteps=[], seconds=0.0, frames=3)
    >>> len(drawn)                                                         # two videos of three frames
    2

    Attributes:
        images: float32 `[n * frames, 3, h, w]` in [0, 1] on the CPU, with the frames of a video one after the other. It has no
            pictures where the pipeline draws none.
        latents: The sampler's state `[steps, n, ...]` after every step in the pipeline's own dtype, or None.
        timesteps: The timestep of every sampler step, in the sampler's order and unit.
        seconds: The wall-clock time of all batches together.
        frames: How many frames a sample has, which is 1 for pictures.
        signal: float32 `[n, ...]` on the CPU where samples are no pictures but waveforms or the embeddings of a prior, or None.
    """

    images: Tensor
    latents: Tensor | None
    timesteps: list[float]
    seconds: float
    frames: int = 1
    signal: Tensor | None = None

    def __len__(self) -> int:
        """The number of samples, which are pictures, videos or sounds."""
        return len(self.images) // self.frames if self.signal is None else len(self.signal)


def generate(
    pipeline: Any,
    prompts: Sequence[Any] | None,
    *,
    seeds: Sequence[int],
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = PER_CALL,
    trajectory: bool = False,
    progress: bool = True,
    call_kwargs: Mapping[str, Any] | None = None,
) -> Generated:
    """One sample per seed from any diffusers pipeline, the same one for every batch size up to float rounding.

    >>> import difloat
    >>> generate(difloat.reference("emoji-unet"), ["red apple"], seeds=[0, 1], steps=1, progress=False).images.shape
    torch.Size([2, 3, 64, 64])

    Sample i is drawn with its own CPU generator of `seeds[i]` and prompt `prompts[i % len(prompts)]`. Sampler states come from
    the scheduler's `step`, and so depend on no pipeline's callbacks. `pipelines.completed` adds what else a call needs.

    In a launch of several processes (`difloat.distributed`) all must call this with the same arguments. Each draws some of
    the batches that a single process would draw. The main process gets all samples, and the others get none.

    Args:
        pipeline: A diffusers pipeline.
        prompts: Texts or classes, which are recycled. With None, a class-conditional pipeline draws a class with each seed.
        seeds: One seed per sample. What a pipeline draws without a generator has that of the first sample in its call.
        steps: How many steps the sampler takes, or None for the pipeline's default.
        guidance_scale: The factor of classifier-free guidance, or None for the pipeline's default.
        batch_size: How many samples a call draws. It is 1 where `call_kwargs` holds pictures, arrays or tensors.
        trajectory: Whether to keep the sampler's state after every step.
        progress: Whether to show one bar over all samples instead of the pipeline's own bars.
        call_kwargs: Further arguments of the pipeline's call.

    Raises:
        ValueError: if there are no seeds, prompts or arguments do not fit, or a sample is not finite.
        ProcessError: if another process of the launch failed.
    """
    from tqdm.auto import tqdm

    if not seeds or batch_size < 1:
        raise ValueError(f"seeds and batch_size must be at least 1, got {len(seeds)} and {batch_size}.")
    batch_size = 1 if one_at_a_time(call_kwargs or {}) else batch_size
    inputs, arguments = _call_arguments(pipeline, prompts, seeds, steps, guidance_scale, call_kwargs or {})
    batches = [range(n, min(n + batch_size, len(seeds))) for n in range(0, len(seeds), batch_size)]
    distributed.join(devices.home(pipeline))
    drawn: list[Generated] = []
    start = time.perf_counter()
    shown = progress and distributed.is_main()
    with quiet(pipeline), tqdm(total=len(seeds), disable=not shown, desc="images", unit="img") as bar:
        for first in range(0, len(batches), distributed.count()):
            mine = batches[first + distributed.number() : first + distributed.number() + 1]
            draw = functools.partial(
                _draw, pipeline, inputs, arguments, seeds, mine, trajectory, call_kwargs or {}
            )
            done = [batch for batch in distributed.collected(draw) if batch is not None]
            drawn += done
            bar.update(sum(len(batch) for batch in done))
    return joined(drawn, time.perf_counter() - start)


def joined(batches: Sequence[Generated], seconds: float) -> Generated:
    """All batches as one set, which has no pictures if there are none."""
    if not batches:
        return Generated(torch.zeros(0, 3, 1, 1), None, [], seconds)
    latents = [batch.latents for batch in batches if batch.latents is not None]
    signals = [batch.signal for batch in batches if batch.signal is not None]
    return Generated(
        torch.cat([batch.images for batch in batches]),
        torch.cat(latents, 1) if latents else None,
        batches[-1].timesteps,
        seconds,
        batches[-1].frames,
        torch.cat(signals) if signals else None,
    )


def _draw(
    pipeline: Any,
    inputs: Mapping[str, Sequence[Any]],
    arguments: Mapping[str, Any],
    seeds: Sequence[int],
    batches: Sequence[range],
    trajectory: bool,
    given: Mapping[str, Any],
) -> Generated | None:
    """The samples of the first of `batches`, or None if no batch is left for this process."""
    if not batches:
        return None
    (batch,) = batches
    numbers = [seeds[i] for i in batch]
    shown = {name: [values[i % len(values)] for i in batch] for name, values in inputs.items()}
    own = for_pictures(pipeline, arguments, shown, len(batch))
    own |= {"output_type": "np"} if takes(pipeline, "output_type") else {}
    own |= {"generator": generators_of(arguments, numbers)} if takes(pipeline, "generator") else {}
    # Some pipelines draw from torch's own random numbers besides, such as latents of a control picture.
    with (
        devices.seeded(devices.home(pipeline), numbers[0]),
        _recorded_steps(getattr(pipeline, "scheduler", None), keep_states=trajectory) as (timesteps, states),
    ):
        output = call(pipeline, own, given)
    found = outputs_of(output, numbers)
    kept = [_state_of(state, len(batch)) for state in states]
    same = len({state.shape for state in kept}) == 1
    latents = torch.stack(kept) if trajectory and same and len(kept[0]) == len(batch) else None
    return Generated(found.images, latents, timesteps, 0.0, found.frames, found.signal)


def _call_arguments(
    pipeline: Any,
    prompts: Sequence[Any] | None,
    seeds: Sequence[int],
    steps: int | None,
    guidance_scale: float | None,
    call_kwargs: Mapping[str, Any],
) -> tuple[dict[str, Sequence[Any]], dict[str, Any]]:
    """The name of the argument for prompts or classes with its values to recycle, if there is one, and all other arguments."""
    name, denoiser = type(pipeline).__name__, denoiser_of(pipeline)[1]
    condition = condition_of(pipeline, denoiser)
    if condition == "class_labels" and prompts is None:
        prompts = draw_classes(denoiser, seeds)
    empty = isinstance(prompts, str) or (prompts is not None and len(prompts) == 0)
    if empty or (prompts is None) != (condition is None):
        rule = "None" if condition is None else "a list with at least one entry"
        raise ValueError(f"prompts of {name} must be {rule}, got {prompts!r:.80}; change the prompts.")
    check_call(pipeline, steps, call_kwargs)
    given = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    arguments = {key: value for key, value in given.items() if value is not None}
    arguments |= completed(pipeline, call_kwargs)
    unknown = sorted(key for key in arguments if not takes(pipeline, key))
    if unknown:
        accepted = ", ".join(parameters_of(pipeline))
        raise ValueError(f"{name} takes {accepted}, got {', '.join(unknown)}; leave that out.")
    return {} if condition is None or prompts is None else {condition: prompts}, arguments


def _state_of(state: Tensor, pictures: int) -> Tensor:
    """A sampler's state without its second half where the pipeline carries both halves of guidance along (DiT)."""
    return state[:pictures] if len(state) == 2 * pictures else state


@contextmanager
def _recorded_steps(scheduler: Any, *, keep_states: bool) -> Iterator[tuple[list[float], list[Tensor]]]:
    """The timestep and new state of every `scheduler.step` inside the block. A scheduler that does not step has none."""
    if not hasattr(scheduler, "step"):
        yield [], []
        return
    original, was_patched = scheduler.step, "step" in vars(scheduler)
    bound = inspect.ismethod(original)
    inner = original.__func__ if bound else original
    signature = inspect.signature(inner)
    timesteps: list[float] = []
    states: list[Tensor] = []

    @functools.wraps(inner)  # pipelines read the signature of step to see which arguments it takes
    def step(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        timestep = signature.bind(*args, **kwargs).arguments["timestep"]  # a number, or one for every picture
        timesteps.append(float(torch.as_tensor(timestep).flatten()[0]))
        if keep_states:
            states.append(result[0].detach().to("cpu", copy=True))
        return result

    # A method, so that copies of the scheduler, of which some pipelines make one per frame, step themselves and not this one.
    scheduler.step = types.MethodType(step, scheduler) if bound else step
    try:
        yield timesteps, states
    finally:
        if was_patched:
            scheduler.step = original
        else:
            del scheduler.step
