"""The functions that users call: `plan`, `apply`, `quantize`, `repair` and `restore`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from difloat import checkpoint, devices, distributed, recipes, torch_modes
from difloat import components as parts
from difloat.calibration import collect
from difloat.calibration.collect import Calibration, CalibrationSettings
from difloat.calibration.row_store import Shelf
from difloat.checkpoint import mark_quantized, unmark_quantized
from difloat.layers import hooks, install, offloading, packed
from difloat.layers.exclude import excluded
from difloat.lora import wrapped
from difloat.methods.cost import Cost, remaining
from difloat.methods.task import Task
from difloat.methods.training.fine_tune import Tuning, tune
from difloat.methods.training.from_plan import of_8_bits, start_of
from difloat.methods.training.timestep_weights import loss_weights
from difloat.methods.training.train import TrainingSettings, guidance_to_keep
from difloat.pipelines import denoisers_of
from difloat.plan import target as targets
from difloat.plan.plan import Plan
from difloat.plan.rules import Bits

_SETTINGS = {field.name for field in fields(CalibrationSettings)}


def denoiser(model: Any, name: str = "") -> nn.Module:
    """The module that is quantized: the denoiser of a pipeline, the one with this name of several, or the module itself."""
    if isinstance(model, nn.Module):
        return model
    return denoisers_of(model)[name] if name else collect.denoiser_of(model)[1]


def default_prompts() -> list[str]:
    """The general prompts for calibration when the user gives none."""
    return resources.files("difloat").joinpath("assets/prompts.txt").read_text(encoding="utf-8").splitlines()


def prompts_for(pipeline: Any, prompts: Sequence[str] | None) -> list[str] | None:
    """The given prompts, or the built-in ones if the pipeline reads text, or None."""
    if prompts is not None:
        return list(prompts)
    return default_prompts() if getattr(pipeline, "tokenizer", None) is not None else None


def plan(
    model: Any,
    recipe: str = "lbfp",
    bits: str = "w4a8",
    *,
    prompts: Sequence[str] | None = None,
    forward_loop: Callable[[nn.Module], object] | None = None,
    cache_dir: str | Path | None = None,
    cache_key: str | None = None,
    progress: bool = True,
    call_kwargs: Mapping[str, Any] | None = None,
    target: str = "any",
    exclude: Sequence[str] = (),
    components: Sequence[str] | None = None,
    device: torch.device | str | None = None,
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
        target: "cpu" restricts every search to formats that CPUs compute in integers, and "any" does not.
        exclude: Names of layers or blocks, or patterns like ``*.to_q``, that stay as they are, whatever the recipe.
        components: Models of a pipeline, like ["unet", "vae=w8a8"] (`components.parse`). None takes the denoiser or denoisers.
        device: Where the model is put and computes (`devices.resolve`). None leaves it where it is, or is offloaded from.
        **options: Fields of `CalibrationSettings` (`samples`, `steps`, `seed`, ...) and of the recipe's options.

    Raises:
        ValueError: if a recipe, bits, option or layer is unknown, nothing can be quantized, or a weight is not finite.
    """
    row, machine = recipes.lookup(recipe), targets.check(target)
    settings, own = _apart(options)
    CalibrationSettings(**settings)
    chosen = recipes.make_options(row, own, bits)  # refuse bad options before hours of calibration
    _check_sampler(model, getattr(chosen, "sampler_power", 0.0), f"{recipe} must be told factor_power=0")
    others = parts.parse(model, components, bits, target)
    widths = parts.denoisers(model, components, bits)
    for name, width in widths.items():
        recipes.make_options(row, own, width)
        excluded(packed.quantizable(denoiser(model, name)), exclude)
    source: dict[str, Any] = {"prompts": prompts, "forward_loop": forward_loop, "call_kwargs": call_kwargs}
    source |= {"cache_dir": cache_dir, "cache_key": cache_key, "progress": progress, "device": device}
    task = {"target": machine, "exclude": tuple(exclude), "progress": progress}
    first, *second = [
        _decide(model, name, recipe, w, own, task, source | settings) for name, w in widths.items()
    ]
    decided = replace(first, components=dict(zip(list(widths)[1:], second, strict=True)))
    return parts.with_components(decided, model, others, progress)


