"""The command that says which layer broke it."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Column, Table

from difloat.cli.app import app
from difloat.cli.fields import Fields, with_fields
from difloat.cli.options import Checkpoint, Inputs, Source, call_of, pipeline_of
from difloat.cli.tables import console
from difloat.evaluation.diagnosis import DiagnosisSettings

if TYPE_CHECKING:
    from difloat.evaluation.diagnosis import Diagnosis, Health
    from difloat.plan.plan import Plan

_ROWS = 12  # of a table


@app.command()
@with_fields
def diagnose(
    source: Source,
    directory: Checkpoint,
    settings: Annotated[DiagnosisSettings, Fields(DiagnosisSettings)],
    inputs: Annotated[Inputs, Fields(Inputs)],
) -> None:
    """Find the layers that cost a quantized model its quality, and say how to leave them out."""
    from difloat import api, devices, run
    from difloat.evaluation import diagnosis
    from difloat.pipelines import denoiser_of

    place = devices.resolve(inputs.device)
    pipeline, quantized = pipeline_of(source, place), pipeline_of(str(directory), place)
    texts = run.prompts_of(pipeline, source, inputs.prompts)
    guidance, arguments = call_of(pipeline, source, settings.guidance_scale, inputs)
    settings = replace(settings, guidance_scale=guidance)
    runs = diagnosis.runs_needed(api.denoiser(pipeline), api.denoiser(quantized))
    console.print(f"at most {runs} sampling runs of {settings.images} pictures each", highlight=False)
    found = diagnosis.diagnose(pipeline, quantized, prompts=texts, call_kwargs=arguments, **vars(settings))
    _print_tables(found)
    plan, name = api.plan_of(quantized), denoiser_of(quantized)[0]
    console.print(_verdict(found, source, plan, name), highlight=False, soft_wrap=True, markup=False)


def _print_tables(found: Diagnosis) -> None:
    table = Table(
        Column("block, worst first", overflow="fold"), "forced", "first step", "last step", "accumulated"
    )
    for block in found.blocks[:_ROWS]:
        timesteps = sorted(block.forced, reverse=True)
        ends = [f"{block.forced[timesteps[at]]:.3f}" for at in (0, -1)]
        grown = max(block.accumulated.values(), default=0.0)
        table.add_row(block.name, f"{block.error:.3f}", *ends, f"{grown:.3f}")
    console.print(table)
    table = Table(Column("layer, worst first", overflow="fold"), "forced", "largest output", "remark")
    for layer in found.layers[:_ROWS]:
        table.add_row(layer.name, f"{layer.error:.3f}", f"{layer.largest:.4g}", _remark(layer))
    console.print(table)


def _remark(layer: Health) -> str:
    if not layer.finite:
        return "NaN or infinity"
    return "beyond float16" if layer.overflows_float16 else ""


def _verdict(found: Diagnosis, source: str, plan: Plan, denoiser: str) -> str:
    """Say in lines what to do. The last one is a command where layers were found and a recipe made the plan."""
    from difloat.recipes import RECIPES

    lines = [f"relative error of the last latents: {found.before:.4f}; {found.runs} sampling runs made"]
    wide = [layer.name for layer in found.layers if layer.overflows_float16]
    if wide:
        lines.append(
            f"{len(wide)} layers reach beyond float16 (first: {wide[0]}): sample in bfloat16 or float32"
        )
    if not found.exclude:
        return "\n".join(
            [*lines, f"no set of layers brings it down to {found.goal:.4f}: there is nothing to leave out"]
        )
    count = len(found.exclude)
    lines.append(f"{found.after:.4f} with {count} of {len(found.layers)} layers in full precision:")
    lines += [f"  {name}" for name in found.exclude]
    if plan.recipe not in RECIPES:
        return "\n".join([*lines, f"made by no recipe of quantize ({plan.recipe}): leave them out there"])
    command = _command(found, source, plan, denoiser)
    lines.append("with --prompts, --steps, --guidance and --call as the first time:")
    return "\n".join([*lines, command])


def _command(found: Diagnosis, source: str, plan: Plan, denoiser: str) -> str:
    """The call of `difloat quantize` that repeats the plan without the layers, as far as the plan knows it."""
    from difloat.recipes import RECIPES

    words = ["difloat", "quantize", source, "OUT", "--recipe", plan.recipe, "--bits", plan.bits]
    for option in dataclasses.fields(RECIPES[plan.recipe].options):
        value = plan.options.get(option.name, option.default)
        if _plain(value) != _plain(option.default):
            words += ["--set", f"{option.name}={_plain(value)}"]
    for flag, name in (("--samples", "calibration_rows"), ("--seed", "seed"), ("--target", "target")):
        if plan.options.get(name):
            words += [flag, _plain(plan.options[name])]
    if plan.components:
        others = [f"{name}={other.bits}" for name, other in plan.components.items()]
        words += ["--components", ",".join([denoiser, *others])]
    for name in [*plan.options.get("exclude", []), *found.exclude]:
        words += ["--exclude", name]
    return shlex.join(words)


def _plain(value: Any) -> str:
    """An option's value as --set takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
