"""The judge: the same seeds through two pipelines, and everything that differs between their pictures.

`generate` draws pictures, `compare` measures a quantized set against the full-precision one, `gate` turns thresholds
into sentences for a continuous-integration job. The metrics are in `difloat.metrics` and `difloat.distances`.
"""

from __future__ import annotations

import functools
import inspect
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from difloat.arguments import (
    completed,
    condition_of,
    draw_classes,
    for_pictures,
    parameters_of,
    takes,
)
from difloat.distances import (
    Moments,
    frechet,
    frechet_from_moments,
    frechet_interval,
    frechet_ratio_interval,
    kernel_distance,
    kernel_interval,
    moments,
)
from difloat.external import external
from difloat.gates import gate
from difloat.metrics import (
    METRICS,
    Estimate,
    Metric,
    NotFiniteError,
    in_batches,
    mean_interval,
    perceptual,
    psnr,
    ssim,
)
from difloat.sampling import denoiser_of, quiet

__all__ = [
    "METRICS",
    "Estimate",
    "Evaluation",
    "Generated",
    "Metric",
    "compare",
    "external",
    "frechet",
    "frechet_from_moments",
    "frechet_interval",
    "frechet_ratio_interval",
    "gate",
    "generate",
    "kernel_distance",
    "kernel_interval",
    "latent_error",
    "mean_interval",
    "moments",
    "perceptual",
    "psnr",
    "ssim",
]


_KERNEL_PICTURES = 8


@dataclass(frozen=True, eq=False)
class Generated:
    """Pictures of one pipeline and how they came about.

    Attributes:
        images: `[n, 3, h, w]` float32 in [0, 1], on the CPU.
        latents: `[steps, n, ...]`, the sampler's state after every step in the pipeline's own dtype, or None.
        timesteps: of every sampler step, in the sampler's order and unit.
        seconds: wall-clock time of all batches together.
    """

    images: Tensor
    latents: Tensor | None
    timesteps: list[float]
    seconds: float


def generate(
    pipeline: Any,
    prompts: Sequence[Any] | None,
    *,
    seeds: Sequence[int],
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 50,
    trajectory: bool = False,
    progress: bool = True,
    call_kwargs: Mapping[str, Any] | None = None,
) -> Generated:
    """One picture per seed from any diffusers pipeline, the same one for every batch size up to float rounding.

    Picture i is drawn with its own CPU generator of `seeds[i]` and prompt `prompts[i % len(prompts)]`. Sampler states
    are taken from the scheduler's `step`, which every pipeline calls, so nothing depends on a pipeline's callbacks.
    What the call needs besides is completed by `difloat.arguments.completed`.

    Args:
        pipeline: a diffusers pipeline.
        prompts: texts, or classes for class-conditional pipelines, recycled; None for unconditional pipelines, and for
            class-conditional ones to draw a class with each seed.
        seeds: one per picture.
        steps: sampler steps; None takes the pipeline's default.
        guidance_scale: None takes the pipeline's default.
        batch_size: pictures per call.
        trajectory: keep the sampler's state after every step.
        progress: show one bar over all pictures instead of the pipeline's own bars.
        call_kwargs: further arguments of the pipeline's call.

    Raises:
        ValueError: no seeds, prompts that do not fit the pipeline, an argument it does not have, or a picture
            with NaN or infinity (named by its seed).
    """
    from tqdm.auto import tqdm

    if not seeds or batch_size < 1:
        raise ValueError(f"seeds and batch_size must be at least 1, got {len(seeds)} and {batch_size}.")
    inputs, arguments = _call_arguments(pipeline, prompts, seeds, steps, guidance_scale, call_kwargs or {})
    images: list[Tensor] = []
    latents: list[Tensor] = []
    timesteps: list[float] = []
    start = time.perf_counter()
    with quiet(pipeline), tqdm(total=len(seeds), disable=not progress, desc="images", unit="img") as bar:
        for first in range(0, len(seeds), batch_size):
            batch = range(first, min(first + batch_size, len(seeds)))
            generators = [torch.Generator().manual_seed(seeds[i]) for i in batch]
            shown = {name: [values[i % len(values)] for i in batch] for name, values in inputs.items()}
            own = for_pictures(arguments, len(batch)) | shown
            if "batch_size" in parameters_of(pipeline):
                own["batch_size"] = len(batch)
            with _recorded_steps(pipeline.scheduler, keep_states=trajectory) as (timesteps, states):
                output = pipeline(generator=generators, output_type="np", **own)
            images.append(_as_tensor(output.images, [seeds[i] for i in batch]))
            if trajectory:
                latents.append(torch.stack([_state_of(state, len(batch)) for state in states]))
            bar.update(len(batch))
    seconds = time.perf_counter() - start
    return Generated(torch.cat(images), torch.cat(latents, 1) if latents else None, timesteps, seconds)


