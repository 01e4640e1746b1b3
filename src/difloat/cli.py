"""The command line: `difloat inspect | quantize | generate | evaluate | report | verify | demo`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Low-bit floating-point quantization of diffusion models: one command makes a packed checkpoint and shows its cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()

Source = Annotated[
    str,
    typer.Argument(help="A diffusers pipeline directory, or an embedded model: emoji-unet, emoji-pixart."),
]
Prompts = Annotated[
    Path | None, typer.Option(help="Text file with one prompt per line. Default: built-in prompts.")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampler steps. Default: the pipeline's own.")]
Guidance = Annotated[
    float | None, typer.Option(help="Classifier-free guidance scale. Default: the pipeline's own.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures sampled at once.")]


def load_pipeline(source: str) -> Any:
    """The pipeline behind a name or a directory; one sentence if it cannot be loaded."""
    from difloat import reference_models

    if source in reference_models.NAMES:
        return reference_models.load(source)
    path = Path(source)
    if not path.exists():
        known = ", ".join(reference_models.NAMES)
        raise FileNotFoundError(
            f"source must be a pipeline directory or one of {known}, got {source!r}, which does not exist"
        )
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(
            f"source must hold model_index.json, got {source!r} without; is the download complete?"
        )
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(path)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(
            f"source must be a complete pipeline, but {source!r} does not load ({reason}); download it again"
        ) from error


def prompts_of(pipeline: Any, source: str, path: Path | None) -> list[str] | None:
    """Prompts from a file, the captions of an embedded model, built-in ones, or None for a pipeline without text."""
    from difloat import api, calibration, reference_models

    if path is not None:
        return calibration.load_prompts(path)
    if source in reference_models.NAMES:
        return reference_models.captions()
    return api.prompts_for(pipeline, None)


@app.command()
def inspect(source: Source, layers: Annotated[bool, typer.Option(help="List every layer.")] = False) -> None:
    """Show what a model consists of, and what of it can be quantized or is."""
    from difloat import api
    from difloat import layers as rooms

    module = api.denoiser(load_pipeline(source))
    table = Table("layer", "kind", "weight shape", "values", "weight format", "activation format")
    rows, values, total = [], 0, sum(parameter.numel() for parameter in module.parameters())
    for name, layer in module.named_modules():
        if isinstance(layer, rooms.QuantizedLayer):
            part = layer.parts[0]
            activation = "-" if part.activation is None else part.activation.format.name
            rows.append((name, layer.plan().kind, layer.float_shape, part.weight.format.name, activation))
    quantized = bool(rows)
    for name, plain in rooms.quantizable(module).items():
        kind = "linear" if plain.weight.dim() == 2 else "conv2d"
        rows.append((name, kind, tuple(plain.weight.shape), "float", "-"))
    for name, kind, shape, weight_format, activation in rows:
        count = 1
        for size in shape:
            count *= size
        values += count
        table.add_row(name, kind, " x ".join(map(str, shape)), f"{count:,}", weight_format, activation)
    if layers:
        console.print(table)
    state = "quantized and float" if quantized else "float"
    blocks = "" if quantized else f" in {len(rooms.blocks(module))} blocks"
    console.print(
        f"{type(module).__name__}: {len(rows)} {state} layers{blocks} with {values:,} weights; {total:,} stored values in all"
    )


@app.command()
def quantize(
    source: Source,
    out: Annotated[Path, typer.Argument(help="Directory of the packed checkpoint.")],
    recipe: Annotated[str, typer.Option(help="lbfp, qdiffusion or rtn.")] = "lbfp",
    bits: Annotated[
        str, typer.Option(help="Weight and activation bits, like w4a8; a16 leaves activations alone.")
    ] = "w4a8",
    prompts: Prompts = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration rows: denoiser inputs kept.")] = 256,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    memory_mb: Annotated[
        int, typer.Option(min=1, help="Calibration data held in RAM, in MB; the rest goes to disk.")
    ] = 2048,
    cache: Annotated[
        Path | None,
        typer.Option(help="Keeps calibration data and finished blocks: a killed run goes on from there."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="Option of the recipe, like --set rounding=nearest; repeatable."),
    ] = None,
    images: Annotated[int, typer.Option(min=0, help="Pictures for the report; 0 leaves pictures out.")] = 16,
    dry_run: Annotated[bool, typer.Option(help="Print plan, size, memory and time, and stop.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint that is there.")] = False,
) -> None:
    """Quantize a pipeline's denoiser, write the packed checkpoint and a report of what it cost."""
    from difloat import api, recipes
    from difloat.methods.posttraining import Bits

    chosen = _options(option or [])
    recipes.make_options(recipes.lookup(recipe), chosen)
    Bits.parse(bits)
    _check_out(out, overwrite)
    pipeline = load_pipeline(source)
    texts = prompts_of(pipeline, source, prompts)
    arguments = {
        "samples": samples,
        "seed": seed,
        "memory_bytes": memory_mb << 20,
        "steps": steps,
        "guidance_scale": guidance,
    }
    _print_estimate(pipeline, texts, arguments, recipe, bits, chosen)
    if dry_run:
        return
    start = time.perf_counter()
    plan = api.plan(pipeline, recipe, bits, prompts=texts, cache_dir=cache, **arguments, **chosen)
    seconds = {"quantize, all": time.perf_counter() - start}
    _finish(pipeline, plan, source, out, texts, images, steps, guidance, seconds, overwrite)


