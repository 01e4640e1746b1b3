"""What computes a model here: the native library, its unit, and the backend of every layer, in words."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from difloat.kernels import backends, integers, native
from difloat.layers import QuantizedLayer
from difloat.specs import Part

_TOKENS = 1024


def machine() -> str:
    """One line: unit of the native library, attention, backend in force, threads."""
    unit = native.unit()
    if unit is not None:
        attention = "with" if native.attention_unit() else "without"
        tier = f"native library, {unit} unit, {attention} bfloat16 attention"
    elif native.built():
        tier = "native library has no unit for this machine, torch computes"
    else:
        tier = "native library not built, torch computes"
    return f"kernels: {tier}; backend {backends.backend()}, {torch.get_num_threads()} threads"


def layers(model: nn.Module) -> list[str]:
    """One line per kind of layer: how many parts of layers which backend computes, and why not in integers."""
    counts: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            for part in module.parts:
                counts[_way(part, module.float_shape)] += 1
    return [f"{count} x {way}" for way, count in counts.most_common()]


def _way(part: Part, shape: tuple[int, ...]) -> str:
    own = (shape[0], part.channels, *shape[2:])
    size = (_TOKENS, part.channels) if len(shape) == 2 else (1, part.channels, 32, 32)
    x = torch.empty(size, dtype=torch.bfloat16)
    module = backends.choose(part, own, x)
    name = next(name for name, known in backends.BACKENDS.items() if known is module)
    activation = "float" if part.activation is None else part.activation.format.name
    formats = f"{part.weight.format.name} x {activation}"
    if name != "reference":
        return f"{formats}: int8 products, backend {name}"
    return f"{formats}: decoded to floats, backend reference ({integers.reason_against(part) or 'no faster one'})"
