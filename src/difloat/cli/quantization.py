"""Commands that make checkpoints: quantize, repair, demo."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from difloat.cli import tables
from difloat.cli.app import app
from difloat.cli.checkpoints import verify
from difloat.cli.fields import Fields, Words, with_fields
from difloat.cli.options import (
    For,
    Inputs,
    Outcome,
    Setting,
    Source,
    call_of,
    claimed,
    meet,
    options_of,
    pipeline_of,
    quiet_libraries,
    with_size,
)
from difloat.cli.tables import console
from difloat.plan.request import CalibrationSettings, RepairSettings, Request
from difloat.plan.target import check_file
from difloat.sources import Source as SourceFields

_IMAGES = 16  # pictures of a report, of models that are small
_PICTURES = 4  # of a report drawn at once: more would take more memory than quantizing
_CALIBRATION = Fields(CalibrationSettings, panel="Calibration")


@app.command()
@with_fields
def quantize(
    source: Source,
    out: Annotated[Path, typer.Argument(help="Directory of the packed checkpoint and its report.")],
    asked: Annotated[Words, Fields(Request, leave_out=("options", "calibration", "device"))],
    calibration: Annotated[CalibrationSettings, _CALIBRATION],
    where: Annotated[Words, Fields(SourceFields, leave_out=("name",), panel="Source")],
    inputs: Annotated[Inputs, Fields(Inputs)],
    outcome: Annotated[Outcome, Fields(Outcome)],
    reader: For = None,
    option: Setting = None,
) -> None:
    """Quantize a pipeline's denoiser (and others: --components), write the packed checkpoint and a report of what it cost."""
    from difloat import job, run

    place, words = meet(inputs.device), with_size(options_of(option or []), outcome.size)
    if reader is not None:
        asked = {**asked, "target": check_file(reader, asked.get("target", Request.target))}
    request = job.request(**asked, options=words, calibration=calibration, device=place)
    needs_data = job.needs_data(request, request.bits)
    _check_images(outcome.images)
    origin = SourceFields(source, **where)
    if outcome.offload == "disk":
        _check_streamed(outcome.images or request.components or outcome.dry_run)
        _stream(origin, out, request, outcome.overwrite)
        return
    as_stored = not needs_data and origin.dtype == "auto"  # then nothing is computed
    with claimed(out, outcome.overwrite, request.cache, outcome.dry_run):
        pipeline = pipeline_of(
            **{**vars(origin), "dtype": "stored" if as_stored else origin.dtype}, device=place
        )
        texts = run.prompts_of(pipeline, source, inputs.prompts)
        guidance, arguments = call_of(pipeline, source, calibration.guidance_scale, inputs)
        calibration = replace(calibration, guidance_scale=guidance)
        fitted = job.fit(pipeline, replace(request, calibration=calibration))
        if needs_data or outcome.dry_run:
            tables.announce(fitted, texts, words, arguments, dry=outcome.dry_run)
        if outcome.dry_run:
            return
        sampling = _sampling(pipeline, texts, outcome.images, calibration, arguments, request.cache)
        _carry_out(fitted, origin, out, sampling, outcome.overwrite)


def _check_streamed(more: Any) -> None:
    """Refuse what does not go with a model that is quantized block by block from files to files."""
    if more:
        raise ValueError(
            "--offload disk must come without --images, --components and --dry-run, got one of them; leave it out, and draw "
            "pictures with difloat report afterwards"
        )


def _stream(source: Any, out: Path, request: Any, overwrite: bool) -> None:
    from difloat import run_from_disk

    quiet_libraries()
    with claimed(out, overwrite):
        made = run_from_disk.quantize(source, out, request, overwrite=overwrite)
    if made is not None:
        tables.print_made(made, out)


def _sampling(
    pipeline: Any,
    texts: list[str] | None,
    images: int | None,
    calibration: CalibrationSettings,
    call: Words,
    cache: Path | None,
) -> Any:
    """Say how pictures of the report are drawn, as many as the user says, or none of large models, where they take longest."""
    from difloat import api, run
    from difloat.methods.picture_budget import is_large

    if images is None:
        images = 0 if is_large(api.denoiser(pipeline)) else _IMAGES
    sampler = (calibration.steps, calibration.guidance_scale)
    return run.Sampling(texts, images, *sampler, _PICTURES, call, _kept(cache))


