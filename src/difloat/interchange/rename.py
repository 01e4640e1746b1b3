"""A model's contents under the names of the file that it came from: layers and tensors joined from rows of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from difloat.interchange.contents import Contents
from difloat.interchange.layers import obstacle_of_structure
from difloat.interchange.source_names import unused_tensors
from difloat.plan.plan import LayerPlan
from difloat.plan.specs import Part

_WEIGHT = ".weight"
_INSTEAD = "write it with --names diffusers"


def renamed(contents: Contents, names: Mapping[str, Any]) -> Contents:
    """The same model under the names of its file.

    Raises:
        ValueError: if a layer of the file is made of layers of ours that differ in how they are quantized.
    """
    layers: dict[str, LayerPlan] = {}
    others: dict[str, Tensor] = {}
    for source, entry in names["tensors"].items():
        runs = [(name, slice(start, stop)) for name, start, stop in entry["rows"]]
        quantized = [name.removesuffix(_WEIGHT) for name, _ in runs if _is_layer(name, contents)]
        if quantized and len(quantized) < len(runs):
            kept = next(name for name, _ in runs if not _is_layer(name, contents))
            raise ValueError(
                f"all of {source!r} must be quantized or none, but of its parts {quantized[0]!r} is and {kept!r} is not; "
                f"exclude both, or {_INSTEAD}"
            )
        if quantized:
            pieces = [(contents.layers[name.removesuffix(_WEIGHT)], rows) for name, rows in runs]
            layers[source.removesuffix(_WEIGHT)] = _joined(source, pieces, entry["shape"])
        else:
            rows = [
                contents.others[name].reshape(_rows_first(contents.others[name]))[at] for name, at in runs
            ]
            others[source] = torch.cat(rows).reshape(entry["shape"])
    return replace(contents, layers=layers, others=others | unused_tensors(names))


def _is_layer(name: str, contents: Contents) -> bool:
    return name.endswith(_WEIGHT) and name.removesuffix(_WEIGHT) in contents.layers


def _rows_first(tensor: Tensor) -> Sequence[int]:
    return tensor.shape or (1,)


def _joined(source: str, pieces: list[tuple[LayerPlan, slice]], shape: Sequence[int]) -> LayerPlan:
    """One layer of rows of others, in the shape that the file has it."""
    first = pieces[0][0]
    for layer, _ in pieces:
        if problem := obstacle_of_structure(layer):
            raise ValueError(f"{source!r} must be made of layers that files hold, but one {problem}")
    specs = {(layer.parts, layer.rotation) for layer, _ in pieces}
    static = [layer.tensors.get("input_scale") for layer, _ in pieces]
    same_inputs = all(
        scale is None or torch.equal(scale, static[0]) for scale in static if static[0] is not None
    )
    if len(specs) > 1 or not same_inputs:
        found = sorted({layer.parts[0].weight.format.name for layer, _ in pieces})
        raise ValueError(
            f"{source!r} must be quantized in one way, but its parts are not (weights {', '.join(found)}); quantize with one "
            f"format and without stored input scales, or {_INSTEAD}"
        )
    if math.prod(shape) != sum((at.stop - at.start) * math.prod(layer.shape[1:]) for layer, at in pieces):
        raise ValueError(f"rows of {source!r} must fill its shape {list(shape)}, got others; {_INSTEAD}")
    tensors = {key: tensor for key, tensor in first.tensors.items() if key.startswith("input_")}
    whole = all(at == slice(0, layer.shape[0]) for layer, at in pieces)
    part = first.parts[0]
    if part.weight.granularity == "tensor" and not (whole and len(pieces) == 1):
        part = replace(part, weight=replace(part.weight, granularity="channel"))
    tensors["weight"] = _shaped(torch.cat([layer.tensors["weight"][at] for layer, at in pieces]), shape)
    for key in ("weight_scale", "weight_zero_point"):
        if key in first.tensors:
            tensors[key] = torch.cat([_of_rows(layer, key, at, part) for layer, at in pieces])
    kind: Literal["linear", "conv2d"] = "linear" if len(shape) == 2 else "conv2d"
    return replace(first, kind=kind, shape=tuple(shape), parts=(part,), tensors=tensors)


def _of_rows(layer: LayerPlan, key: str, rows: slice, part: Part) -> Tensor:
    """Scales or zero points of some rows, as the joined part lays them out."""
    numbers = layer.tensors[key]
    if part.weight.granularity == "tensor":
        return numbers
    per_row = numbers.expand(layer.shape[0]) if len(numbers) == 1 else numbers
    return per_row.reshape(layer.shape[0], -1)[rows].flatten()


def _shaped(codes: Tensor, shape: Sequence[int]) -> Tensor:
    """Packed codes [o, bytes, *k] with the kernel axes of another shape: none, or ones."""
    return codes.reshape(codes.shape[0], codes.shape[1], *shape[2:])
