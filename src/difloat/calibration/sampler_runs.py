"""Calling a diffusers pipeline batch by batch, every seed explicit, so that any batch can be drawn again."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from difloat import devices
from difloat.calibration.rows import content_hash
from difloat.pipelines import (
    call,
    check_call,
    completed,
    condition_of,
    denoisers_of,
    draw_classes,
    for_pictures,
    generators_of,
    one_at_a_time,
    parameters_of,
    quiet,
    stops_at_latents,
    takes,
)
from difloat.plan.request import CalibrationSettings

# Seeds of pictures are seed * stride + number, so two runs with different seeds share no picture.
SEED_STRIDE = 1_000_003
# How pipelines call the number of pictures, videos or sounds that they draw for every prompt.
_SAMPLES_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


def weights_summary(modules: Iterable[nn.Module]) -> str:
    """Cheap hash of weights: names, shapes, dtypes and 64 evenly spaced values of every tensor."""
    digest = hashlib.blake2b(digest_size=16)
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            if not tensor.is_meta and tensor.numel():
                flat = tensor.detach().flatten()
                digest.update(content_hash(flat[:: max(1, flat.numel() // 64)][:64].cpu()).encode())
    return digest.hexdigest()


WEIGHTS = "_difloat_weights"  # what `weights_of` gives for a pipeline whose weights are not all there now


def weights_of(pipeline: Any) -> str:
    """`weights_summary` of all models of a pipeline."""
    modules = [part for part in _components(pipeline).values() if isinstance(part, nn.Module)]
    kept: str | None = vars(pipeline).get(WEIGHTS)
    return weights_summary(modules) if kept is None else kept


class Stopped(Exception):
    """Raised at a call of the denoiser to end a run there."""


@final
class Sampling:
    """Batches of one pipeline: which prompts, how many, with which arguments and seeds.

    Attributes:
        denoiser: The module whose inputs are of interest.
        pipeline: The pipeline.
        device: Where the pipeline computes.
        steps: Sampler steps of one batch.
        batches: Batches that give `samples` rows at one row per picture and step, and `trajectories` pictures.
        images: Pictures in a batch.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[str] | None,
        settings: CalibrationSettings,
        call_kwargs: Mapping[str, Any],
        denoiser: str | None = None,
    ) -> None:
        """Check what is given against the pipeline's call. `denoiser` names the one of interest, or None for the first."""
        self._denoisers = denoisers_of(pipeline)
        self._name = denoiser or next(iter(self._denoisers))
        self.denoiser = self._denoisers[self._name]
        self.device = devices.home(pipeline)
        self.pipeline = pipeline
        batch = 1 if one_at_a_time(call_kwargs) else settings.prompts_per_batch
        self._batch = batch
        self._seed = settings.seed
        self._parameters = parameters_of(pipeline)
        self._condition = condition_of(pipeline, self.denoiser)
        self._check_names(call_kwargs)
        self._given = dict(call_kwargs)
        check_call(pipeline, settings.steps, call_kwargs)
        self._prompts = self._checked_prompts(prompts, call_kwargs)
        self._kwargs = self._fixed_kwargs(settings.steps, settings.guidance_scale, call_kwargs)
        self.steps: int = self._kwargs["num_inference_steps"]
        self.images = batch * math.prod(int(call_kwargs.get(name) or 1) for name in _SAMPLES_PER_PROMPT)
        # Named only where it is asked for: batches then keep other shares of the rows.
        samples, drawn = settings.samples, settings.trajectories
        self._spread = {} if drawn is None else {"samples": samples, "trajectories": drawn}
        self.batches = max(-(-samples // (self.steps * self.images)), -(-(drawn or 1) // self.images))
        order = torch.randperm(len(self._prompts), generator=torch.Generator().manual_seed(settings.seed))
        self._prompts = [self._prompts[index] for index in order.tolist()]

    def seed(self, batch: int) -> int:
        """Seed of everything random in a batch that is not a picture's own noise."""
        return self._seed * SEED_STRIDE + batch

    def run(self, batch: int) -> None:
        """Sample one batch, to latents where the pipeline can stop there."""
        numbers = range(batch * self._batch, (batch + 1) * self._batch)
        shown: dict[str, list[Any]] = {}
        if self._prompts:
            shown["prompt"] = [self._prompts[number % len(self._prompts)] for number in numbers]
        elif self._condition == "class_labels" and "class_labels" not in self._kwargs:
            seeds = [self._seed * SEED_STRIDE + number for number in numbers]
            shown["class_labels"] = draw_classes(self.denoiser, seeds)
        kwargs = for_pictures(self.pipeline, self._kwargs, shown, self._batch)
        if "generator" in self._parameters:
            start = self._seed * SEED_STRIDE + batch * self.images
            kwargs["generator"] = generators_of(self._kwargs, range(start, start + self.images))
        call(self.pipeline, kwargs, self._given)

    def scheduler(self) -> Any:
        """A copy of the pipeline's scheduler as the first call of any denoiser finds it: timesteps, shifts and all are set.

        Runs the pipeline up to that call.

        Raises:
            ValueError: if the pipeline has no scheduler.
        """
        if not hasattr(getattr(self.pipeline, "scheduler", None), "step"):
            raise ValueError(
                f"pipeline must have a scheduler with steps, got {type(self.pipeline).__name__} without"
            )
        return self.run_to_denoiser(0)

    def run_to_denoiser(self, batch: int) -> Any:
        """Run a batch up to the first call of any denoiser, and return a copy of the scheduler as it is then."""
        found: list[Any] = []

        def stop(*_: Any) -> None:
            found.append(copy.deepcopy(getattr(self.pipeline, "scheduler", None)))
            raise Stopped

        with contextlib.ExitStack() as hooks:
            for denoiser in self._denoisers.values():
                hooks.callback(denoiser.register_forward_pre_hook(stop).remove)
            with quiet(self.pipeline), contextlib.suppress(Stopped):
                self.run(batch)
        return found[0]

    def request(self) -> dict[str, Any]:
        """All that decides the rows, as plain data: the cache is valid for exactly this."""
        scheduler = getattr(self.pipeline, "scheduler", None)
        # Named only where it is not the first, so that caches of pipelines with one denoiser stay valid.
        second = {} if self.denoiser is next(iter(self._denoisers.values())) else {"component": self._name}
        return {
            **second,
            **self._spread,
            "pipeline": type(self.pipeline).__qualname__,
            "denoiser": type(self.denoiser).__qualname__,
            "denoiser_config": described(config_of(self.denoiser)),
            "scheduler": type(scheduler).__qualname__,
            "scheduler_config": described(config_of(scheduler)),
            "weights": weights_of(self.pipeline),
            "prompts": self._prompts,
            "batch": self._batch,
            "seed": self._seed,
            "call": described(self._kwargs),
        }

    def _check_names(self, call_kwargs: Mapping[str, Any]) -> None:
        for name in call_kwargs:
            if name in ("prompt", "generator", "batch_size", "num_inference_steps", "guidance_scale"):
                raise ValueError(
                    f"call arguments must not hold '{name}', which calibration sets itself, got it in call_kwargs; "
                    "use the prompts and the calibration settings"
                )
            if not takes(self.pipeline, name):
                raise ValueError(
                    f"call arguments must be ones that {type(self.pipeline).__name__} takes, got '{name}'; remove it"
                )

    def _checked_prompts(self, prompts: Sequence[str] | None, call_kwargs: Mapping[str, Any]) -> list[str]:
        kind = type(self.pipeline).__name__
        if self._condition != "prompt":
            if prompts:
                raise ValueError(f"{kind} must be given no prompts, got {len(prompts)}; pass prompts=None")
            return []
        texts = isinstance(prompts, Sequence) and not isinstance(prompts, str)
        if prompts is None or not texts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(
                f"prompts must be a list of strings for {kind}, got {type(prompts).__name__}; pass a list"
            )
        if not any(prompt.strip() for prompt in prompts):
            raise ValueError(
                f"prompts must have at least one text for {kind}, got none; pass some, 16 or more"
            )
        return list(prompts)

    def _fixed_kwargs(
        self, steps: int | None, guidance_scale: float | None, call_kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        kwargs = completed(self.pipeline, call_kwargs)
        parameter = self._parameters.get("num_inference_steps")
        default = None if parameter is None else parameter.default
        steps = default if steps is None else steps
        if not isinstance(steps, int):
            raise ValueError(
                f"calibration setting 'steps' must be given for {type(self.pipeline).__name__}, whose call has no "
                f"default, got {steps!r}; set steps"
            )
        kwargs["num_inference_steps"] = steps
        if guidance_scale is not None:
            if "guidance_scale" not in self._parameters:
                raise ValueError(
                    f"calibration setting 'guidance_scale' must be None for {type(self.pipeline).__name__}, which "
                    f"has no guidance, got {guidance_scale}; leave it out"
                )
            kwargs["guidance_scale"] = guidance_scale
        if "output_type" in self._parameters:
            # Only a pipeline with an autoencoder can stop before it; others have pictures all along.
            kwargs.setdefault("output_type", "latent" if stops_at_latents(self.pipeline) else "np")
        return kwargs


def _components(pipeline: Any) -> dict[str, Any]:
    components = getattr(pipeline, "components", None)
    return dict(components) if isinstance(components, Mapping) else dict(vars(pipeline))


def config_of(part: Any) -> dict[str, Any]:
    """A component's config without diffusers' own notes: paths, and sets whose order changes with the process."""
    return {name: value for name, value in dict(getattr(part, "config", {})).items() if name[:1] != "_"}


def described(value: object) -> object:
    """Plain data that tells apart what gives different pictures."""
    if isinstance(value, Tensor):
        return content_hash(value.cpu())
    if isinstance(value, Mapping):
        return {str(key): described(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return [described(entry) for entry in value]
    if hasattr(
        value, "tobytes"
    ):  # pictures of PIL and arrays, whose text tells where they are, or not all of them
        about = f"{type(value).__name__} {getattr(value, 'mode', '')} {getattr(value, 'size', '')} "
        digest = hashlib.blake2b(about.encode() + value.tobytes(), digest_size=16)
        return digest.hexdigest()
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)
