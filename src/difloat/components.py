"""The parts of a pipeline that are no denoiser, text encoders and autoencoder: quantized without data, on request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from difloat.checkpoint import data_free
from difloat.checkpoint.data_free import Settings
from difloat.layers import hooks, offloading
from difloat.pipelines import denoiser_of
from difloat.plan.plan import Plan


def parse(pipeline: Any, wanted: Sequence[str] | None, bits: str, target: str = "any") -> dict[str, Settings]:
    """What is asked of the components of a pipeline besides the denoiser, by name.

    Args:
        pipeline: A diffusers pipeline, or a module, which has no components.
        wanted: Names of components, the denoiser among them; "vae=w8a8" gives one other bits than the rest. None: none.
        bits: Of all whose bits are not given.
        target: As for `difloat.plan`.

    Raises:
        ValueError: if a name is no model of the pipeline, or the denoiser is not among them.
    """
    if wanted is None:
        return {}
    if isinstance(pipeline, nn.Module):
        raise ValueError("components can be chosen for pipelines only, got a module; leave components out")
    denoiser = denoiser_of(pipeline)[0]
    if denoiser not in wanted:
        raise ValueError(
            f"components must name the denoiser {denoiser!r}, whose bits are those of the call, got {list(wanted)}; "
            "to quantize others alone, load them with difloat.DifloatConfig"
        )
    models = [name for name, part in pipeline.components.items() if isinstance(part, nn.Module)]
    found = {}
    for entry in wanted:
        name, _, own_bits = entry.partition("=")
        if name not in models or (name == denoiser and own_bits):
            raise ValueError(f"components must be among {', '.join(models)}, got {entry!r}")
        if name != denoiser:
            with offloading.lifted(pipeline.components[name]):
                hooks.check(pipeline.components[name])
            found[name] = data_free.settings({"bits": own_bits or bits, "target": target})
    return found


def with_components(plan: Plan, pipeline: Any, wanted: dict[str, Settings], progress: bool) -> Plan:
    """The denoiser's plan with those of the other components."""
    plans = {}
    for name, settings in wanted.items():
        with offloading.lifted(getattr(pipeline, name), onload=True):
            plans[name] = data_free.plan(getattr(pipeline, name), settings, progress=progress)
    return replace(plan, components=plans)


def models(pipeline_or_module: Any, denoiser: nn.Module, plan: Plan) -> list[tuple[nn.Module, Plan]]:
    """Every model that a plan is about, with its part of the plan.

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
    """A sentence for every component besides the denoiser, for the report."""
    return [
        f"{name}: {len(own.layers)} layers packed at {own.bits} without data, "
        f"{sum(layer.nbytes for layer in own.layers.values()) / 1e6:.2f} MB; {len(own.skipped)} layers left as they are."
        for name, own in plan.components.items()
    ]
