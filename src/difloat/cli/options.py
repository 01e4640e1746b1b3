"""What several commands take, and how they read it: arguments with their help, pipelines, output directories, options."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from difloat import devices, distributed
from difloat.cli.fields import Fields
from difloat.cli.tables import console
from difloat.plan.request import CalibrationSettings
from difloat.plan.validation import LISTED, Rule, Whole, record

Source = Annotated[
    str,
    typer.Argument(
        help="A pipeline: directory, hub name (owner/model), file of a checkpoint, component's directory, or an embedded "
        "model (emoji-unet, emoji-pixart)."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub name.")]
Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint that difloat quantize has written.")]
For = Annotated[
    str | None,
    typer.Option(
        "--for", help="A kind of file that shall hold it exactly: comfy, gguf, openvino, vllm or diffusers."
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Pictures sampled at once.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", help="Option of the recipe, like --set rounding=nearest; repeatable."),
]


@record("input")
class Inputs:
    """What goes into a pipeline, and where it computes.

    Attributes:
        prompts: Text file, one prompt per line. If it is left out, the built-in prompts.
        call: Argument of the pipeline's call, like --call height=512 --call width=512.
        input: Argument of the call that is a picture or a NumPy file, like --input image=photo.png. Several of one name make a
            list.
        device: Where to compute: cpu, cuda, cuda:1, xpu or mps. auto is the first of CUDA, XPU, MPS and CPU that is here.
    """

    prompts: Path | None = None
    call: Annotated[tuple[str, ...], LISTED] = ()
    input: Annotated[tuple[str, ...], LISTED] = ()
    device: str = "auto"


@record("outcome", each="--{}")
class Outcome:
    """What becomes of a plan.

    Attributes:
        images: Pictures drawn with both models for the report, after the checkpoint is saved. 0 draws none. If it is left out,
            16 for models of up to 100 million weights, and none for larger ones.
        size: Bytes of the denoiser on disk, such as 300MB, in place of weight bits. Recipe auto keeps to it.
        offload: "disk" reads and writes block by block, for models larger than the memory and plans that need no data.
        dry_run: Print plan, size, memory and time, and stop.
        overwrite: Replace a checkpoint that is there.
    """

    images: Whole | None = None
    size: str | None = None
    offload: Annotated[Literal["none", "disk"], Rule("be disk or none")] = "none"
    dry_run: bool = False
    overwrite: bool = False


SAMPLER = Fields(CalibrationSettings, only=("steps", "guidance_scale"))  # of commands that only draw
_OPTIONS_OF_THEIR_OWN = {
    "prompt": "--prompts",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "generator": "--seed",
    "batch_size": "--batch",
}
_FIXED = ("output_type", "return_dict", "latents", "num_images_per_prompt", "callback_on_step_end")

Loras = Annotated[
    list[str] | None,
    typer.Option(help="A LoRA to use, FILE or FILE:WEIGHT with the factor of its change; repeatable."),
]


def meet(device: str) -> torch.device:
    """Join the other processes of a launch, if there are some; only the main one prints from here on.

    Returns:
        The device of that name; on a machine with several GPUs "cuda" is a GPU for every process.

    Raises:
        ValueError: as from `devices.resolve`.
    """
    try:
        found = devices.resolve(device)
    except ValueError:
        distributed.join("cpu")  # so that one process of several says so
        raise
    distributed.join(found)
    console.quiet = not distributed.is_main()
    return found


def quiet_libraries() -> None:
    """Switch off the loading bars and hints of diffusers and transformers: we have our own."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()


def pipeline_of(name: str, device: torch.device | str | None = None, **where: Any) -> Any:
    """Load a pipeline without the bars and hints of other libraries.

    Args:
        name: What the user calls it.
        device: Where it is put, or None for the CPU.
        **where: Further fields of `sources.Source`.
    """
    from difloat import run

    quiet_libraries()
    return run.load_pipeline(name, device=device, **where)