def _decide(
    model: Any,
    component: str,
    recipe: str,
    bits: str,
    options: Mapping[str, Any],
    given: Mapping[str, Any],
    source: Mapping[str, Any],
) -> Plan:
    """The plan of one denoiser, calibrated from `source` where the recipe needs data. `given` are fields of its task."""
    row, parsed = recipes.lookup(recipe), Bits.parse(bits)
    wanted = CalibrationSettings(**{key: source[key] for key in _SETTINGS & source.keys()})
    own = {**given, "seed": wanted.seed, "memory_bytes": wanted.memory_bytes}
    own |= {"work_dir": Path(source["cache_dir"])} if source["cache_dir"] is not None else {}
    chosen = recipes.make_options(row, options, bits)
    needed = row.needs_data(chosen, parsed)
    data = calibrate(model, component, **source) if needed else _no_rows(model, component, source["device"])
    _say_remaining(row.cost(chosen, parsed), data, source["progress"])
    with offloading.lifted(denoiser(model, component), onload=True):
        return plan_calibrated(replace(task_of(model, data, parsed, component), **own), recipe, bits, options)


def _apart(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of `CalibrationSettings` among some options, and the options of a recipe."""
    settings = {name: value for name, value in options.items() if name in _SETTINGS}
    return settings, {name: value for name, value in options.items() if name not in _SETTINGS}


def _say_remaining(asked: Cost, data: Calibration, progress: bool) -> None:
    """Write one line about the remaining work above the progress bars, before the long part begins."""
    if progress and len(data) and distributed.is_main():
        tqdm.write(remaining(asked, data), file=sys.stderr)


def repair(
    model: Any,
    plan: Plan,
    *,
    epochs: int = 10,
    rank: int = 32,
    dfa: bool = True,
    guidance_weight: float = 9.0,
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
        epochs: Passes along the trajectory. More than the rows are worth make pictures worse (docs/papers/msfp.md).
        rank: The rank of the adapters. 0 trains ranges and scales only.
        dfa: Whether the loss of a timestep is weighted by the square of its factor in the sampler's update.
        guidance_weight: The weight of the guided difference in the loss (`TrainingSettings`), unused without guidance.
        prompts: Texts to calibrate with, or None for general built-in ones.
        forward_loop: A function that samples with a plain module.
        cache_dir: The directory that keeps calibration data and finished blocks.
        cache_key: A name of `forward_loop` in the cache, as `difloat.plan` takes it.
        progress: Whether to show progress bars.
        call_kwargs: Further arguments of the pipeline's call.
        device: Where the model is put and computes, or None for where it is.
        **settings: Fields of `CalibrationSettings`.

    Raises:
        ValueError: if a layer has several weights or adapters, the plan is of another model, or a number is out of range.
    """
    training = TrainingSettings(epochs, guidance_weight=guidance_weight)
    _check_repairable(model, plan, epochs, rank)
    _check_sampler(model, float(dfa), "repair must be told dfa=False")
    source: dict[str, Any] = {"prompts": prompts, "forward_loop": forward_loop, "device": device}
    source |= {"cache_dir": cache_dir, "cache_key": cache_key}
    data = calibrate(model, **source, progress=progress, call_kwargs=call_kwargs, **settings)
    wanted, work_dir = CalibrationSettings(**settings), None if cache_dir is None else Path(cache_dir)
    with offloading.lifted(denoiser(model), onload=True):
        task = replace(task_of(model, data, Bits.parse(plan.bits)), seed=wanted.seed, progress=progress)
        task = replace(task, work_dir=work_dir, memory_bytes=wanted.memory_bytes)
        training = replace(training, guidance_weight=(weight := guidance_to_keep(guidance_weight, task)))
        weights = loss_weights(task, 2.0 if dfa else 0.0)
        tuned = tune(task, start_of(plan, task), Tuning(training, 1, rank, weights, of_8_bits(plan)))
    used = {"epochs": epochs, "rank": rank, "dfa": dfa, "guidance_weight": weight, "seed": wanted.seed}
    trained = replace(plan, layers=tuned.layers, timesteps=tuned.timesteps, measured=tuned.measured)
    return replace(trained, options={**plan.options, "repair": used})


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


def _check_sampler(model: Any, power: float, way_out: str) -> None:
    """Refuse a loss that is weighted by the sampler where there is none, before anything is calibrated."""
    if power and isinstance(model, nn.Module):
        raise ValueError(
            f"{way_out} for a plain module, got one with a loss weighted by the sampler's steps; pass it, or pass the pipeline"
        )


def _check_repairable(model: Any, plan: Plan, epochs: int, rank: int) -> None:
    if not isinstance(rank, int) or rank < 0 or not epochs:
        raise ValueError(
            f"epochs must be at least 1 and rank a whole number of at least 0, got {epochs!r} and {rank!r}"
        )
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
    prompts: Sequence[str] | None = None,
    forward_loop: Callable[[nn.Module], object] | None = None,
    cache_dir: str | Path | None = None,
    cache_key: str | None = None,
    progress: bool = True,
    call_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    **settings: Any,
) -> Calibration:
    """The inputs of a denoiser, of several the one called `component`, along its own trajectories. `plan` has the arguments."""
    module = denoiser(devices.move(model, device), component)
    check_model(module)
    wanted = CalibrationSettings(**settings)
    if model is not module:
        if forward_loop is not None or cache_key is not None:
            raise ValueError(
                f"forward_loop and cache_key must come with a plain module, got {type(model).__name__}, which samples itself; "
                "leave them out, or pass its denoiser"
            )
        texts = prompts_for(model, prompts)
        shown: dict[str, Any] = {
            "progress": progress,
            "call_kwargs": call_kwargs,
            "component": component or None,
        }
        return collect.collect(model, texts, wanted, cache_dir=cache_dir, **shown)
    if forward_loop is None:
        raise ValueError(
            "a plain module must come with forward_loop, got None; give a function that samples with the module"
        )
    return collect.collect_from_loop(
        module, forward_loop, wanted, cache_dir=cache_dir, cache_key=cache_key, progress=progress
    )


