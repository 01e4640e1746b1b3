"""The functions that users call: `plan`, `apply`, `quantize`, `repair` and `restore`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn
from tqdm.auto import tqdm
from typing_extensions import Unpack

from difloat import checkpoint, devices, distributed, job, recipes
from difloat import components as parts
from difloat.calibration import collect
from difloat.calibration.collect import Calibration, CalibrationSettings
from difloat.calibration.row_store import Shelf
from difloat.checkpoint import mark_quantized, unmark_quantized
from difloat.components import denoiser as denoiser
from difloat.job import Job
from difloat.layers import install, offloading, packed
from difloat.lora import wrapped
from difloat.methods.cost import Cost, remaining
from difloat.methods.task import Task
from difloat.methods.training.fine_tune import Tuning, tune
from difloat.methods.training.from_plan import of_8_bits, start_of
from difloat.methods.training.student import Adapters
from difloat.methods.training.timestep_weights import loss_weights
from difloat.methods.training.train import TrainingSettings, guidance_to_keep
from difloat.pipelines import parameters_of
from difloat.plan.plan import Plan
from difloat.plan.request import RepairSettings, Request
from difloat.plan.rules import Bits

# Fields of a request that have no argument of their own: `plan` takes them among its options.
_ASKED = {field.name for field in fields(Request)} - {"recipe", "bits", "calibration", "cache", "options"}


class Data(TypedDict, total=False):
    """Where calibration rows come from: the arguments of `plan`, `repair` and `calibrate` of these names, all optional."""

    prompts: Sequence[str] | None
    forward_loop: Callable[[nn.Module], object] | None
    cache_dir: str | Path | None
    cache_key: str | None
    progress: bool
    call_kwargs: Mapping[str, Any] | None


def default_prompts() -> list[str]:
    """The general prompts for calibration when the user gives none."""
    return resources.files("difloat").joinpath("assets/prompts.txt").read_text(encoding="utf-8").splitlines()


def prompts_for(pipeline: Any, prompts: Sequence[str] | None) -> list[str] | None:
    """The given prompts, or the built-in ones if the pipeline reads text, or None."""
    if prompts is not None:
        return list(prompts)
    return default_prompts() if callable(pipeline) and "prompt" in parameters_of(pipeline) else None


def plan(
    model: Any,
    recipe: str = Request.recipe,
    bits: str = str(Request.bits),
    *,
    prompts: Sequence[str] | None = None,
    forward_loop: Callable[[nn.Module], object] | None = None,
    cache_dir: str | Path | None = None,
    cache_key: str | None = None,
    progress: bool = True,
    call_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """Decide how to quantize a model, which stays untouched.

    >>> model = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
    >>> sorted(plan(model, "rtn", "w4a8", progress=False).layers)
    ['0', '2']

    Args:
        model: A diffusers pipeline, or any `nn.Module` denoiser.
        recipe: One of `difloat.recipes.RECIPES`.
        bits: Weight bits and activation bits, like "w4a8". 16 or 32 activation bits leave activations alone.
        prompts: Texts to calibrate with, or None for general built-in ones.
        forward_loop: A function that samples with a plain module. Recipes that need no data do without.
        cache_dir: The directory that keeps calibration data and finished blocks, so that a killed run goes on where it was.
        cache_key: A name of `forward_loop` in the cache. None tells loops apart by their code and the values in it.
        progress: Whether to show progress bars.
        call_kwargs: Further arguments of the pipeline's call, such as `height`.
        **options: Any of these, by name. `target` is "cpu" for formats that CPUs compute in integers, or a kind of file that
            holds the plan (`plan.target.FILES`). `exclude` has names of layers or blocks, or patterns like ``*.to_q``, that
            stay as they are. `components` has models of a pipeline, like ["unet", "vae=w8a8"]. `device` is where the model is
            put and computes, like "cuda". `bits_from` is a plan of this model, or its checkpoint, whose layers' weight bits
            are taken. The fields of `CalibrationSettings` (`samples`, `steps`, `seed`, ...) say what is collected, and the
            rest are options of the recipe. `Request` and these records have the defaults.

    Raises:
        ValueError: if a recipe, bits, option or layer is unknown, nothing can be quantized, or a weight is not finite.
    """
    named, others = _apart(options, _ASKED)
    settings, own = _apart(others, _names(CalibrationSettings))
    asked = job.request(recipe, bits, own, CalibrationSettings(**settings), cache=cache_dir, **named)
    fitted = job.fit(model, asked)
    data = Data(prompts=prompts, forward_loop=forward_loop, cache_key=cache_key, call_kwargs=call_kwargs)
    data["progress"] = progress
    return decide(fitted, **data)


def decide(fitted: Job, **data: Unpack[Data]) -> Plan:
    """`plan` of what is checked already.

    Args:
        fitted: What is asked for, and of which model.
        **data: The arguments of `Data`, without `cache_dir`, which the request has.
    """
    progress = data.setdefault("progress", True)
    devices.move(fitted.model, fitted.request.device)
    first, *second = [
        _decide(fitted, name, {**data, "cache_dir": fitted.request.cache}) for name in fitted.denoisers
    ]
    decided = replace(first, components=dict(zip(list(fitted.denoisers)[1:], second, strict=True)))
    return parts.with_components(decided, fitted.model, fitted.others, progress)


def _decide(fitted: Job, name: str, data: Data) -> Plan:
    """The plan of one denoiser, calibrated where the recipe needs data."""
    asked, bits, model = fitted.request, fitted.denoisers[name], fitted.model
    settings, progress = asked.calibration, data["progress"]
    if fitted.needs_data(bits):
        rows = _collect(model, name, settings, **data)
        _say_remaining(fitted.cost(bits), rows, progress)
    else:  # the denoiser is not called
        rows = Calibration([], Shelf(None, 0, {}), next(denoiser(model, name).parameters()).device)
    with offloading.lifted(denoiser(model, name), onload=True):
        task = replace(
            task_of(model, rows, bits, name),
            seed=settings.seed,
            memory_bytes=settings.memory_bytes,
            work_dir=asked.cache,
            target=asked.target,
            exclude=fitted.exclusions[name],
            layer_bits=fitted.layer_bits[name],
            progress=progress,
        )
        return recipes.decide(task, asked.recipe, asked.options)


def _names(record: type[Any]) -> list[str]:
    return [field.name for field in fields(record)]


def _apart(options: Mapping[str, Any], names: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of these names, and the others."""
    found = {name: value for name, value in options.items() if name in names}
    return found, {name: value for name, value in options.items() if name not in names}