def _finish(
    pipeline: Any,
    plan: Any,
    source: str,
    out: Path,
    texts: Sequence[str] | None,
    images: int,
    steps: int | None,
    guidance: float | None,
    seconds: dict[str, float],
    overwrite: bool,
) -> None:
    """Draw with both models, save, reload, write the report, print the summary."""
    import difloat
    from difloat import api, layers, recipes, record

    module = api.denoiser(pipeline)
    float_twin = layers.shadow(module)
    drawn = evaluation = None
    if images:
        reference = _draw(pipeline, texts, images, steps, guidance, trajectory=True)
        seconds["pictures, full precision"] = reference.seconds
    api.apply(pipeline, plan)
    difloat.save(pipeline, out, overwrite=overwrite)
    if images:
        drawn = _draw(difloat.load(out), texts, images, steps, guidance, trajectory=True)
        seconds["pictures, quantized (reloaded)"] = drawn.seconds
        evaluation = _judge(reference, drawn, texts)
    shown = min(images, 24)
    notes = (sys.modules[recipes.lookup(plan.recipe).plan.__module__].__doc__ or "").split("\n\n")[1:]
    prompts = [] if texts is None else [texts[i % len(texts)] for i in range(shown)]
    made = record.build(
        float_twin,
        plan,
        name=source,
        evaluation=evaluation,
        prompts=prompts,
        seeds=list(range(shown)),
        timings=seconds,
        notes=notes,
    )
    empty = record.to_uint8(__import__("torch").zeros(0, 3, 8, 8))
    left = record.to_uint8(reference.images[:shown]) if images else empty
    right = record.to_uint8(drawn.images[:shown]) if drawn is not None else empty
    page = record.write(made, left, right, out)
    _print_summary(made)
    console.print(f"checkpoint {out}\nreport     {page}")


def _draw(
    pipeline: Any,
    texts: Sequence[str] | None,
    count: int,
    steps: int | None,
    guidance: float | None,
    **kwargs: Any,
) -> Any:
    from difloat import evaluate

    return evaluate.generate(
        pipeline, texts, seeds=list(range(count)), steps=steps, guidance_scale=guidance, **kwargs
    )


def _judge(reference: Any, quantized: Any, texts: Sequence[str] | None) -> Any:
    """Compare two sets of pictures; distances to data and retrieval where the prompts are the embedded models' own."""
    from difloat import evaluate, features, reference_models

    count = len(reference.images)
    captions = None if texts is None else [texts[i % len(texts)] for i in range(count)]
    known = captions is not None and set(captions) <= set(reference_models.captions())
    return evaluate.compare(
        reference,
        quantized,
        features=features.features,
        feature_maps=features.feature_maps,
        data_moments=features.data_statistics() if known else None,
        captions=captions if known else None,
        retrieval=features.retrieval if known else None,
    )


