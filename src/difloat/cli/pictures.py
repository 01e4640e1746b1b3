"""Commands that draw: generate, evaluate, report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from difloat.cli import tables
from difloat.cli.app import app
from difloat.cli.fields import Fields, Words, with_fields
from difloat.cli.options import (
    SAMPLER,
    Batch,
    Inputs,
    Loras,
    Source,
    call_of,
    loras_of,
    meet,
    pipeline_of,
)
from difloat.cli.tables import console
from difloat.evaluation.generation import PER_CALL
from difloat.plan.request import MOST_SEED

if TYPE_CHECKING:
    from difloat.report.render import Record

_IMAGES = 8  # pictures that are drawn later, unless the user says how many


Pictures = Annotated[
    Path | None,
    typer.Option("--cache", help="Folder of full-precision pictures: those in it are not drawn again."),
]


@app.command()
@with_fields
def generate(
    source: Source,
    out: Annotated[Path, typer.Argument(help="Directory for the PNG files, of sounds NumPy files.")],
    inputs: Annotated[Inputs, Fields(Inputs)],
    sampler: Annotated[Words, SAMPLER],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt. Repeatable.")] = None,
    count: Annotated[
        int, typer.Option(min=1, help="Number of pictures. Prompts are used again from the start.")
    ] = 4,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="Seed of the first picture. The next ones count up.")
    ] = 0,
    batch: Batch = 8,
    lora: Loras = None,
) -> None:
    """Draw pictures with a full-precision or quantized pipeline. Processes of a launch share them."""
    import numpy as np
    from PIL import Image

    from difloat import distributed, evaluation, run
    from difloat.checkpoint.directories import resolved
    from difloat.lora import adapters
    from difloat.report import build

    place = meet(inputs.device)
    if resolved(out).exists() and not out.is_dir():
        raise NotADirectoryError(f"output must be a directory, got the file {str(out)!r}; choose another")
    pipeline = pipeline_of(source, place)
    for number, (file, weight) in enumerate(loras_of(lora or [])):
        adapters.load(pipeline, file, f"lora{number}", weight)
    texts = list(prompt) if prompt else run.prompts_of(pipeline, source, inputs.prompts)
    guidance, arguments = call_of(pipeline, source, sampler["guidance_scale"], inputs)
    seeds = list(range(seed, seed + count))
    drawn = evaluation.generate(
        pipeline,
        texts,
        seeds=seeds,
        steps=sampler["steps"],
        guidance_scale=guidance,
        batch_size=batch,
        call_kwargs=arguments,
    )
    if not distributed.is_main():
        return
    out.mkdir(parents=True, exist_ok=True)
    frames = [""] if drawn.frames == 1 else [f"-{frame:04d}" for frame in range(drawn.frames)]
    names = [f"{number:05d}{frame}.png" for number in seeds for frame in frames]
    for name, picture in zip(names, build.to_uint8(drawn.images), strict=False):  # sounds have none
        Image.fromarray(picture).save(out / name)
    if drawn.signal is not None:
        for number, one in zip(seeds, drawn.signal, strict=True):
            np.save(out / f"{number:05d}.npy", one.numpy())
    what = "pictures" if drawn.signal is None and drawn.frames == 1 else "samples"
    console.print(f"{count} {what} in {out}, {drawn.seconds / count:.2f} s each", highlight=False)


@app.command()
@with_fields
def evaluate(
    reference: Annotated[
        str, typer.Argument(help="The full-precision pipeline: directory or embedded model.")
    ],
    quantized: Annotated[str, typer.Argument(help="The quantized pipeline's directory.")],
    inputs: Annotated[Inputs, Fields(Inputs)],
    sampler: Annotated[Words, SAMPLER],
    samples: Annotated[int, typer.Option(min=2, help="Pictures per model.")] = 64,
    batch: Batch = PER_CALL,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            help="Gate like psnr=20 or frechet_to_data<=12. Exit code 1 says that one is broken. Repeatable."
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the evaluation as JSON.")] = None,
    cache: Pictures = None,
) -> None:
    """Compare a quantized pipeline with the full-precision one. Processes of a launch share the pictures."""
    from difloat import distributed, run
    from difloat.checkpoint.directories import resolved
    from difloat.evaluation import gates, picture_metrics

    rules = [gates.parse(rule) for rule in fail_under or []]  # a misspelled gate must not cost the pictures
    if save is not None and not resolved(save, "--save").parent.is_dir():
        raise FileNotFoundError(f"--save must name a file in a directory that is there, got {str(save)!r}")
    place = meet(inputs.device)
    first, second = pipeline_of(reference, place), pipeline_of(quantized, place)
    texts = run.prompts_of(first, reference, inputs.prompts)
    guidance, arguments = call_of(first, reference, sampler["guidance_scale"], inputs)
    sampling = run.Sampling(texts, samples, sampler["steps"], guidance, batch, arguments)
    unknown = [rule.metric for rule in rules if rule.metric in picture_metrics.NEED_CAPTIONS]
    if unknown and not sampling.has_known_captions:
        raise ValueError(
            f"a gate on {unknown[0]} must come with captions of the embedded models as prompts, got others; "
            "gate on psnr, ssim or perceptual"
        )
    full, packed = run.draw(first, sampling, kept=cache), run.draw(second, sampling)
    if not distributed.is_main():
        return
    evaluation = run.judge(full, packed, sampling)
    table = Table(
        "measure", "value", "95 % interval", title=f"{quantized} against {reference}, {samples} pictures"
    )
    for _, metric, found in evaluation.rows():
        value = f"{found.value:.4g} {metric.unit}".strip()
        table.add_row(metric.label, value, tables.interval(found.low, found.high))
    console.print(table)
    if save is not None:
        save.write_text(evaluation.to_json(), encoding="utf-8")
    failures = gates.gate(evaluation, fail_under or [])
    for failure in failures:
        console.print(failure, markup=False, highlight=False)
    if failures:
        raise typer.Exit(1)


def _drawn_later(
    source: str,
    out: Path,
    count: int,
    inputs: Inputs,
    sampler: Words,
    batch: int,
    cache: Path | None,
) -> Record | None:
    """Draw with the pipeline, free it, and draw with the checkpoint. Whatever fails, the pictures drawn so far are kept."""
    from difloat import api, run
    from difloat.report import build

    device, before = meet(inputs.device), build.read(out)[0]
    pipeline = pipeline_of(source, device)
    if (got := type(api.denoiser(pipeline)).__name__) != before.model_class:
        raise ValueError(
            f"source must be the pipeline that {str(out)!r} was made from, with a {before.model_class}, got one with a {got}; "
            f"name the other ({before.model!r} when it was made)"
        )
    texts = run.prompts_of(pipeline, source, inputs.prompts)
    guidance, arguments = call_of(pipeline, source, sampler["guidance_scale"], inputs)
    folder = cache if cache is not None else _kept_by_default()
    sampling = run.Sampling(texts, count, sampler["steps"], guidance, batch, arguments)
    reference = run.draw(pipeline, sampling, kept=folder)
    dtype = next(tensor.dtype for tensor in api.denoiser(pipeline).parameters())
    del pipeline  # the checkpoint takes its place in memory
    return run.draw_later(reference, out, sampling, folder, dtype, device)


def _kept_by_default() -> Path:
    """Where pictures are kept: in the user's cache, where it is by the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "difloat" / "pictures"