def _say_remaining(asked: Cost, data: Calibration, progress: bool) -> None:
    """Write one line about the remaining work above the progress bars, before the long part begins."""
    if progress and len(data) and distributed.is_main():
        tqdm.write(remaining(asked, data), file=sys.stderr)


def repair(
    model: Any,
    plan: Plan,
    *,
    prompts: Sequence[str] | None = None,
    forward_loop: Callable[[nn.Module], object] | None = None,
    cache_dir: str | Path | None = None,
    cache_key: str | None = None,
    progress: bool = True,
    call_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    **settings: Any,
) -> Plan:
    """Fine-tune the denoiser of a plan: one adapter per layer, merged before rounding, and input ranges. Return the new plan.

    >>> class Denoiser(nn.Sequential):
    ...     def forward(self, x, timestep): return super().forward(x)
    >>> model, loop = Denoiser(nn.Linear(16, 16)), lambda m: m(torch.randn(8, 16), torch.full((8,), 5.0))
    >>> repair(model, plan(model, "rtn", "w4a8"), forward_loop=loop, rank=2, dfa=False).options["repair"]["rank"]
    2

    Args:
        model: The full-precision pipeline or module that the plan was made for. It teaches and stays untouched.
        plan: The plan of a recipe or of a quantized model (`plan_of`), with one weight per layer.
        prompts: Texts to calibrate with, or None for general built-in ones.
        forward_loop: A function that samples with a plain module.
        cache_dir: The directory that keeps calibration data and finished blocks.
        cache_key: A name of `forward_loop` in the cache, as `difloat.plan` takes it.
        progress: Whether to show progress bars.
        call_kwargs: Further arguments of the pipeline's call.
        device: Where the model is put and computes, or None for where it is.
        **settings: Fields of `RepairSettings` (`epochs`, `rank`, `dfa`, `guidance_weight`), which say what is trained, and of
            `CalibrationSettings` (`samples`, `steps`, `seed`, ...), which say what is collected.

    Raises:
        ValueError: if a layer has several weights or adapters, the plan is of another model, or a number is out of range.
    """
    training, others = _apart(settings, _names(RepairSettings))
    asked, wanted = RepairSettings(**training), CalibrationSettings(**others)
    _check_repairable(model, plan, asked.dfa)
    job.check_model(denoiser(devices.move(model, device)))
    source = Data(prompts=prompts, forward_loop=forward_loop, cache_key=cache_key, call_kwargs=call_kwargs)
    source |= Data(cache_dir=cache_dir, progress=progress)
    data = _collect(model, "", wanted, **source)
    with offloading.lifted(denoiser(model), onload=True):
        task = replace(
            task_of(model, data, Bits.parse(plan.bits)),
            seed=wanted.seed,
            progress=progress,
            work_dir=None if cache_dir is None else Path(cache_dir),
            memory_bytes=wanted.memory_bytes,
        )
        return _trained(plan, task, asked)


