"""What several commands take, and how they read it: arguments with their help, pipelines, output directories, options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from difloat import processes
from difloat.tables import console

Source = Annotated[
    str,
    typer.Argument(help="A diffusers pipeline directory, or an embedded model: emoji-unet, emoji-pixart."),
]
Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint that difloat quantize has written.")]
Prompts = Annotated[
    Path | None, typer.Option(help="Text file, one prompt per line. Default: built-in prompts.")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampler steps. Default: the pipeline's own.")]
Guidance = Annotated[
    float | None, typer.Option(help="Classifier-free guidance scale. Default: the pipeline's own.")
]
Images = Annotated[int, typer.Option(min=0, help="Pictures drawn with both models for the report; 0: none.")]
Target = Annotated[str, typer.Option(help="any, or cpu: only formats that CPUs compute in integers.")]
Components = Annotated[
    str | None,
    typer.Option(
        help="Quantize others than the denoiser too, without data: transformer,text_encoder,vae=w8a8."
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Pictures sampled at once.")]

Loras = Annotated[
    list[str] | None,
    typer.Option(help="A LoRA to use, FILE or FILE:WEIGHT with the factor of its change; repeatable."),
]


def meet() -> None:
    """Join the other processes of a launch, if there are some; only the main one prints from here on."""
    processes.join("cpu")
    console.quiet = not processes.is_main()


def pipeline_of(source: str) -> Any:
    """Load a pipeline without the loading bars and hints of diffusers and transformers: we have our own."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    from difloat import study

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    return study.load_pipeline(source)


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse an output directory that is taken, or that is no checkpoint and would be replaced."""
    from difloat.io.manifest import MANIFEST

    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise FileExistsError(
            f"output directory must be new or empty, got {str(out)!r}; choose another or say --overwrite"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / MANIFEST).is_file():
        raise FileExistsError(
            f"--overwrite replaces only difloat checkpoints, got {str(out)!r}, which is none; choose another directory"
        )


def options_of(pairs: Sequence[str]) -> dict[str, str]:
    """`--set name=value` pairs as a dictionary; ValueError on anything else."""
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(
                f"--set must be name=value, got {pair!r}; write for example --set rounding=nearest"
            )
    return dict(pair.split("=", 1) for pair in pairs)


def loras_of(texts: Sequence[str]) -> list[tuple[str, float]]:
    """`--lora` values as files and weights; a colon without a number after it belongs to the file's name."""
    found = []
    for text in texts:
        file, _, weight = text.rpartition(":")
        number = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", weight)
        found.append((file, float(weight)) if file and number else (text, 1.0))
    return found
