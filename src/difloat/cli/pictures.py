"""Commands that draw: generate, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from difloat.cli import tables
from difloat.cli.app import app
from difloat.cli.options import (
    Batch,
    Call,
    Guidance,
    Loras,
    Prompts,
    Source,
    Steps,
    call_of,
    loras_of,
    meet,
    pipeline_of,
)
from difloat.cli.tables import console
from difloat.plan.request import MOST_SEED


@app.command()
def generate(
    source: Source,
    out: Annotated[Path, typer.Argument(help="Directory for the PNG files, of sounds NumPy files.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeatable.")] = None,
    prompts: Prompts = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures; prompts are used again from the start.")] = 4,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="Seed of the first picture; the next ones count up.")
    ] = 0,
    batch: Batch = 8,
    lora: Loras = None,
    call: Call = None,
) -> None:
    """Draw pictures with a full-precision or quantized pipeline; processes of a launch share them."""
    import numpy as np
    from PIL import Image

    from difloat import distributed, evaluation, run
    from difloat.checkpoint.directories import resolved
    from difloat.lora import adapters
    from difloat.report import build

    meet()
    if resolved(out).exists() and not out.is_dir():
        raise NotADirectoryError(f"output must be a directory, got the file {str(out)!r}; choose another")
    pipeline = pipeline_of(source)
    for number, (file, weight) in enumerate(loras_of(lora or [])):
        adapters.load(pipeline, file, f"lora{number}", weight)
    texts = list(prompt) if prompt else run.prompts_of(pipeline, source, prompts)
    guidance, arguments = call_of(pipeline, source, guidance, call)
    seeds = list(range(seed, seed + count))
    drawn = evaluation.generate(
        pipeline,
        texts,
        seeds=seeds,
        steps=steps,
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
def evaluate(
    reference: Annotated[
        str, typer.Argument(help="The full-precision pipeline: directory or embedded model.")
    ],
    quantized: Annotated[str, typer.Argument(help="The quantized pipeline's directory.")],
    prompts: Prompts = None,
    samples: Annotated[int, typer.Option(min=2, help="Pictures per model.")] = 64,
    steps: Steps = None,
    guidance: Guidance = None,
    batch: Batch = 50,
    call: Call = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            help="Gate like psnr=20 or frechet_to_data<=12, repeatable; exit code 1 if one is broken."
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the evaluation as JSON.")] = None,
) -> None:
    """Compare a quantized pipeline with the full-precision one; processes of a launch share the pictures."""
    from difloat import distributed, run
    from difloat.checkpoint.directories import resolved
    from difloat.evaluation import gates, picture_metrics

    rules = [gates.parse(rule) for rule in fail_under or []]  # a misspelled gate must not cost the pictures
    if save is not None and not resolved(save, "--save").parent.is_dir():
        raise FileNotFoundError(f"--save must name a file in a directory that is there, got {str(save)!r}")
    meet()
    first, second = pipeline_of(reference), pipeline_of(quantized)
    texts = run.prompts_of(first, reference, prompts)
    guidance, arguments = call_of(first, reference, guidance, call)
    sampling = run.Sampling(texts, samples, steps, guidance, batch, arguments)
    unknown = [rule.metric for rule in rules if rule.metric in picture_metrics.NEED_CAPTIONS]
    if unknown and not sampling.has_known_captions:
        raise ValueError(
            f"a gate on {unknown[0]} must come with captions of the embedded models as prompts, got others; "
            "gate on psnr, ssim or perceptual"
        )
    full, packed = run.draw(first, sampling), run.draw(second, sampling)
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