def _trained(plan: Plan, task: Task, asked: RepairSettings) -> Plan:
    """The plan with the task's layers as fine-tuned, and what that was asked for among its options."""
    asked = replace(asked, guidance_weight=guidance_to_keep(asked.guidance_weight, task))
    training = TrainingSettings(asked.epochs, guidance_weight=asked.guidance_weight)
    weights = loss_weights(task, 2.0 if asked.dfa else 0.0)
    tuned = tune(
        task, start_of(plan, task), Tuning(training, Adapters(1, asked.rank, of_8_bits(plan)), weights)
    )
    trained = replace(plan, layers=tuned.layers, timesteps=tuned.timesteps, measured=tuned.measured)
    return replace(trained, options={**plan.options, "repair": {**vars(asked), "seed": task.seed}})


def plan_of(model: Any) -> Plan:
    """The plan that a quantized module or pipeline carries out, with those of a pipeline's other quantized components.

    Raises:
        ValueError: if the denoiser is not quantized, or `difloat.checkpoint.plan_of` refuses a model.
    """
    module = denoiser(model)
    found = {} if model is module else model.components
    others = {
        name: checkpoint.plan_of(part)
        for name, part in found.items()
        if isinstance(part, nn.Module) and part is not module and _quantized(part)
    }
    return replace(checkpoint.plan_of(module), components=others)


def _quantized(module: nn.Module) -> bool:
    return any(isinstance(part, packed.QuantizedLayer) for part in module.modules())


def _check_repairable(model: Any, plan: Plan, dfa: bool) -> None:
    for name, layer in plan.layers.items():
        if layer.side is not None:
            raise ValueError(
                f"plan must have nothing beside its weights to be repaired, got low-rank pairs beside {name!r}; "
                "quantize with carry='merged', adapters=1 (msfp)"
            )
        if layer.schedule:
            raise ValueError(
                f"plan must have one weight per layer to be repaired, got {layer.variants} by timestep of {name!r}; "
                "quantize with adapters=1 (msfp) or stretches=1 (viditq)"
            )
    for module, own in parts.models(model, denoiser(model), plan):
        wrapped.refuse(module, "quantized")
        with offloading.lifted(module):
            install.check(module, own)
    job.check_sampler(model, float(dfa), "repair must be told dfa=False")