def check_out(out: Path, overwrite: bool, cache: Path | None = None) -> None:
    """Refuse an output directory that is taken, whose replacement would cost the user a file, or that holds the cache.

    Raises:
        FileExistsError: if there is something and `--overwrite` is not given, or is no checkpoint.
        ValueError: if a file in it is not difloat's, a path is a link to itself, or `cache` lies in it.
    """
    from difloat.checkpoint.directories import check_target, resolved
    from difloat.checkpoint.manifest import MANIFEST

    target = resolved(out)
    if cache is not None:
        kept = resolved(cache, "--cache")
        if kept == target or target in kept.parents:
            raise ValueError(
                f"--cache must lie outside of the output directory, which appears whole at the end, got {str(cache)!r} in "
                f"{str(out)!r}; choose another directory"
            )
    taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if taken and not overwrite:
        raise FileExistsError(
            f"output directory must be new or empty, got {str(out)!r}; choose another or say --overwrite"
        )
    if taken and not (target / MANIFEST).is_file():
        raise FileExistsError(
            f"--overwrite replaces only difloat checkpoints, got {str(out)!r}, which is none; choose another directory"
        )
    check_target(target, overwrite)


@contextmanager
def claimed(out: Path, overwrite: bool, cache: Path | None = None, dry_run: bool = False) -> Iterator[None]:
    """`check_out`, and no other run may write into `out` during the block, unless nothing is written.

    Of several processes the main one sees to it.
    """
    from difloat.checkpoint.directories import reserved, resolved

    with ExitStack() as held:
        with distributed.together():
            if distributed.is_main():
                check_out(out, overwrite, cache)
            if distributed.is_main() and not dry_run:
                held.enter_context(reserved(resolved(out)))
                check_out(out, overwrite, cache)  # what a killed run had moved away is back
        yield


def options_of(
    pairs: Sequence[str], flag: str = "--set", example: str = "rounding=nearest"
) -> dict[str, str]:
    """The `name=value` pairs of a repeatable flag as a dictionary. Anything else is a ValueError."""
    for pair in pairs:
        if not pair.partition("=")[0] or "=" not in pair:
            raise ValueError(f"{flag} must be name=value, got {pair!r}; write for example {flag} {example}")
    return dict(pair.split("=", 1) for pair in pairs)


def loras_of(texts: Sequence[str]) -> list[tuple[str, float]]:
    """The `--lora` values as files and weights. A colon without a number after it belongs to the file's name."""
    found = []
    for text in texts:
        file, _, weight = text.rpartition(":")
        number = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", weight)
        found.append((file, float(weight)) if file and number else (text, 1.0))
    return found


def with_size(words: dict[str, str], size: str | None) -> dict[str, str]:
    """The recipe's options with what ``--size`` asks for, which is the option `size` of recipes that choose widths.

    Raises:
        ValueError: if ``--set size=`` says it, too.
    """
    if size is None:
        return words
    if "size" in words:
        raise ValueError(
            f"--size must stand without --set size={words['size']}, got {size!r}; leave one of them out"
        )
    return {**words, "size": size}


def call_of(
    pipeline: Any, source: str, guidance: float | None, inputs: Inputs
) -> tuple[float | None, dict[str, Any]]:
    """Guidance and the other arguments of the pipeline's call: an embedded model's own, then what the user gives.

    Values of ``--call`` are numbers, true, false, null or JSON where they read so, text otherwise. Those of ``--input`` are
    files.

    Raises:
        ValueError: if the pipeline's call has no such argument, or it has an option of its own, or a file holds none.
        FileNotFoundError: if there is no such file.
    """
    from difloat import pipelines, run

    guidance, call = run.call_of(source, guidance)
    given = options_of(inputs.call, "--call", "height=512")
    files = pipelines.inputs_of(inputs.input)
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")
    for flag, names in {"--call": given, "--input": files}.items():
        for name in names:
            _check_argument(pipeline, flag, name, given.get(name))
    for name, text in given.items():
        try:
            call[name] = json.loads(text)
        except json.JSONDecodeError:
            call[name] = text
    return guidance, call | files


def _check_argument(pipeline: Any, flag: str, name: str, text: str | None) -> None:
    """Refuse an argument of the call that difloat sets, that has an option of its own, or that the pipeline does not take."""
    from difloat import pipelines

    got = "" if text is None else f", got {text!r}"
    if name in _FIXED:
        raise ValueError(f"{flag} must not set {name}, which difloat sets itself{got}; leave it out")
    if name in _OPTIONS_OF_THEIR_OWN:
        raise ValueError(
            f"{flag} must not set {name}, which has an option of its own{got}; use {_OPTIONS_OF_THEIR_OWN[name]}"
        )
    if name not in pipelines.parameters_of(pipeline):  # **kwargs would swallow a misspelled one
        raise ValueError(
            f"{flag} must name arguments that {type(pipeline).__name__} takes, got {name!r}; leave it out"
        )
