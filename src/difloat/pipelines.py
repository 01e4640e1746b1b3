"""Facts about a diffusers pipeline: its denoiser, and the arguments that its call needs besides those of the user."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

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
    """The parameters of the pipeline's call by name."""
    return inspect.signature(pipeline.__call__).parameters


def takes(pipeline: Any, name: str) -> bool:
    """Whether the pipeline's call accepts an argument `name`, which it also does if it accepts any."""
    parameters = parameters_of(pipeline)
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def usual_steps(pipeline: Any) -> int | None:
    """Steps of the sampler that the pipeline's call takes by itself, or None if it has no such number."""
    parameter = parameters_of(pipeline).get("num_inference_steps")
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None


def class_count(denoiser: nn.Module) -> int | None:
    """The number of classes of a class-conditional denoiser by its config, or None if it has no classes."""
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
    """Refuse arguments that no pipeline can use, before it is called.

    Args:
        pipeline: A diffusers pipeline.
        steps: How many steps the sampler takes, or None for its default.
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
    """The output of a pipeline for some arguments. If it fails where the user gave some of them, the error names these.

    Raises:
        ValueError: if the call fails with an error of its code, and there are `given` arguments, or its models are in dtypes
            that do not fit together, or a package is missing.
    """
    try:
        return pipeline(**arguments)
    except NameError as error:  # diffusers imports optional packages where they are, and uses them anyway
        raise ValueError(
            f"{type(pipeline).__name__} must find every package that it uses, but its code says '{error}'; pip install "
            f"{error.name}"
        ) from error
    except _UNFORESEEN as error:
        if isinstance(error, RuntimeError) and (mixed := _mixed_dtypes(pipeline, str(error))):
            raise ValueError(
                f"{type(pipeline).__name__} must compute in one dtype, but holds {mixed}; load it in one, like --dtype float32"
            ) from error
        if not given or isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise
        shown = ", ".join(f"{name}={value!r:.40}" for name, value in given.items())
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{type(pipeline).__name__} must be able to run with the call arguments {shown}, but raised "
            f"{type(error).__name__} ({reason}); leave one out or give another value"
        ) from error


def _mixed_dtypes(pipeline: Any, reason: str) -> str:
    """The dtypes of a pipeline's models in words, where a call failed over several of them, or an empty text."""
    if "dtype" not in reason and "scalar type" not in reason and "should be the same" not in reason:
        return ""
    found: dict[str, set[str]] = {}
    for name, part in getattr(pipeline, "components", {}).items():
        for tensor in part.parameters() if isinstance(part, nn.Module) else ():
            if tensor.is_floating_point():
                found.setdefault(name, set()).add(str(tensor.dtype).removeprefix("torch."))
    if len(set().union(*found.values())) < 2:
        return ""
    return ", ".join(f"{' and '.join(sorted(dtypes))} in {name}" for name, dtypes in found.items())


def one_at_a_time(given: Mapping[str, Any]) -> bool:
    """Whether the user gives pictures, arrays or tensors: pipelines batch them in ways of their own, so samples come singly."""
    leaves = pytree.tree_leaves(dict(given))
    return not all(leaf is None or isinstance(leaf, (bool, int, float, str)) for leaf in leaves)


def for_pictures(
    pipeline: Any, arguments: Mapping[str, Any], shown: Mapping[str, Sequence[Any]], pictures: int
) -> dict[str, Any]:
    """Arguments of one call that draws so many pictures.

    A text beside the prompt (`negative_prompt`, `prompt_2`, ...) is repeated for every picture: some pipelines do so
    themselves, others refuse a single text beside several prompts or take it for a single picture. Where samples come singly
    (`one_at_a_time`), prompt and texts are given as they are and not in a list.

    Args:
        pipeline: The pipeline that is called.
        arguments: The arguments of every call.
        shown: The prompts or classes, one per picture, by the name of the argument; or nothing.
        pictures: How many.
    """

    def beside_prompt(name: str) -> bool:
        return name.startswith(("negative_prompt", "prompt_"))

    single = pictures == 1 and one_at_a_time(arguments)
    own = {
        name: [value] * pictures if isinstance(value, str) and beside_prompt(name) and not single else value
        for name, value in arguments.items()
    }
    own |= {name: values[0] if single else list(values) for name, values in shown.items()}
    return own | ({"batch_size": pictures} if "batch_size" in parameters_of(pipeline) else {})


def generators_of(arguments: Mapping[str, Any], seeds: Sequence[int]) -> Any:
    """A list with a generator for every seed, or the generator itself where samples come singly and there is one seed."""
    found = [torch.Generator().manual_seed(seed) for seed in seeds]
    return found[0] if len(found) == 1 and one_at_a_time(arguments) else found


