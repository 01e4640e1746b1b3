"""Commands that make checkpoints: quantize, repair, demo."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from difloat import tables
from difloat.cli.application import app
from difloat.cli.arguments import (
    Checkpoint,
    Components,
    Guidance,
    Images,
    Prompts,
    Source,
    Steps,
    Target,
    check_out,
    meet,
    options_of,
    pipeline_of,
)
from difloat.cli.checkpoints import verify
from difloat.tables import console


@app.command()
def quantize(
    source: Source,
    out: Annotated[Path, typer.Argument(help="Directory of the packed checkpoint and its report.")],
    recipe: Annotated[
        str, typer.Option(help="lbfp, fp4dit, msfp, mpqdm, efficientdm, qdiffusion, viditq, qdit or rtn.")
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
    components: Components = None,
    images: Images = 16,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print plan, size, memory and time, stop.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")
    ] = False,
) -> None:
    """Quantize a pipeline's denoiser (and others: --components), write the packed checkpoint and a report of what it cost."""
    from difloat import api, calibration, recipes, study
    from difloat.methods.task import Bits

    meet()
    chosen = options_of(option or [])
    recipes.make_options(recipes.lookup(recipe), chosen)
    Bits.parse(bits)
    if images == 1:
        raise ValueError("images must be 0 or at least 2, got 1; intervals need two pictures")
    check_out(out, overwrite)
    pipeline = pipeline_of(source)
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
    everything["components"] = components.split(",") if components else None
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
    if made is not None:
        tables.print_made(made, out)


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

    meet()
    if images == 1:
        raise ValueError("images must be 0 or at least 2, got 1; intervals need two pictures")
    check_out(out, overwrite)
    pipeline, quantized = pipeline_of(source), pipeline_of(str(checkpoint))
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
    if made is not None:
        tables.print_made(made, out)


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
