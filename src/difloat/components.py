"""The components of a pipeline that are quantized: its denoisers by a recipe, and others on request, without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich.filesize import decimal
from torch import nn

from difloat.checkpoint import data_free
from difloat.checkpoint.data_free import Settings
from difloat.layers import hooks, offloading
from difloat.pipelines import denoiser_of, denoisers_of
from difloat.plan.plan import Plan
from difloat.plan.rules import Bits
from difloat.plan.target import Target


def denoiser(model: Any, name: str = "") -> nn.Module:
    """The module that is quantized: the denoiser of a pipeline, the one with this name of several, or the module itself."""
    if isinstance(model, nn.Module):
        return model
    return denoisers_of(model)[name] if name else denoiser_of(model)[1]


def denoisers(pipeline: Any, wanted: Mapping[str, Bits | None] | None, bits: Bits) -> dict[str, Bits]:
    """The denoisers that the recipe quantizes, by name, with their bits.

    Args:
        pipeline: A diffusers pipeline, or a module, which is a denoiser with the empty name.
        wanted: Names of components, as `parse` takes them. None takes all denoisers that share the trajectory.
        bits: The bits of all denoisers whose bits are not given.
    """
    if isinstance(pipeline, nn.Module):
        return {"": bits}
    given = {} if wanted is None else wanted
    return {
        name: given.get(name) or bits for name in denoisers_of(pipeline) if wanted is None or name in wanted
    }


def parse(
    pipeline: Any, wanted: Mapping[str, Bits | None] | None, bits: Bits, target: Target = "any"
) -> dict[str, Settings]:
    """The settings of the quantized components of a pipeline besides its denoisers, by name.

    Args:
        pipeline: A diffusers pipeline, or a module, which has no components.
        wanted: The bits of components by name, the denoiser among them, or None for no others. No bits are those of the call.
        bits: The bits of all components whose bits are not given.
        target: "cpu" for formats that CPUs compute in integers, or "any".

    Raises:
        ValueError: if a name is no model of the pipeline, or the denoiser is not among them.
    """
    if wanted is None:
        return {}
    if isinstance(pipeline, nn.Module):
        raise ValueError("components can be chosen for pipelines only, got a module; leave components out")
    own_timesteps = denoisers_of(pipeline)
    first = next(iter(own_timesteps))
    if first not in wanted or wanted[first] is not None:
        got = [name if own is None else f"{name}={own}" for name, own in wanted.items()]
        raise ValueError(
            f"components must name the denoiser {first!r}, whose bits are those of the call, got {got}; "
            "to quantize others alone, load them with difloat.DifloatConfig"
        )
    models = [name for name, part in pipeline.components.items() if isinstance(part, nn.Module)]
    found = {}
    for name, own in wanted.items():
        if name not in models:
            raise ValueError(f"components must be among {', '.join(models)}, got {name!r}")
        if name not in own_timesteps:
            with offloading.lifted(pipeline.components[name]):
                hooks.check(pipeline.components[name])
            found[name] = data_free.Settings(bits=str(own or bits), target=target)
    return found


def with_components(plan: Plan, pipeline: Any, wanted: Mapping[str, Settings], progress: bool) -> Plan:
    """The denoiser's plan, which may hold plans of further denoisers, with the plans of the other components added."""
    plans = dict(plan.components)
    for name, settings in wanted.items():
        with offloading.lifted(getattr(pipeline, name), onload=True):
            plans[name] = data_free.plan(getattr(pipeline, name), settings, progress=progress)
    return replace(plan, components=plans)


def models(pipeline_or_module: Any, denoiser: nn.Module, plan: Plan) -> list[tuple[nn.Module, Plan]]:
    """Every model that a plan is made for, with its own part of the plan.

    Raises:
        ValueError: if the plan names a component that is not there.
    """
    found = [(denoiser, plan)]
    for name, own in plan.components.items():
        model = getattr(pipeline_or_module, name, None)
        if not isinstance(model, nn.Module) or isinstance(pipeline_or_module, nn.Module):
            raise ValueError(
                f"plan must fit the pipeline, but it has no component {name!r}; use the pipeline the plan was made for"
            )
        found.append((model, own))
    return found


def notes(plan: Plan) -> list[str]:
    """A sentence for the report about every component besides the denoiser."""
    return [
        f"{name}: {len(own.layers)} layers packed at {own.bits} {_how(own)}, "
        f"{decimal(sum(layer.nbytes for layer in own.layers.values()), precision=2)}; "
        f"{len(own.skipped)} layers left as they are."
        for name, own in plan.components.items()
    ]


def _how(plan: Plan) -> str:
    return "without data" if plan.recipe == data_free.RECIPE else f"by {plan.recipe}, at its own timesteps"