def inputs_of(pairs: Sequence[str]) -> dict[str, Any]:
    """Pictures, masks and arrays for a pipeline's call, from `name=FILE` pairs. Several files of one name make a list.

    Pictures are RGB, with alpha RGBA; what is called a mask is grey. A NumPy file (`.npy`) is a tensor of one sample, such as
    the embedding that `difloat generate` writes for a prior, and gets the axis of the batch in front.

    Raises:
        ValueError: a pair is no `name=FILE`, or the file is no picture and no array of numbers.
        FileNotFoundError: there is no such file.
    """
    found: dict[str, list[Any]] = {}
    for pair in pairs:
        name, equal, file = pair.partition("=")
        if not (name and equal and file):
            raise ValueError(
                f"an input must be name=FILE, got {pair!r}; write for example image=photo.png or mask_image=mask.png"
            )
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(
                f"input {name!r} must be a picture in a file, got '{path}', which is none; check the path"
            )
        found.setdefault(name, []).append(
            _array(name, path) if path.suffix == ".npy" else _picture(name, path)
        )
    return {name: pictures[0] if len(pictures) == 1 else pictures for name, pictures in found.items()}


def _picture(name: str, path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            alpha = "A" in picture.getbands() or "transparency" in picture.info
            return picture.convert("L" if "mask" in name else "RGBA" if alpha else "RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"input {name!r} must be a picture, got '{path}', which does not open as one ({type(error).__name__}); convert it "
            "to PNG"
        ) from error


def _array(name: str, path: Path) -> torch.Tensor:
    import numpy as np

    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))[None]
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(
            f"input {name!r} must be an array of numbers, got '{path}', which does not load as one ({type(error).__name__}); "
            "write it with numpy.save"
        ) from error


def stops_at_latents(pipeline: Any) -> bool:
    """Whether the pipeline has an autoencoder that its call leaves out for `output_type="latent"`, as its code says."""
    code = getattr(inspect.unwrap(type(pipeline).__call__), "__code__", None)
    return getattr(pipeline, "vae", None) is not None and code is not None and "latent" in code.co_consts


DENOISER_NAMES = ("transformer", "unet", "prior", "denoiser", "dit", "decoder", "image_unet")


def denoisers_of(pipeline: Any) -> dict[str, nn.Module]:
    """The denoisers that share a pipeline's trajectory, by name: *the* denoiser first, then the one of the later timesteps.

    The first is the first of `DENOISER_NAMES` that the pipeline has. The second, which few have (Wan 2.2), is called like it
    with `_2` behind; each is called at its own timesteps.

    Raises:
        ValueError: None of the components is a denoiser.
    """
    pairs = [(name, f"{name}_2") for name in DENOISER_NAMES]
    for pair in pairs:
        modules = {name: getattr(pipeline, name, None) for name in pair}
        found = {name: module for name, module in modules.items() if isinstance(module, nn.Module)}
        if found:
            return found
    raise ValueError(
        f"a pipeline must have a denoiser named {', '.join(DENOISER_NAMES)}, got {type(pipeline).__name__} "
        "without one; use collect_from_loop with the module and your own sampling loop"
    )


def denoiser_of(pipeline: Any) -> tuple[str, nn.Module]:
    """The name and module of a pipeline's only or first denoiser. Raises what `denoisers_of` raises."""
    return next(iter(denoisers_of(pipeline).items()))


def load_prompts(path: str | Path) -> list[str]:
    """Prompts of a UTF-8 text file: one per line, blank lines and lines that start with `#` skipped.

    With tabs, the first column counts, and a first line that names it `prompt`, `text` or `caption` is a header
    (the layout of PartiPrompts).

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is no UTF-8 text or has no prompt in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"the prompts must be in a text file, got '{path}', which is none; check the path"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the prompts must be UTF-8 text, got '{path}' with {error.reason}; convert it"
        ) from error
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if (
        lines
        and "\t" in lines[0]
        and lines[0].split("\t")[0].strip().lower() in ("prompt", "text", "caption")
    ):
        lines = lines[1:]
    prompts = [prompt for line in lines if (prompt := line.split("\t")[0].strip())]
    if not prompts:
        raise ValueError(
            f"the prompt file must have at least one prompt, got none in '{path}'; write one per line"
        )
    return prompts


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Hide the pipeline's own progress bar and put its configuration back."""
    before = getattr(pipeline, "_progress_bar_config", None)
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is not None:
            pipeline._progress_bar_config = before
        elif hasattr(pipeline, "_progress_bar_config"):
            del pipeline._progress_bar_config
