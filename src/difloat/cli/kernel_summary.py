"""What computes a model here: the native library, its unit, and the backend of every layer, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from difloat.kernels import dispatch, integer_operands, latency, native_decode, native_library
from difloat.layers.packed import QuantizedLayer
from difloat.plan.specs import Part, rows_of_parts

_TOKENS = 1024


def machine() -> str:
    """One line: unit of the native library, attention, backend in force, threads."""
    unit = native_library.unit()
    if unit is not None:
        attention = "with" if native_library.multiplies_bfloat16() else "without"
        refused = ", AMX refused by the operating system" if native_library.tiles_refused() else ""
        tier = f"native library, {unit} unit, {attention} bfloat16 attention{refused}"
    elif native_library.built():
        tier = "native library has no unit for this machine, torch computes"
    else:
        tier = "native library not built, torch computes"
    kept = native_decode.allowed_bytes() // 10**6
    decoded = f", up to {kept} MB of decoded weights kept" if kept else ""
    return f"kernels: {tier}; backend {dispatch.backend()}, {torch.get_num_threads()} threads{decoded}"


def times() -> str:
    """One line: where the times come from by which layers are computed packed or decoded."""
    return f"times: {latency.origin()}"


def layers(model: nn.Module) -> list[str]:
    """One line per kind of layer: how many parts of layers which backend computes, and why not in integers."""
    counts: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            bands = rows_of_parts(module.float_shape[0], module.parts, module.bands)
            for number in range(len(module.parts)):
                parts = [band.parts(module.parts)[number] for band in bands]
                counts[_way(parts, [band.rows for band in bands], module.float_shape)] += 1
    return [f"{count} x {way}" for way, count in counts.most_common()]


def _way(parts: Sequence[Part], rows: Sequence[int], shape: tuple[int, ...]) -> str:
    """What computes one part of a layer, given in all bands of its rows."""
    channels, taken = parts[0].channels, parts[0].activation
    size = (_TOKENS, channels) if len(shape) == 2 else (1, channels, 32, 32)
    x = torch.empty(size, dtype=torch.bfloat16)
    module = dispatch.choose_rows(parts, [(count, channels, *shape[2:]) for count in rows], x)
    name = next(name for name, known in dispatch.BACKENDS.items() if known is module)
    weights = "/".join(dict.fromkeys(part.weight.format.name for part in parts))
    formats = f"{weights} x {'float' if taken is None else taken.format.name}"
    if name not in ("reference", "decoded"):
        return f"{formats}: int8 products, backend {name}"
    reason = next(filter(None, map(integer_operands.reason_against, parts)), "no faster one")
    return f"{formats}: decoded to floats, backend {name} ({reason})"
