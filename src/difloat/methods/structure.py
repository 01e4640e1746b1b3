"""The structure of a model as a `Trace`, read without running it, for plans that need no data."""

from __future__ import annotations

from torch import nn

from difloat.layers import code_readers, packed
from difloat.methods.trace import Trace

UNREAD = "code of the class around it cannot be read, and nothing was run"


def unread(model: nn.Module) -> dict[str, str]:
    """Layers of modules whose `forward` has no source, with the reason. Such modules may read the weights themselves."""
    closed = [name for name, module in model.named_modules() if not code_readers.readable(type(module))]
    return {
        layer: UNREAD
        for layer in packed.quantizable(model)
        if any(not name or layer.startswith(f"{name}.") for name in closed)
    }


def structure(model: nn.Module) -> Trace:
    """The layers in the order of the modules, and those at the edges, without running the model.

    At the edges are the layers that a model has once, outside of all lists of blocks: embedders of the sample, the timestep and
    the text, and the final projection, which is the last of them. All but that one count as `Trace.first`, since only a run
    would tell which of them reads the sample. A model without lists of blocks has its first and its last layer there.
    Concatenations, and uses of weights besides calling their layers, stay unknown.
    """
    order = list(packed.quantizable(model))
    inside = set(packed.inside_blocks(model))
    edges = [name for name in order if name not in inside] if inside else [*order[:1], *order[-1:]]
    return Trace(order=order, first=edges[:-1], last=edges[-1] if edges else "")


def likely(model: nn.Module) -> Trace:
    """The structure with the edges that a run will probably show, by the channels of the sample in the model's config.

    Of the layers at the edges the first that takes as many channels as a sample has, or a patch of it, is likely to read the
    sample, and the last that gives as many is likely to give the prediction. A model without such a config keeps all edges.
    """
    seen = structure(model)
    config, edges = getattr(model, "config", None), [*seen.first, seen.last]
    channels = getattr(config, "in_channels", None)
    if not isinstance(channels, int) or not seen.last:
        return seen
    given, patch = getattr(config, "out_channels", None) or channels, getattr(config, "patch_size", None)
    per_patch = patch**2 if isinstance(patch, int) else 1
    shapes = {name: packed.weight_of(model, name).shape for name in edges}
    readers = [n for n, shape in shapes.items() if shape[1] in (channels, channels * per_patch)]
    givers = [n for n, shape in shapes.items() if shape[0] in (given, given * per_patch)]
    return Trace(order=seen.order, first=readers[:1], last=givers[-1] if givers else seen.last)