def _options(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set must be name=value, got {pair!r}")
    return dict(pair.split("=", 1) for pair in pairs)


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(
            f"output directory must be new or empty, got {str(out)!r}; choose another or say --overwrite"
        )


def _print_estimate(
    pipeline: Any,
    texts: Sequence[str] | None,
    arguments: dict[str, Any],
    recipe: str,
    bits: str,
    chosen: dict[str, str],
) -> None:
    from difloat import api, calibration, layers

    settings = calibration.CalibrationSettings(**arguments)
    need = calibration.estimate(pipeline, texts, settings)
    module = api.denoiser(pipeline)
    found = layers.quantizable(module)
    weights = sum(layer.weight.numel() for layer in found.values())
    rest = sum(p.nbytes for p in module.parameters()) - sum(layer.weight.nbytes for layer in found.values())
    packed = weights * int(bits[1:].split("a")[0]) / 8 + rest
    chosen_text = "".join(f", {name}={value}" for name, value in chosen.items())
    console.print(
        f"{recipe} {bits}{chosen_text}: {len(found)} layers in {len(layers.blocks(module))} blocks, {weights:,} weights, "
        f"about {packed / 1e6:.1f} MB packed (from {2 * sum(p.numel() for p in module.parameters()) / 1e6:.1f} MB in 16 bits)\n"
        f"calibration: {need['rows']:.0f} rows from {need['calls']:.0f} denoiser calls, about {need['seconds']:.0f} s, "
        f"{need['ram_bytes'] / 1e6:.0f} MB RAM, {need['disk_bytes'] / 1e6:.0f} MB disk where a cache is kept"
    )


def _print_summary(made: Any) -> None:
    table = Table("measure", "value", "95 % interval", "full precision", title=f"{made.title}")
    for row in made.quality:
        reference = "" if row["reference"] is None else f"{row['reference']:.4g}"
        table.add_row(
            row["label"],
            f"{row['value']:.4g} {row['unit']}".strip(),
            f"{row['low']:.4g} to {row['high']:.4g}",
            reference,
        )
    table.add_row(
        "size",
        f"{made.packed_bytes / 1e6:.2f} MB",
        f"{made.effective_bits:.2f} bits per quantized weight",
        f"{made.original_bytes / 1e6:.2f} MB",
    )
    console.print(table)


@app.command()
def generate(
    source: Source,
    out: Annotated[Path, typer.Argument(help="Directory for the PNG files.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeatable.")] = None,
    prompts: Prompts = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures; prompts are used again from the start.")] = 4,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    batch: Batch = 8,
) -> None:
    """Draw pictures with a full-precision or quantized pipeline."""
    from PIL import Image

    from difloat import evaluate, record

    pipeline = load_pipeline(source)
    texts = list(prompt) if prompt else prompts_of(pipeline, source, prompts)
    seeds = list(range(seed, seed + count))
    drawn = evaluate.generate(
        pipeline, texts, seeds=seeds, steps=steps, guidance_scale=guidance, batch_size=batch
    )
    out.mkdir(parents=True, exist_ok=True)
    for number, picture in zip(seeds, record.to_uint8(drawn.images), strict=True):
        Image.fromarray(picture).save(out / f"{number:05d}.png")
    console.print(f"{count} pictures in {out} ({drawn.seconds / count:.2f} s each)")


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
    fail_under: Annotated[
        list[str] | None,
        typer.Option(help="Gate like psnr=20 or frechet_to_data<=12; exit code 1 if broken."),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the evaluation as JSON.")] = None,
) -> None:
    """Compare a quantized pipeline with the full-precision one on the same seeds and prompts."""
    from difloat import evaluate as judge

    first, second = load_pipeline(reference), load_pipeline(quantized)
    texts = prompts_of(first, reference, prompts)
    drawn = [
        _draw(p, texts, samples, steps, guidance, trajectory=True, batch_size=batch) for p in (first, second)
    ]
    evaluation = _judge(drawn[0], drawn[1], texts)
    table = Table(
        "measure", "value", "95 % interval", title=f"{quantized} against {reference}, {samples} pictures"
    )
    for _, metric, estimate in evaluation.rows():
        table.add_row(
            metric.label,
            f"{estimate.value:.4g} {metric.unit}".strip(),
            f"{estimate.low:.4g} to {estimate.high:.4g}",
        )
    console.print(table)
    if save is not None:
        save.write_text(evaluation.to_json(), encoding="utf-8")
    failures = judge.gate(evaluation, fail_under or [])
    for failure in failures:
        console.print(failure, markup=False)
    if failures:
        raise typer.Exit(1)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A checkpoint that difloat quantize has written.")],
) -> None:
    """Make report.html again from the data beside a checkpoint."""
    from difloat import record
    from difloat import report as pages

    made, left, right = record.read(directory)
    _print_summary(made)
    console.print(f"report {pages.render(made, left, right, directory / record.PAGE)}")


@app.command()
def verify(directory: Annotated[Path, typer.Argument(help="A checkpoint directory.")]) -> None:
    """Prove a checkpoint: hashes, shapes, scales, legal codes, bit-exact re-encoding, size. Exit code 1 if anything fails."""
    import difloat

    findings = difloat.verify(directory)
    for finding in findings:
        mark = "[green]ok[/green]  " if finding.passed else "[red]FAIL[/red]"
        console.print(f"{mark} {finding.check:10}", finding.component, finding.message)
    if not all(finding.passed for finding in findings):
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the checkpoint and the report.")] = Path(
        "demo-out"
    ),
    model: Annotated[str, typer.Option(help="emoji-pixart or emoji-unet.")] = "emoji-pixart",
) -> None:
    """Quantize an embedded model to FP4 weights and FP8 activations and show what it cost, in a few minutes."""
    console.print(f"[bold]difloat demo[/bold]: {model}, LBFP, FP4 weights, FP8 activations, learned rounding")
    target = out / f"{model}-lbfp-w4a8"
    quantize(
        model,
        target,
        recipe="lbfp",
        bits="w4a8",
        samples=128,
        option=["iterations=120", "rounding_rows=128"],
        images=24,
        overwrite=True,
    )
    verify(target)


def main() -> None:
    """Run the command line; bad input gives one sentence and exit code 2."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print(
            "interrupted; with --cache the next run goes on from the last finished block"
        )
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