def _kept(cache: Path | None) -> Path | None:
    """The folder of full-precision pictures in a cache."""
    return None if cache is None else cache / "pictures"


def _check_images(images: int | None) -> None:
    if images == 1:
        raise ValueError("images must be 0 or at least 2, got 1; intervals need two pictures")


def _carry_out(fitted: Any, source: SourceFields, out: Path, sampling: Any, overwrite: bool) -> None:
    from difloat import api, encoded_prompts, run

    start = time.perf_counter()
    with encoded_prompts.freed(fitted, source, sampling.prompts, sampling.call_kwargs):
        plan = api.decide(fitted, prompts=sampling.prompts, call_kwargs=sampling.call_kwargs)
    seconds = _beside(plan, time.perf_counter() - start)
    made = run.finish(fitted.model, plan, source, out, sampling, seconds=seconds, overwrite=overwrite)
    if made is not None:
        tables.print_made(made, out)


def _beside(plan: Any, total_s: float) -> dict[str, float]:
    """What making the plan took beside the steps it measured itself, so that a report's times add up."""
    return {"calibration and the rest": total_s - sum(plan.measured.get("seconds", {}).values())}


@app.command()
@with_fields
def repair(
    source: Source,
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Directory of the source quantized by difloat, with one weight per layer."),
    ],
    out: Annotated[Path, typer.Argument(help="Directory of the repaired checkpoint and its report.")],
    training: Annotated[RepairSettings, Fields(RepairSettings)],
    calibration: Annotated[CalibrationSettings, _CALIBRATION],
    inputs: Annotated[Inputs, Fields(Inputs)],
    outcome: Annotated[Outcome, Fields(Outcome, only=("images", "overwrite"))],
    cache: Annotated[
        Path | None, typer.Option(help="Keeps the run: a killed one goes on from there.")
    ] = None,
) -> None:
    """Fine-tune the denoiser of a quantized pipeline against the full-precision one it was made from.

    Takes pipelines made by quantize (any recipe), import --into or DifloatConfig.
    Layers must have one weight and nothing beside: of msfp those made with
    --set adapters=1, of viditq those with --set stretches=1.
    Input ranges by timestep stay apart; other quantized components stay as they are.
    """
    from difloat import api, run

    place = meet(inputs.device)
    _check_images(outcome.images)
    with claimed(out, outcome.overwrite, cache):
        pipeline, plan = pipeline_of(source, place), api.plan_of(pipeline_of(str(checkpoint)))
        texts = run.prompts_of(pipeline, source, inputs.prompts)
        guidance, arguments = call_of(pipeline, source, calibration.guidance_scale, inputs)
        calibration = replace(calibration, guidance_scale=guidance)
        sampling = _sampling(pipeline, texts, outcome.images, calibration, arguments, cache)
        everything = {"cache_dir": cache, "call_kwargs": arguments, **vars(training), **vars(calibration)}
        start = time.perf_counter()
        plan = api.repair(pipeline, plan, prompts=texts, **everything)
        seconds = _beside(plan, time.perf_counter() - start)
        origin = SourceFields(source)
        made = run.finish(pipeline, plan, origin, out, sampling, seconds=seconds, overwrite=outcome.overwrite)
        if made is not None:
            tables.print_made(made, out)


@app.command()
@with_fields
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the checkpoint and the report.")] = Path(
        "demo-out"
    ),
    model: Annotated[str, typer.Option(help="emoji-pixart or emoji-unet.")] = "emoji-pixart",
    *,
    inputs: Annotated[Inputs, Fields(Inputs, only=("device",))],
) -> None:
    """Quantize an embedded model to 4 bits per weight and show what it cost, in a minute."""
    console.print(
        f"[bold]difloat demo[/bold]: {model}, recipe auto, weights of 4 bits on average, INT8 activations"
    )
    target = out / f"{model}-auto-w4a8"
    quantize(source=model, out=target, samples=160, images=24, overwrite=True, device=inputs.device)
    verify(target)