@app.command()
@with_fields
def report(
    source: Annotated[
        str,
        typer.Argument(
            help="The checkpoint, or the full-precision pipeline that the next one was made from."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(help="The checkpoint, to draw pictures with both and complete its report."),
    ] = None,
    *,
    inputs: Annotated[Inputs, Fields(Inputs)],
    sampler: Annotated[Words, SAMPLER],
    images: Annotated[int | None, typer.Option(min=2, help="Pictures to draw with both models.")] = None,
    batch: Batch = 1,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Keeps every picture drawn: a killed run goes on from there, and full-precision ones serve later comparisons. "
            "Default: difloat/pictures in the user's cache (XDG_CACHE_HOME)."
        ),
    ] = None,
) -> None:
    """Make a checkpoint's report.html again, or draw pictures with the pipeline it was made from and complete it."""
    from difloat.report import build
    from difloat.report import render as pages

    if out is None:
        if images is not None:
            raise ValueError(
                f"pictures must be drawn with two models, got {source!r}; say difloat report SOURCE {source} --images {images}"
            )
        made, left, right = build.read(Path(source))
        tables.print_summary(made)
        page = pages.render(made, left, right, Path(source) / build.PAGE)
        console.print(f"report     {page}", highlight=False, soft_wrap=True)
        return
    count = _IMAGES if images is None else images
    complete = _drawn_later(source, out, count, inputs, sampler, batch, cache)
    if complete is not None:
        tables.print_made(complete, out)
