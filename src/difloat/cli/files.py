"""Commands for files of other programs: export, import, validate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from difloat.cli.app import app
from difloat.cli.options import Checkpoint, Overwrite, claimed, pipeline_of
from difloat.cli.tables import console

Kind = Annotated[
    str,
    typer.Option(
        help="nvfp4 or fp8 (diffusers' bfl backend, ModelOpt), mxfp4, comfy (ComfyUI), gguf, openvino or vllm."
    ),
]
Source = Annotated[
    str, typer.Option("--from", help="Kind of the file: nvfp4, fp8, mxfp4 or comfy; see difloat export.")
]


@app.command()
def export(
    directory: Checkpoint,
    out: Annotated[
        Path,
        typer.Argument(help="A new .safetensors (.gguf, .xml) file, or a directory for it and config.json."),
    ],
    to: Kind,
    component: Annotated[str | None, typer.Option(help="Of the pipeline, if several are quantized.")] = None,
    names: Annotated[
        str,
        typer.Option(
            help="Of the tensors: source (of the single file that the model came from), diffusers, or auto: the first for "
            "comfy and gguf if there is one."
        ),
    ] = "auto",
) -> None:
    """Write a checkpoint's quantized model for another program. What the file cannot hold exactly is refused."""
    from difloat import interchange

    file = interchange.export_checkpoint(directory, out, to, component=component, names=names)
    beside = file.with_suffix(".bin")  # of OpenVINO
    size = sum(part.stat().st_size for part in (file, beside) if to == "openvino" or part == file)
    console.print(f"{to} file {file}, {decimal(size, precision=2)}", highlight=False, soft_wrap=True)
    for remark in interchange.remarks_of(directory, to, component):
        console.print(remark, highlight=False, soft_wrap=True)


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="A file of another program, or a directory with it.")],
    out: Annotated[Path, typer.Argument(help="Directory of the difloat checkpoint.")],
    source: Source,
    into: Annotated[
        str | None,
        typer.Option(help="Pipeline that the model belongs to; left out, the config.json beside the file."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn a file of another program into a difloat checkpoint. Codes and scales stay what they are."""
    from difloat import api, checkpoint, interchange

    if not path.exists():
        raise FileNotFoundError(
            f"file must be there to be imported, but {path} does not exist; check the path"
        )
    with claimed(out, overwrite):
        model = (
            interchange.model_of(path if path.is_dir() else path.parent)
            if into is None
            else pipeline_of(into)
        )
        plan = interchange.import_into(api.denoiser(model), path, source)
        checkpoint.save(model, out, overwrite=overwrite)
    console.print(f"{len(plan.layers)} quantized layers in {out}", highlight=False, soft_wrap=True)


@app.command()
def validate(
    path: Annotated[
        Path, typer.Argument(help="A quantized file or directory, of difloat or another program.")
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            help="The full-precision pipeline: tells a wrong order of nibbles or scales for certain."
        ),
    ] = None,
) -> None:
    """Say what is wrong with a quantized file. Exit code 1 says that there are errors. Suspicions are guesses."""
    from difloat import api, interchange

    state = None if reference is None else api.denoiser(pipeline_of(reference)).state_dict()
    remarks = interchange.validate(path, state)
    colours = {
        "error": "[red]error     [/red]",
        "suspicion": "[yellow]suspicion [/yellow]",
        "ok": "[green]ok[/green]",
    }
    for remark in remarks:
        place = f"{remark.place}: " if remark.place else ""
        console.print(colours[remark.level], f"{place}{remark.message}", highlight=False, soft_wrap=True)
    if any(remark.level == "error" for remark in remarks):
        raise typer.Exit(1)
