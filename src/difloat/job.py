"""A request, made of what a user writes, and fitted to a model: whatever can be refused is refused here, once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from difloat import components as parts
from difloat import devices, recipes, torch_modes
from difloat.checkpoint.data_free import Settings
from difloat.checkpoint.outline import widths_in
from difloat.layers import hooks, offloading
from difloat.layers.exclude import Exclusion, excluded
from difloat.layers.quantizable import check_weights, quantizable
from difloat.lora import wrapped
from difloat.methods.byte_counts import least_bytes
from difloat.methods.cost import Cost, check_files
from difloat.methods.picture_budget import is_large, sampled
from difloat.pipelines import usual_steps
from difloat.plan import options as recipe_options
from difloat.plan.layer_bits import by_component
from difloat.plan.plan import Plan
from difloat.plan.request import CalibrationSettings, Request
from difloat.plan.rules import Bits


def request(
    recipe: str,
    bits: str,
    options: Mapping[str, Any],
    calibration: CalibrationSettings | None = None,
    *,
    device: torch.device | str | None = None,
    cache: str | Path | None = None,
    bits_from: Plan | str | Path | None = None,
    **others: Any,
) -> Request:
    """The request that a user's words make.

    Args:
        recipe: One of `difloat.recipes.RECIPES`.
        bits: The bits of weights and inputs, like "w4a8".
        options: The recipe's options, as a user writes them.
        calibration: What to collect, or None for the defaults.
        device: The name of a device (`devices.resolve`), or None to leave the model where it is.
        cache: The directory that keeps the run, or None.
        bits_from: A plan whose layers' weight bits are taken, or the directory of a checkpoint.
        **others: Other fields of `Request`.

    Raises:
        ValueError: on an unknown recipe, option, target or device, or a value that is not allowed or would change nothing.
        FileNotFoundError: if there is no checkpoint where `bits_from` says.
    """
    row = recipes.lookup(recipe)
    asked = Request(
        recipe,
        bits,  # type: ignore[arg-type]  # read by the field
        calibration or CalibrationSettings(),
        options=recipe_options.make_options(row.options, options),
        device=None if device is None else devices.resolve(device),
        cache=None if cache is None else Path(cache),
        bits_from=None if bits_from is None else _widths(bits_from, recipe),
        **others,
    )
    recipe_options.checked(asked.options, asked.bits, row.averages)
    if asked.bits_from is not None:
        recipe_options.check_formats_open(asked.options)
    check_files(asked.options, row.cost, asked.bits, asked.target)
    return asked


def _widths(source: Plan | str | Path, recipe: str) -> Mapping[str, Mapping[str, int]]:
    """Weight bits by denoiser and layer, for a recipe that takes them."""
    if recipe in recipes.UNTOLD:
        able = ", ".join(name for name in recipes.RECIPES if name not in recipes.UNTOLD)
        raise ValueError(
            f"bits_from must come with a recipe that is told the bits of layers ({able}), got {recipe}; leave it out"
        )
    return by_component(source) if isinstance(source, Plan) else widths_in(Path(source))


@dataclass(frozen=True)
class Job:
    """A request that fits a model.

    Attributes:
        request: What is asked for.
        model: The pipeline or module that it is asked for.
        denoisers: The bits of every denoiser that the recipe quantizes, by name. A module has the name "".
        exclusions: The layers of each denoiser that stay as they are.
        others: What is asked of the other components, which are quantized without data.
        layer_bits: Weight bits of layers by denoiser, where the request takes them from a plan.
    """

    request: Request
    model: Any
    denoisers: Mapping[str, Bits]
    exclusions: Mapping[str, Exclusion]
    others: Mapping[str, Settings]
    layer_bits: Mapping[str, Mapping[str, int]]

    def needs_data(self, bits: Bits) -> bool:
        """Whether the recipe looks at calibration data at these bits."""
        return needs_data(self.request, bits)

    def cost(self, bits: Bits) -> Cost:
        """What the recipe asks of a denoiser at these bits."""
        return recipes.lookup(self.request.recipe).cost(self.request.options, bits)


def needs_data(asked: Request, bits: Bits) -> bool:
    """Whether the recipe looks at calibration data at these bits."""
    return recipes.lookup(asked.recipe).needs_data(asked.options, bits)


def fit(model: Any, asked: Request) -> Job:
    """Check that a request fits a model, which stays untouched. Every weight of its denoisers is looked at.

    Raises:
        ValueError: on an unknown layer or component, a model without layers to quantize, values not finite, or a model or mode
            of torch that nothing can be quantized in.
    """
    check_sampler(
        model, getattr(asked.options, "sampler_power", 0.0), f"{asked.recipe} must be told factor_power=0"
    )
    asked = _with_trajectories(model, asked)
    others = parts.parse(model, asked.components, asked.bits, asked.target)
    widths = parts.denoisers(model, asked.components, asked.bits)
    exclusions, layer_bits = {}, dict[str, Mapping[str, int]]()
    averages = recipes.lookup(asked.recipe).averages
    for number, (name, bits) in enumerate(widths.items()):
        recipe_options.checked(asked.options, bits, averages)
        module = parts.denoiser(model, name)
        check_model(module)
        names = excluded(quantizable(module), asked.exclude)
        exclusions[name] = Exclusion(asked.exclude, frozenset(names))
        _check_size(module, exclusions[name], asked)
        layer_bits[name] = (asked.bits_from or {}).get(name if number else "", {})
        check_layers(module, layer_bits[name])
    return Job(asked, model, widths, exclusions, others, layer_bits)


def check_layers(module: nn.Module, given: Mapping[str, int]) -> None:
    """Refuse weight bits of layers that the module does not have."""
    unknown = sorted(given.keys() - quantizable(module).keys())
    if unknown:
        raise ValueError(
            f"bits_from must be a plan of this model, got one with a layer {unknown[0]!r}; quantize this model for it"
        )


def _check_size(module: nn.Module, exclusion: Exclusion, asked: Request) -> None:
    """Refuse a size that no plan meets before anything is calibrated."""
    size = getattr(asked.options, "size", None)
    if size is None:
        return
    least = least_bytes(module, exclusion.names, asked.target)
    if size < least:
        raise ValueError(
            f"size must be at least {least} bytes for this model, even with the fewest bits in all layers, got {size}"
        )


def _with_trajectories(model: Any, asked: Request) -> Request:
    """The request with the recipe's number of trajectories, where the user names none.

    Small models get the recipe's own number. Of large ones it is what a budget of pictures allows (`picture_budget`).
    """
    number, wanted = recipes.lookup(asked.recipe).trajectories, asked.calibration
    budget = getattr(asked.options, "pictures", 0.0)
    if wanted.trajectories is not None or number is None:
        return asked
    if not is_large(parts.denoiser(model)):
        return replace(asked, calibration=replace(wanted, trajectories=min(number, wanted.samples)))
    steps = wanted.steps or (None if isinstance(model, nn.Module) else usual_steps(model))
    if not budget or steps is None:
        return asked
    pictures, samples = sampled(budget, wanted.samples, steps)
    at_once = min(pictures, wanted.prompts_per_batch)
    return replace(asked, calibration=replace(wanted, samples=samples, prompts_per_batch=at_once))


def check_sampler(model: Any, power: float, way_out: str) -> None:
    """Refuse a loss that is weighted by the sampler where there is none, before anything is calibrated."""
    if power and isinstance(model, nn.Module):
        raise ValueError(
            f"{way_out} for a plain module, got one with a loss weighted by the sampler's steps; pass it, or pass the pipeline"
        )


def check_model(module: nn.Module) -> None:
    """Refuse models, and modes of torch, that cannot be quantized (in) before any work is done."""
    torch_modes.check_defaults()
    wrapped.refuse(module, "quantized")
    with offloading.lifted(module):
        hooks.check(module)
        check_weights(module)
