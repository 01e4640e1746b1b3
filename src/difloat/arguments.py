"""What a diffusers pipeline's call needs besides what the user gives, read from its signature, components and configs.

Calibration and evaluation call pipelines of any family through these, so that both sample in the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

# How configs of class-conditional denoisers, transformers and U-Nets, call the number of their classes.
_CLASS_COUNTS = ("num_embeds_ada_norm", "num_class_embeds")

# Arguments that count something, as the pipelines of diffusers call them.
_COUNTS = (
    "height",
    "width",
    "num_frames",
    "video_length",
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "max_sequence_length",
)
# What libraries raise of their own on values that they did not foresee.
_UNFORESEEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
)

Condition = Literal["prompt", "class_labels"]


def parameters_of(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """Parameters of the pipeline's call by name."""
    return inspect.signature(pipeline.__call__).parameters


def takes(pipeline: Any, name: str) -> bool:
    """Whether the pipeline's call accepts an argument `name`, which it also does if it accepts any."""
    parameters = parameters_of(pipeline)
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def class_count(denoiser: nn.Module) -> int | None:
    """Classes that a class-conditional denoiser was made for, by its config; None if it knows no classes."""
    config = dict(getattr(denoiser, "config", {}))
    return next((int(config[name]) for name in _CLASS_COUNTS if config.get(name) is not None), None)


def condition_of(pipeline: Any, denoiser: nn.Module) -> Condition | None:
    """The argument that says what a picture should show: texts, classes, or None for an unconditional pipeline."""
    parameters = parameters_of(pipeline)
    if "prompt" in parameters:
        return "prompt"
    required = "class_labels" in parameters and parameters["class_labels"].default is inspect.Parameter.empty
    return "class_labels" if required or _optional_classes(parameters, denoiser) else None


def _optional_classes(parameters: Mapping[str, inspect.Parameter], denoiser: nn.Module) -> bool:
    return "class_labels" in parameters and class_count(denoiser) is not None


def draw_classes(denoiser: nn.Module, seeds: Sequence[int]) -> list[int]:
    """One class per picture, drawn with the picture's seed.

    Raises:
        ValueError: if the denoiser's config does not say how many classes there are.
    """
    count = class_count(denoiser)
    if count is None:
        raise ValueError(
            f"{type(denoiser).__name__} must say its number of classes in its config ({' or '.join(_CLASS_COUNTS)}), "
            "got neither; give class_labels"
        )
    return [int(torch.randint(count, (), generator=torch.Generator().manual_seed(seed))) for seed in seeds]


def completed(pipeline: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` call arguments with two defaults of published checkpoints replaced where they are not given.

    Caption cleaning is off: it silently depends on which packages are installed, so pictures would differ between
    machines. Binning of sizes is off where the size defaults to the model's own, which it can only confirm, or refuse
    if the model is none of the published ones. Where the size defaults to a number (Sana), binning finds the model's.
    """
    parameters, arguments = parameters_of(pipeline), dict(given)
    if "clean_caption" in parameters:
        arguments.setdefault("clean_caption", False)
    own_size = "height" in parameters and parameters["height"].default is None
    if "use_resolution_binning" in parameters and own_size and not {"height", "width"} & set(given):
        arguments.setdefault("use_resolution_binning", False)
    return arguments


def check_call(pipeline: Any, steps: int | None, given: Mapping[str, Any]) -> None:
    """Refuse what no pipeline can do with, before it is called.

    Args:
        pipeline: A diffusers pipeline.
        steps: Of the sampler; None: its default.
        given: Further arguments of the call.

    Raises:
        ValueError: if there are more steps than the scheduler has timesteps, or a size or count is no whole number from 1 on.
    """
    most = getattr(getattr(pipeline, "scheduler", None), "config", {}).get("num_train_timesteps")
    if steps is not None and isinstance(most, int) and steps > most:
        raise ValueError(
            f"steps must be at most the {most} timesteps of {type(pipeline.scheduler).__name__}, got {steps}; give fewer"
        )
    for name in _COUNTS:
        value = given.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(
                f"call argument {name!r} must be a whole number of at least 1, got {value!r}; give another"
            )


def call(pipeline: Any, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """What a pipeline gives for `arguments`; where it fails on what the user has `given` of them, that is said.

    Raises:
        ValueError: if the call fails with an error of its code, and there are `given` arguments.
    """
    try:
        return pipeline(**arguments)
    except _UNFORESEEN as error:
        if not given:
            raise
        shown = ", ".join(f"{name}={value!r:.40}" for name, value in given.items())
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{type(pipeline).__name__} must be able to run with the call arguments {shown}, but raised "
            f"{type(error).__name__} ({reason}); leave one out or give another value"
        ) from error


def for_pictures(arguments: Mapping[str, Any], pictures: int) -> dict[str, Any]:
    """Arguments of one call: a text beside the prompt (`negative_prompt`, `prompt_2`, ...) is repeated for every picture.

    Some pipelines do so themselves, others refuse a single text beside several prompts or take it for a single picture.
    """

    def beside_prompt(name: str) -> bool:
        return name.startswith(("negative_prompt", "prompt_"))

    return {
        name: [value] * pictures if isinstance(value, str) and beside_prompt(name) else value
        for name, value in arguments.items()
    }