def _call_arguments(
    pipeline: Any,
    prompts: Sequence[Any] | None,
    seeds: Sequence[int],
    steps: int | None,
    guidance_scale: float | None,
    call_kwargs: Mapping[str, Any],
) -> tuple[dict[str, Sequence[Any]], dict[str, Any]]:
    """What is shown, as the name of the argument and its values to recycle (or nothing), and all other arguments."""
    name, denoiser = type(pipeline).__name__, denoiser_of(pipeline)[1]
    condition = condition_of(pipeline, denoiser)
    if condition == "class_labels" and prompts is None:
        prompts = draw_classes(denoiser, seeds)
    empty = isinstance(prompts, str) or (prompts is not None and len(prompts) == 0)
    if empty or (prompts is None) != (condition is None):
        rule = "None" if condition is None else "a list with at least one entry"
        raise ValueError(f"prompts of {name} must be {rule}, got {prompts!r:.80}; change the prompts.")
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
    """Timestep and new state of every `scheduler.step` inside the block."""
    original, was_patched = scheduler.step, "step" in vars(scheduler)
    signature = inspect.signature(original)
    timesteps: list[float] = []
    states: list[Tensor] = []

    @functools.wraps(original)  # pipelines read the signature of step to see which arguments it takes
    def step(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        timestep = signature.bind(*args, **kwargs).arguments["timestep"]  # a number, or one for every picture
        timesteps.append(float(torch.as_tensor(timestep).flatten()[0]))
        if keep_states:
            states.append(result[0].detach().to("cpu", copy=True))
        return result

    scheduler.step = step
    try:
        yield timesteps, states
    finally:
        if was_patched:
            scheduler.step = original
        else:
            del scheduler.step


def _as_tensor(images: Any, seeds: Sequence[int]) -> Tensor:
    batch = torch.as_tensor(images).permute(0, 3, 1, 2).float().contiguous()
    if len(batch) != len(seeds):
        raise ValueError(
            f"a pipeline must give one picture per seed, got {len(batch)} for {len(seeds)}; do not set "
            "num_images_per_prompt."
        )
    broken = [seed for seed, image in zip(seeds, batch, strict=True) if not bool(image.isfinite().all())]
    if broken:
        raise NotFiniteError(
            f"pictures must be finite, got NaN or infinity for seeds {broken[:5]}; the model overflows, keep more "
            "layers in high precision or sample in a wider dtype."
        )
    return batch


@dataclass(frozen=True)
class Evaluation:
    """What a quantized model lost, as far as it was measured.

    Attributes:
        metrics: estimates by the names of `METRICS`; a metric that was not measured is absent.
        samples: pictures per set.
        trajectory: relative latent error per sampler step, or None.
        timesteps: of these steps, or of the sampler where there is no trajectory.
    """

    metrics: dict[str, Estimate]
    samples: int
    trajectory: list[Estimate] | None = None
    timesteps: tuple[float, ...] = ()

    def rows(self) -> list[tuple[str, Metric, Estimate]]:
        """The measured metrics `(name, how to show it, estimate)` in the fixed order of `METRICS`."""
        return [
            (name, metric, self.metrics[name]) for name, metric in METRICS.items() if name in self.metrics
        ]

    def to_json(self) -> str:
        """One JSON object with the attributes; `from_json` gives back an equal evaluation."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """The evaluation of a `to_json` text.

        Raises:
            ValueError: the text is not such an object.
        """
        try:
            data = json.loads(text)
            metrics = {name: Estimate(**value) for name, value in data["metrics"].items()}
            trajectory = data["trajectory"]
            steps = None if trajectory is None else [Estimate(**value) for value in trajectory]
            evaluation = cls(metrics, data["samples"], steps, tuple(data["timesteps"]))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"an evaluation must be JSON as difloat writes it, got {text[:60]!r} ({error!r}); evaluate again."
            ) from error
        unknown = sorted(set(metrics) - set(METRICS))
        if unknown:
            raise ValueError(f"metrics must be among {', '.join(METRICS)}, got {', '.join(unknown)}.")
        return evaluation


def compare(
    reference: Generated,
    quantized: Generated,
    *,
    features: Callable[[Tensor], Tensor],
    feature_maps: Callable[[Tensor], Sequence[Tensor]],
    data_moments: Moments | None = None,
    captions: Sequence[str] | None = None,
    retrieval: Callable[[Tensor, list[str]], Tensor] | None = None,
    seed: int = 0,
) -> Evaluation:
    """All metrics of a quantized set of pictures against the full-precision set of the same seeds and prompts.

    Measured where it applies: SSIM for pictures of at least 11 pixels a side, kernel distance for at least 8 pictures
    (with fewer a resample may hold one picture only and has none), distances to data with `data_moments`,
    retrieval with `captions` and `retrieval`, the trajectory where both sets hold latents.

    Args:
        reference: full-precision pictures, at least 2.
        quantized: pictures of the same seeds.
        features: pictures `[n, 3, h, w]` to features `[n, d]`.
        feature_maps: pictures to a list of maps `[n, c, h', w']` normalised over channels.
        data_moments: mean `[d]` and covariance `[d, d]` of the data's features, tensors or arrays.
        captions: what each picture should show, one per picture.
        retrieval: pictures and captions to hits `[n]`, boolean or 0 and 1.
        seed: of all bootstrap resampling.

    Raises:
        ValueError: the sets do not have one shape, or captions do not count one per picture.
    """
    values = {"psnr": psnr(reference.images, quantized.images)}
    if min(reference.images.shape[-2:]) >= 11:
        values["ssim"] = ssim(reference.images, quantized.images)
    values["perceptual"] = perceptual(reference.images, quantized.images, feature_maps)
    metrics = {name: mean_interval(value, seed=seed) for name, value in values.items()}
    a, b = in_batches(features, reference.images), in_batches(features, quantized.images)
    metrics["frechet_to_full_precision"] = frechet_interval(b, a, paired=True, seed=seed)
    if len(a) >= _KERNEL_PICTURES:
        metrics["kernel_distance"] = kernel_interval(b, a, paired=True, seed=seed)
    if data_moments is not None:
        metrics["frechet_to_data"] = frechet_interval(b, data_moments, seed=seed)
        metrics["frechet_to_data_of_full_precision"] = frechet_interval(a, data_moments, seed=seed)
        metrics["frechet_to_data_ratio"] = frechet_ratio_interval(b, a, data_moments, seed=seed)
    if captions is not None and retrieval is not None:
        metrics["retrieval"] = _retrieval_estimate(retrieval, quantized.images, captions, seed)
        metrics["retrieval_of_full_precision"] = _retrieval_estimate(
            retrieval, reference.images, captions, seed
        )
    both = reference.latents is not None and quantized.latents is not None
    trajectory = latent_error(reference, quantized, seed=seed) if both else None
    return Evaluation(metrics, len(reference.images), trajectory, tuple(reference.timesteps))


def _retrieval_estimate(
    retrieval: Callable[[Tensor, list[str]], Tensor],
    images: Tensor,
    captions: Sequence[str],
    seed: int,
) -> Estimate:
    if len(captions) != len(images):
        raise ValueError(f"captions must be one per picture, got {len(captions)} for {len(images)} pictures.")
    return mean_interval(retrieval(images, list(captions)), seed=seed)


def latent_error(reference: Generated, quantized: Generated, *, seed: int = 0) -> list[Estimate]:
    """Relative error of the sampler's state after every step, `|q - r| / |r|` per picture (L2), mean over pictures.

    Raises:
        ValueError: a set has no latents, or they do not have one shape.
    """
    a, b = reference.latents, quantized.latents
    if a is None or b is None or a.shape != b.shape:
        shapes = [None if x is None else tuple(x.shape) for x in (a, b)]
        raise ValueError(
            f"latents must be recorded for both sets and have one shape, got {shapes}; generate both with "
            "trajectory=True, the same seeds and steps."
        )
    errors = []
    for state, other in zip(a, b, strict=True):
        flat = state.double().flatten(1)
        relative = (other.double().flatten(1) - flat).norm(dim=1) / flat.norm(dim=1)
        errors.append(mean_interval(relative, seed=seed))
    return errors