def task_of(model: Any, data: Calibration, bits: Bits, component: str = "") -> Task:
    """The task of a recipe for a module, or for the denoiser of a pipeline with this name, with its calibration data."""
    module = denoiser(model, component)
    workable = install.workable(module)
    if model is module:
        return Task(workable, data, bits)
    return Task(workable, data, bits, pipeline=type(model).__name__, scheduler=data.scheduler)


def calibrate(
    model: Any,
    component: str = "",
    *,
    device: torch.device | str | None = None,
    **arguments: Any,
) -> Calibration:
    """The inputs of a denoiser, of several the one called `component`, along its own trajectories.

    Args:
        model: A pipeline, or a plain module.
        component: The name of one of several denoisers, or "" for the only or first one.
        device: Where the model is put and computes, or None for where it is.
        **arguments: The arguments of `Data`, and the fields of `CalibrationSettings`.
    """
    settings, data = _apart(arguments, _names(CalibrationSettings))
    wanted = CalibrationSettings(**settings)
    job.check_model(denoiser(devices.move(model, device), component))
    return _collect(model, component, wanted, **data)


def _collect(
    model: Any,
    component: str,
    wanted: CalibrationSettings,
    **data: Unpack[Data],
) -> Calibration:
    """`calibrate` of a model that is checked already."""
    module, forward_loop, cache_key = (
        denoiser(model, component),
        data.get("forward_loop"),
        data.get("cache_key"),
    )
    shared: dict[str, Any] = {"cache_dir": data.get("cache_dir"), "progress": data.get("progress", True)}
    if model is not module:
        if forward_loop is not None or cache_key is not None:
            raise ValueError(
                f"forward_loop and cache_key must come with a plain module, got {type(model).__name__}, which samples itself; "
                "leave them out, or pass its denoiser"
            )
        texts = prompts_for(model, data.get("prompts"))
        shared |= {"call_kwargs": data.get("call_kwargs"), "component": component or None}
        return collect.collect(model, texts, wanted, **shared)
    if forward_loop is None:
        raise ValueError(
            "a plain module must come with forward_loop, got None; give a function that samples with the module"
        )
    return collect.collect_from_loop(module, forward_loop, wanted, cache_key=cache_key, **shared)


def apply(model: Any, plan: Plan) -> Any:
    """Carry out a plan in place, on a module or on all planned components of a pipeline, and return the model.

    >>> model = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
    >>> apply(model, plan(model, "rtn", "w4a8", progress=False))[0].weight.dtype
    torch.uint8

    Raises:
        ValueError: if the plan was made for another model. Nothing is changed then.
    """
    work = parts.models(model, denoiser(model), plan)
    for module, own in work:
        wrapped.refuse(module, "quantized")
        with offloading.lifted(module):
            install.check(module, own)
    for module, own in work:
        with offloading.lifted(module):
            install.apply(module, own)
        mark_quantized(module, own)
    return model


def quantize(
    model: Any, recipe: str = Request.recipe, bits: str = str(Request.bits), **arguments: Any
) -> Plan:
    """`plan` and `apply` in one. It takes the arguments of `plan`, changes the model in place and returns the plan.

    >>> model = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
    >>> quantize(model, "rtn", "w8a8", progress=False).layers["0"].parts[0].weight.format.name
    'e4m3'
    """
    decided = plan(model, recipe, bits, **arguments)
    apply(model, decided)
    return decided


def restore(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Turn the quantized layers of a module, or of all components of a pipeline, into float ones in place. Return the model.

    The weights are the dequantized ones, so the error of rounding stays.

    >>> model = nn.Sequential(nn.Linear(16, 32))
    >>> _ = quantize(model, "rtn", "w4a8", progress=False)
    >>> restore(model)[0]
    Linear(in_features=16, out_features=32, bias=True)
    """
    modules = [model] if isinstance(model, nn.Module) else list(model.components.values())
    for module in modules:
        if isinstance(module, nn.Module) and any(
            isinstance(m, packed.QuantizedLayer) for m in module.modules()
        ):
            install.restore(module, dtype)
            unmark_quantized(module)
    return model
