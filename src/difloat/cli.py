"""The command line: `difloat inspect | quantize | repair | generate | evaluate | report | verify | demo`."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from difloat import tables
from difloat.tables import console

if TYPE_CHECKING:
    pass

app = typer.Typer(
    help="Low-bit floating-point quantization of diffusion models: one command makes a packed checkpoint and shows its cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_INTERRUPTED = 130  # typer's exit code for Ctrl-C

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
Batch = Annotated[int, typer.Option(min=1, help="Pictures sampled at once.")]


def _pipeline(source: str) -> Any:
    """Load a pipeline without the loading bars and hints of diffusers and transformers: we have our own."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    from difloat import study

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    return study.load_pipeline(source)


@app.command()
def inspect(
    source: Source,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer.")] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="Say what computes it on this machine.")] = False,
) -> None:
    """Show what a model consists of, and what of it can be quantized or is."""
    from difloat import api, tiers
    from difloat import layers as rooms

    module = api.denoiser(_pipeline(source))
    rows: list[tuple[str, str, Sequence[int], str, str]] = []
    for name, layer in module.named_modules():
        if isinstance(layer, rooms.QuantizedLayer):
            spec = layer.parts[0].activation
            activation = "-" if spec is None else spec.format.name
            weight_format = " + ".join(dict.fromkeys(part.weight.format.name for part in layer.parts))
            rows.append((name, layer.plan().kind, layer.float_shape, weight_format, activation))
    quantized = len(rows)
    for name, plain in rooms.quantizable(module).items():
        kind = "linear" if plain.weight.dim() == 2 else "conv2d"
        rows.append((name, kind, tuple(plain.weight.shape), "float", "-"))
    if layers:
        table = Table("layer", "kind", "weight shape", "values", "weight format", "activation format")
        for name, kind, shape, weight_format, activation in rows:
            shape_text = " x ".join(map(str, shape))
            table.add_row(name, kind, shape_text, f"{math.prod(shape):,}", weight_format, activation)
        console.print(table)
    weights = sum(math.prod(shape) for _, _, shape, _, _ in rows)
    stored = sum(tensor.nbytes for tensor in module.state_dict().values())
    console.print(
        f"{type(module).__name__}: {quantized} quantized and {len(rows) - quantized} float layers, {weights:,} weights "
        f"in them, {stored / 1e6:.2f} MB in memory"
    )
    if kernels:
        console.print("\n".join([tiers.machine(), *tiers.layers(module)]), highlight=False, soft_wrap=True)


@app.command()
def quantize(
    source: Source,
    out: Annotated[Path, typer.Argument(help="Directory of the packed checkpoint and its report.")],
    recipe: Annotated[
        str, typer.Option(help="lbfp, fp4dit, msfp, efficientdm, qdiffusion, viditq, qdit or rtn.")
    ] = "lbfp",
    bits: Annotated[
        str, typer.Option(help="Weight and activation bits, like w4a8; a16 leaves activations alone.")
    ] = "w4a8",
    prompts: Prompts = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration rows: denoiser inputs kept.")] = 256,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
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
    target: Target = "any",
    images: Images = 16,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print plan, size, memory and time, stop.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")
    ] = False,
) -> None:
    """Quantize a pipeline's denoiser, write the packed checkpoint and a report of what it cost."""
    from difloat import api, calibration, recipes, study
    from difloat.methods.task import Bits

    chosen = _options(option or [])
    recipes.make_options(recipes.lookup(recipe), chosen)
    Bits.parse(bits)
    if images == 1:
        raise ValueError("images must be 0 or at least 2, got 1; intervals need two pictures")
    _check_out(out, overwrite)
    pipeline = _pipeline(source)
    api.check_model(api.denoiser(pipeline))
    texts = study.prompts_of(pipeline, source, prompts)
    guidance, call = study.call_of(source, guidance)
    settings = calibration.CalibrationSettings(
        samples=samples, steps=steps, guidance_scale=guidance, seed=seed, memory_bytes=memory_mb << 20
    )
    tables.announce(pipeline, texts, settings, recipe, bits, chosen, call, table=dry_run)
    if dry_run:
        return
    sampling = study.Sampling(texts, images, steps, guidance, call_kwargs=call)
    everything = {"cache_dir": cache, "call_kwargs": call, "target": target, **vars(settings), **chosen}
    _carry_out(pipeline, source, out, recipe, bits, sampling, everything, overwrite)


