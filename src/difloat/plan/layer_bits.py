"""The weight bits of a plan's layers, which another recipe can be told to take."""

from __future__ import annotations

from collections.abc import Mapping

from difloat.plan.plan import Plan


def layer_bits(plan: Plan) -> dict[str, int]:
    """The weight bits of every layer of a plan.

    Raises:
        ValueError: if parts or rows of a layer have several widths, as other recipes give a layer one.
    """
    found: dict[str, int] = {}
    for name, layer in plan.layers.items():
        specs = [part.weight for part in layer.parts] + [s for band in layer.bands for s in band.weights]
        widths = sorted({spec.format.bits for spec in specs})
        if len(widths) > 1:
            raise ValueError(
                f"bits_from must be a plan with one width per layer, got {'/'.join(map(str, widths))} bits in {name!r}; make "
                "it with --set widths=layers"
            )
        found[name] = widths[0]
    return found


def by_component(plan: Plan) -> Mapping[str, Mapping[str, int]]:
    """The weight bits of all components of a plan, those of the first denoiser under the name ""."""
    return {"": layer_bits(plan)} | {name: layer_bits(own) for name, own in plan.components.items()}