def _no_rows(model: Any, component: str, device: torch.device | str | None) -> Calibration:
    """The empty calibration of a recipe that looks at no data, for which the denoiser is not called."""
    module = denoiser(devices.move(model, device), component)
    check_model(module)
    return Calibration([], Shelf(None, 0, {}), next(module.parameters()).device)


def plan_calibrated(task: Task, recipe: str, bits: str, options: Mapping[str, Any]) -> Plan:
    """`plan` with calibration data at hand, to try several recipes on the same data."""
    return recipes.plan(task, recipe, bits, options)


def check_model(module: nn.Module) -> None:
    """Refuse models that cannot be quantized, and modes of torch that they cannot be quantized in, before any work."""
    torch_modes.check_defaults()
    wrapped.refuse(module, "quantized")
    with offloading.lifted(module):
        hooks.check(module)
        _check_layers(module)


def _check_layers(module: nn.Module) -> None:
    found = packed.quantizable(module)
    if not found:
        raise ValueError(
            "model must have linear or convolution layers in float, got none; is it quantized already?"
        )
    for name, layer in found.items():
        if not bool(layer.weight.isfinite().all()):
            raise ValueError(
                f"weights must be finite, got NaN or Inf in layer {name!r}; repair the checkpoint"
            )


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


def quantize(model: Any, recipe: str = "lbfp", bits: str = "w4a8", **arguments: Any) -> Plan:
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