def _carry_out(
    pipeline: Any,
    source: str,
    out: Path,
    recipe: str,
    bits: str,
    sampling: Any,
    arguments: dict[str, Any],
    overwrite: bool,
) -> None:
    from difloat import api, study

    start = time.perf_counter()
    plan = api.plan(pipeline, recipe, bits, prompts=sampling.prompts, **arguments)
    seconds = {"quantize, all of it": time.perf_counter() - start}
    made = study.finish(pipeline, plan, source, out, sampling, seconds=seconds, overwrite=overwrite)
    tables.print_summary(made)
    console.print(f"checkpoint {out}\nreport     {out / 'report.html'}", highlight=False, soft_wrap=True)


def _check_out(out: Path, overwrite: bool) -> None:
    from difloat.io.manifest import MANIFEST

    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise FileExistsError(
            f"output directory must be new or empty, got {str(out)!r}; choose another or say --overwrite"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / MANIFEST).is_file():
        raise FileExistsError(
            f"--overwrite replaces only difloat checkpoints, got {str(out)!r}, which is none; choose another directory"
        )


def _options(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(
                f"--set must be name=value, got {pair!r}; write for example --set rounding=nearest"
            )
    return dict(pair.split("=", 1) for pair in pairs)


@app.command()
def repair(
    source: Source,
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="Directory of the repaired checkpoint and its report.")],
    epochs: Annotated[int, typer.Option(min=1, help="Passes along the trajectory.")] = 40,
    prompts: Prompts = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration rows: denoiser inputs kept.")] = 256,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Keeps the run: a killed one goes on from there.")
    ] = None,
    images: Annotated[int, typer.Option(min=0, help="Pictures for the report; 0: none.")] = 16,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")
    ] = False,
) -> None:
    """Fine-tune a quantized checkpoint of any recipe against the full-precision model it was made from."""
    import difloat
    from difloat import api, study

    if images == 1:
        raise ValueError("images must be 0 or at least 2, got 1; intervals need two pictures")
    _check_out(out, overwrite)
    pipeline, quantized = _pipeline(source), _pipeline(str(checkpoint))
    texts = study.prompts_of(pipeline, source, prompts)
    guidance, call = study.call_of(source, guidance)
    start = time.perf_counter()
    plan = api.repair(
        pipeline,
        difloat.io.plan_of(api.denoiser(quantized)),
        epochs=epochs,
        prompts=texts,
        cache_dir=cache,
        call_kwargs=call,
        samples=samples,
        steps=steps,
        guidance_scale=guidance,
        seed=seed,
    )
    seconds = {"repair, all of it": time.perf_counter() - start}
    sampling = study.Sampling(texts, images, steps, guidance, call_kwargs=call)
    made = study.finish(pipeline, plan, source, out, sampling, seconds=seconds, overwrite=overwrite)
    tables.print_summary(made)
    console.print(f"checkpoint {out}\nreport     {out / 'report.html'}", highlight=False, soft_wrap=True)


