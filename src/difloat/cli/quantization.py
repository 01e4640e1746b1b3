"""Commands that make checkpoints: quantize, repair, demo."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from difloat.cli import tables
from difloat.cli.app import app
from difloat.cli.checkpoints import verify
from difloat.cli.options import (
    Base,
    Cache,
    Call,
    Components,
    DryRun,
    DType,
    Exclude,
    Guidance,
    Images,
    MemoryMB,
    Overwrite,
    Prompts,
    RecipeName,
    Revision,
    Rows,
    Seed,
    Setting,
    Source,
    Steps,
    Target,
    Variant,
    Widths,
    call_of,
    claimed,
    meet,
    options_of,
    pipeline_of,
)
from difloat.cli.tables import console

_IMAGES, _LARGE = 16, 100_000_000  # pictures of a report, up to so many weights
_PICTURES = 4  # of a report drawn at once: more would take more memory than quantizing


@app.command()
def quantize(
    source: Source,
    out: Annotated[Path, typer.Argument(help="Directory of the packed checkpoint and its report.")],
    recipe: RecipeName = "lbfp",
    bits: Widths = "w4a8",
    prompts: Prompts = None,
    samples: Rows = 256,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    memory_mb: MemoryMB = 2048,
    cache: Cache = None,
    option: Setting = None,
    exclude: Exclude = None,
    call: Call = None,
    target: Target = "any",
    components: Components = None,
    images: Images = None,
    base: Base = None,
    revision: Revision = None,
    variant: Variant = None,
    dtype: DType = "auto",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Quantize a pipeline's denoiser (and others: --components), write the packed checkpoint and a report of what it cost."""
    from difloat import api, run, sources
    from difloat.calibration import collect
    from difloat.plan import target as targets

    meet()
    machine = targets.check(target)
    chosen, needs_data = _asked(recipe, option or [], bits)
    _check_images(images)
    where = sources.Source(source, base, revision, variant, dtype)
    as_stored = not needs_data and dtype == "auto"  # then nothing is computed
    with claimed(out, overwrite, cache, dry_run):
        pipeline = pipeline_of(**{**vars(where), "dtype": "stored" if as_stored else dtype})
        api.check_model(api.denoiser(pipeline))
        texts = run.prompts_of(pipeline, source, prompts)
        guidance, arguments = call_of(pipeline, source, guidance, call)
        others, left_out = (components.split(",") if components is not None else None), exclude or []
        _check_parts(pipeline, left_out, others, bits)
        settings = collect.CalibrationSettings(
            samples, steps, guidance, seed=seed, memory_bytes=memory_mb << 20
        )
        if needs_data or dry_run:
            given = (texts, settings, recipe, bits, chosen, arguments, left_out)
            tables.announce(pipeline, *given, dry=dry_run)
        if dry_run:
            return
        count = _pictures(api.denoiser(pipeline), images)
        sampling = run.Sampling(texts, count, steps, guidance, _PICTURES, arguments, _kept(cache))
        everything: dict[str, Any] = {"cache_dir": cache, "call_kwargs": arguments, "target": machine}
        everything |= {**vars(settings), **chosen, "components": others, "exclude": left_out}
        _carry_out(pipeline, where, out, recipe, bits, sampling, everything, overwrite)


def _asked(recipe: str, options: list[str], bits: str) -> tuple[dict[str, str], bool]:
    """The recipe's options as the user wrote them, checked, and whether it looks at calibration data with them."""
    from difloat import recipes
    from difloat.plan.rules import Bits

    chosen, row = options_of(options), recipes.lookup(recipe)
    return chosen, row.needs_data(recipes.make_options(row, chosen, bits), Bits.parse(bits))


def _pictures(module: Any, images: int | None) -> int:
    """How many pictures a report gets: what the user says; none of large models, whose pictures take longer than the rest."""
    if images is not None:
        return images
    return _IMAGES if sum(weight.numel() for weight in module.parameters()) <= _LARGE else 0


def _kept(cache: Path | None) -> Path | None:
    """The folder of full-precision pictures in a cache."""
    return None if cache is None else cache / "pictures"