@app.command()
def generate(
    source: Source,
    out: Annotated[Path, typer.Argument(help="Directory for the PNG files.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeatable.")] = None,
    prompts: Prompts = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures; prompts are used again from the start.")] = 4,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture; the next ones count up.")] = 0,
    batch: Batch = 8,
) -> None:
    """Draw pictures with a full-precision or quantized pipeline."""
    from PIL import Image

    from difloat import evaluate, record, study

    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"output must be a directory, got the file {str(out)!r}; choose another")
    pipeline = _pipeline(source)
    texts = list(prompt) if prompt else study.prompts_of(pipeline, source, prompts)
    guidance, call = study.call_of(source, guidance)
    seeds = list(range(seed, seed + count))
    drawn = evaluate.generate(
        pipeline,
        texts,
        seeds=seeds,
        steps=steps,
        guidance_scale=guidance,
        batch_size=batch,
        call_kwargs=call,
    )
    out.mkdir(parents=True, exist_ok=True)
    for number, picture in zip(seeds, record.to_uint8(drawn.images), strict=True):
        Image.fromarray(picture).save(out / f"{number:05d}.png")
    console.print(f"{count} pictures in {out}, {drawn.seconds / count:.2f} s each", highlight=False)


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
        typer.Option(
            help="Gate like psnr=20 or frechet_to_data<=12, repeatable; exit code 1 if one is broken."
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the evaluation as JSON.")] = None,
) -> None:
    """Compare a quantized pipeline with the full-precision one on the same seeds and prompts."""
    from difloat import evaluate as judge
    from difloat import study

    first, second = _pipeline(reference), _pipeline(quantized)
    texts = study.prompts_of(first, reference, prompts)
    guidance, call = study.call_of(reference, guidance)
    sampling = study.Sampling(texts, samples, steps, guidance, batch, call)
    evaluation = study.judge(study.draw(first, sampling), study.draw(second, sampling), sampling)
    table = Table(
        "measure", "value", "95 % interval", title=f"{quantized} against {reference}, {samples} pictures"
    )
    for _, metric, found in evaluation.rows():
        value = f"{found.value:.4g} {metric.unit}".strip()
        table.add_row(metric.label, value, tables.interval(found.low, found.high))
    console.print(table)
    if save is not None:
        save.write_text(evaluation.to_json(), encoding="utf-8")
    failures = judge.gate(evaluation, fail_under or [])
    for failure in failures:
        console.print(failure, markup=False, highlight=False)
    if failures:
        raise typer.Exit(1)


@app.command()
def report(directory: Checkpoint) -> None:
    """Make report.html again from the data beside a checkpoint."""
    from difloat import record
    from difloat import report as pages

    made, left, right = record.read(directory)
    tables.print_summary(made)
    page = pages.render(made, left, right, directory / record.PAGE)
    console.print(f"report     {page}", highlight=False, soft_wrap=True)


@app.command()
def verify(directory: Checkpoint) -> None:
    """Prove a checkpoint: hashes, shapes, scales, legal codes, bit-exact re-encoding, size. Exit code 1 if one fails."""
    import difloat

    findings = difloat.verify(directory)
    for finding in findings:
        mark = "[green]ok  [/green]" if finding.passed else "[red]FAIL[/red]"
        console.print(mark, f"{finding.check:10} {finding.component}", finding.message, highlight=False)
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
    console.print(
        f"[bold]difloat demo[/bold]: {model}, LBFP, FP4 weights with learned rounding, FP8 activations"
    )
    target = out / f"{model}-lbfp-w4a8"
    fast = ["iterations=80", "rounding_rows=96"]
    quantize(model, target, samples=160, option=fast, images=24, overwrite=True)
    verify(target)


def main() -> None:
    """Run the command line; bad input gives one sentence and exit code 2."""
    errors = Console(stderr=True)
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        errors.print(f"[red]error:[/red] {escape(_sentence(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            errors.print("interrupted; with --cache the next run goes on from the last finished block")
        raise


def _sentence(error: Exception) -> str:
    """The message; what the system says of a file becomes a sentence too."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk must have room for the output, but is full; free some space and run again"
    return f"{error.filename or 'file'} must be accessible, got: {error.strerror}; check the path and its permissions"


if __name__ == "__main__":
    main()