def _check_images(images: int | None) -> None:
    if images == 1:
        raise ValueError("images must be 0 or at least 2, got 1; intervals need two pictures")


def _check_parts(pipeline: Any, exclude: list[str], others: list[str] | None, bits: str) -> None:
    """Refuse layers and components that are not there before anything is tried."""
    from difloat import api, components
    from difloat.layers import packed
    from difloat.layers.exclude import excluded

    excluded(packed.quantizable(api.denoiser(pipeline)), exclude)
    components.parse(pipeline, others, bits)


def _carry_out(
    pipeline: Any,
    source: Any,
    out: Path,
    recipe: str,
    bits: str,
    sampling: Any,
    arguments: dict[str, Any],
    overwrite: bool,
) -> None:
    from difloat import api, run

    start = time.perf_counter()
    plan = api.plan(pipeline, recipe, bits, prompts=sampling.prompts, **arguments)
    seconds = _beside(plan, time.perf_counter() - start)
    made = run.finish(pipeline, plan, source, out, sampling, seconds=seconds, overwrite=overwrite)
    if made is not None:
        tables.print_made(made, out)


def _beside(plan: Any, total_s: float) -> dict[str, float]:
    """What making the plan took beside the steps it measured itself, so that a report's times add up."""
    return {"calibration and the rest": total_s - sum(plan.measured.get("seconds", {}).values())}


@app.command()
def repair(
    source: Source,
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Directory of the source quantized by difloat, with one weight per layer."),
    ],
    out: Annotated[Path, typer.Argument(help="Directory of the repaired checkpoint and its report.")],
    epochs: Annotated[int, typer.Option(min=1, help="Passes along the trajectory.")] = 10,
    rank: Annotated[int, typer.Option(min=0, help="Rank of the adapters; 0: ranges and scales only.")] = 32,
    dfa: Annotated[
        bool, typer.Option(help="Weight timesteps by the sampler; not for samplers of several calls a step.")
    ] = True,
    guidance_weight: Annotated[
        float, typer.Option(min=0, help="Weight of the guidance direction that is lost; 0: leave it out.")
    ] = 9.0,
    prompts: Prompts = None,
    samples: Rows = 256,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    memory_mb: MemoryMB = 2048,
    cache: Annotated[
        Path | None, typer.Option(help="Keeps the run: a killed one goes on from there.")
    ] = None,
    call: Call = None,
    images: Images = None,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune the denoiser of a quantized pipeline against the full-precision one it was made from.

    Takes pipelines made by quantize (any recipe), import --into or DifloatConfig.
    Layers must have one weight and nothing beside: of msfp those made with
    --set adapters=1, of viditq those with --set stretches=1.
    Input ranges by timestep stay apart; other quantized components stay as they are.
    """
    from difloat import api, run, sources
    from difloat.calibration import collect

    meet()
    _check_images(images)
    with claimed(out, overwrite, cache):
        pipeline, plan = pipeline_of(source), api.plan_of(pipeline_of(str(checkpoint)))
        texts = run.prompts_of(pipeline, source, prompts)
        guidance, arguments = call_of(pipeline, source, guidance, call)
        training = {"epochs": epochs, "rank": rank, "dfa": dfa, "guidance_weight": guidance_weight}
        settings = collect.CalibrationSettings(
            samples=samples, steps=steps, guidance_scale=guidance, seed=seed, memory_bytes=memory_mb << 20
        )
        count = _pictures(api.denoiser(pipeline), images)
        sampling = run.Sampling(texts, count, steps, guidance, _PICTURES, arguments, _kept(cache))
        everything = {"cache_dir": cache, "call_kwargs": arguments, **training, **vars(settings)}
        start = time.perf_counter()
        plan = api.repair(pipeline, plan, prompts=texts, **everything)
        seconds = _beside(plan, time.perf_counter() - start)
        where = sources.Source(source)
        made = run.finish(pipeline, plan, where, out, sampling, seconds=seconds, overwrite=overwrite)
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
