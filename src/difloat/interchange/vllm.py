"""vLLM-Omni's SVDQuant files: NVFP4 beside a low-rank branch in bfloat16, and a config that says which layers stay float.

The layout is the "checkpoint contract" of https://docs.vllm.ai/projects/vllm-omni/en/latest/user_guide/quantization/svdquant/,
read by `vllm_omni/quantization/svdquant_config.py` (version 0.30). All layers have branches of one rank, so smaller ones, and
layers without, are filled up with zeros, which changes nothing. Query, key and value that are one layer in vLLM-Omni's model
(`plan.vllm_models`) are one in the file: their rows follow each other, and what multiplies all codes of each of them goes into
the factors of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from difloat.checkpoint.layout import StoredTensor
from difloat.interchange.contents import Contents
from difloat.interchange.layers import obstacle_of_inputs, split_scales
from difloat.numbers import formats
from difloat.plan import vllm_models
from difloat.plan.plan import LayerPlan, Plan

METHOD = "svdquant"
_GROUP = 16
_E2M1 = formats.parse("e2m1")
_ADVICE = "quantize with --recipe svdquant --bits w4a16 --for vllm"
_SHOWN = 3  # names in a remark


def rank_of(layers: Mapping[str, LayerPlan], joined: Mapping[str, Sequence[str]]) -> int:
    """The rank of all branches of a file: the largest of layers, or of joined ones together where their first factors differ.

    Raises:
        ValueError: if there is none.
    """
    rank = max((_rank(layer) for layer in layers.values()), default=0)
    rank = max([rank, *(_joint_rank([layers[name] for name in names]) for names in joined.values())])
    if not rank:
        raise ValueError(
            f"vllm files must have a low-rank branch beside a weight, got none; {_ADVICE}, or export to nvfp4"
        )
    return rank


def _rank(layer: LayerPlan) -> int:
    return 0 if layer.side is None else layer.side.rank


def _one_first_factor(layers: Sequence[LayerPlan]) -> bool:
    """Whether layers have branches with the same first factor."""
    down = [layer.tensors.get("side_down") for layer in layers]
    return all(one is not None and down[0] is not None and torch.equal(one, down[0]) for one in down)


def _joint_rank(layers: Sequence[LayerPlan]) -> int:
    return _rank(layers[0]) if _one_first_factor(layers) else sum(map(_rank, layers))


def joined_layers(model: str, layers: Mapping[str, LayerPlan]) -> dict[str, tuple[str, ...]]:
    """The layers that are one in vLLM-Omni's model of a class, by its name in the file.

    Raises:
        ValueError: if that model holds a layer in float, or layers that are one there differ in more than their rows.
    """
    for name in layers:
        if reason := vllm_models.left_float(model, name):
            raise ValueError(
                f"vllm files must fit vLLM-Omni's model, but {name!r} does not: {reason}; {_ADVICE}"
            )
    joined = vllm_models.joined(model, layers)
    for whole, names in joined.items():
        if missing := [name for name in names if name not in layers]:
            raise ValueError(
                f"all of {', '.join(names)} must be quantized for {whole!r} of a vllm file, but {missing[0]!r} is not; exclude "
                "all of them, or none"
            )
        factors = [layers[name].tensors.get("input_factor") for name in names]
        same = [
            one is factors[0] or (one is not None and factors[0] is not None and torch.equal(one, factors[0]))
            for one in factors
        ]
        if not all(same) or len({layers[name].shape[1] for name in names}) > 1:
            raise ValueError(
                f"{', '.join(names)} must have the same factors of input channels to be {whole!r} of a vllm file, but have "
                f"others; {_ADVICE}"
            )
    return joined


def obstacle(layer: LayerPlan) -> str:
    """Why the layout cannot hold a layer without loss, as the end of "layer L ...", or "" if it can."""
    if layer.kind != "linear":
        return "is a convolution; keep it as it is with --exclude"
    turned = layer.rotation is not None
    if layer.schedules or turned or layer.bands or len(layer.parts) != 1:
        return f"is no linear layer with one weight and no rotation; {_ADVICE}"
    if reason := obstacle_of_inputs(layer):
        return reason
    spec = layer.parts[0].weight
    if spec.format != _E2M1:
        return f"is on the grid of {spec.format.name}, not e2m1; {_ADVICE}"
    if layer.shape[1] % _GROUP or (spec.group_size or layer.shape[1]) % _GROUP:
        return f"has {layer.shape[1]} input channels in groups of {spec.group_size or 'all'}, not of {_GROUP}; {_ADVICE}"
    if split_scales(layer.tensors["weight_scale"], torch.bfloat16) is None:
        return f"has scales that are no e4m3 numbers times one bfloat16 number; {_ADVICE}"
    rest = [layer.tensors[key] for key in ("side_down", "side_up") if key in layer.tensors]
    if layer.smoothed:
        factors = layer.tensors["input_factor"]
        if not bool((factors.frexp().mantissa == 0.5).all()):
            return f"has factors of input channels that are no powers of two; {_ADVICE}"
        rest.append(factors.reciprocal())
    if not all(torch.equal(_bfloat16(tensor).to(tensor.dtype), tensor) for tensor in rest):
        return f"has a branch or factors that bfloat16 does not hold; {_ADVICE}"
    return ""


def _bfloat16(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16)


def encode(name: str, layer: LayerPlan, rank: int) -> dict[str, Tensor]:
    """The stored tensors of a layer, by their names behind the layer's.

    Args:
        name: The name of the layer.
        layer: The layer.
        rank: The rank of all branches of the file.

    Raises:
        ValueError: if the layout does not hold it exactly.
    """
    if reason := obstacle(layer):
        raise ValueError(f"vllm files must hold every layer without loss, but {name!r} {reason}")
    (rows, columns), spec = layer.shape, layer.parts[0].weight
    found = split_scales(layer.tensors["weight_scale"], torch.bfloat16)
    assert found is not None
    per_row = found[0].expand(rows) if spec.granularity == "tensor" else found[0]
    starts = torch.arange(0, columns, _GROUP) // (spec.group_size or columns)
    down = torch.zeros(columns, rank, dtype=torch.bfloat16)
    up = torch.zeros(rows, rank, dtype=torch.bfloat16)
    if layer.side is not None:
        down[:, : layer.side.rank] = _bfloat16(layer.tensors["side_down"]).t()
        up[:, : layer.side.rank] = _bfloat16(layer.tensors["side_up"])
    smooth = torch.ones(columns)
    if layer.smoothed:
        smooth = layer.tensors["input_factor"].reciprocal()  # vLLM-Omni divides
    return {
        "qweight": layer.tensors["weight"].reshape(rows, columns // 2).view(torch.int8),
        "wscales": per_row.view(torch.uint8).reshape(rows, -1)[:, starts].t().view(torch.float8_e4m3fn),
        "proj_down": down,
        "proj_up": up,
        "smooth_factor": _bfloat16(smooth),
        "wcscales": torch.ones(rows, dtype=torch.bfloat16),
        "wtscale": _bfloat16(found[1]).reshape(1),
    }


def encode_joined(names: Sequence[str], layers: Mapping[str, LayerPlan], rank: int) -> dict[str, Tensor]:
    """The stored tensors of layers that are one in the file, as `encode` gives them for one.

    Args:
        names: The layers in the order of their rows, as `joined_layers` gives them.
        layers: All layers by name.
        rank: The rank of all branches of the file.

    Raises:
        ValueError: if the layout does not hold one of them exactly.
    """
    parts = [encode(name, layers[name], rank) for name in names]
    made = {**parts[0], "qweight": torch.cat([part["qweight"] for part in parts])}
    made["wscales"] = torch.cat([part["wscales"].view(torch.uint8) for part in parts], 1).view(
        torch.float8_e4m3fn
    )
    if not _one_first_factor([layers[name] for name in names]):
        at = 0
        down = torch.zeros_like(made["proj_down"])
        for name, part in zip(names, parts, strict=True):
            own = _rank(layers[name])
            down[:, at : at + own] = part["proj_down"][:, :own]
            part["proj_up"] = part["proj_up"].roll(at, 1)
            at += own
        made["proj_down"] = down
    made["proj_up"] = torch.cat([part["proj_up"] for part in parts])
    made["wcscales"] = torch.cat([part["wcscales"] for part in parts])
    if len({float(part["wtscale"]) for part in parts}) > 1:
        made["wcscales"] = torch.cat([part["wtscale"].expand(len(part["wcscales"])) for part in parts])
        made["wtscale"] = torch.ones_like(made["wtscale"])
    return made


def encode_all(contents: Contents) -> tuple[dict[str, Tensor], int]:
    """All tensors of the file, and the rank of its branches.

    Raises:
        ValueError: if the layout does not hold a layer exactly, or vLLM-Omni's model does not read it.
    """
    layers, tensors = contents.layers, dict(contents.others)
    joined = joined_layers(str(contents.config.get("_class_name", "")), layers)
    rank = rank_of(layers, joined)
    inside = {name for names in joined.values() for name in names}
    encoded = {name: encode(name, layer, rank) for name, layer in layers.items() if name not in inside}
    for whole, names in joined.items():
        encoded[whole] = encode_joined(names, layers, rank)
        biases = [tensors.pop(f"{name}.bias", None) for name in names]
        if found := [bias for bias in biases if bias is not None]:
            zeros = (torch.zeros(layers[name].shape[0], dtype=found[0].dtype) for name in names)
            tensors[f"{whole}.bias"] = torch.cat(
                [zero if bias is None else bias for bias, zero in zip(biases, zeros, strict=True)]
            )
    tensors |= {
        f"{name}.{key}": one.contiguous() for name, own in encoded.items() for key, one in own.items()
    }
    return tensors, rank


def config_of(contents: Contents, rank: int) -> dict[str, Any]:
    """The model's config, with vLLM-Omni's note of how it is quantized."""
    plain, hidden = _in_float(contents.others, contents.layers)
    entry = {
        "quant_method": METHOD,
        "rank": rank,
        "precision": "nvfp4",
        "act_unsigned": False,
        "modules_to_not_convert": [name for name in plain if name not in hidden],
    }
    return {**contents.config, "quantization_config": entry}


def _in_float(
    tensors: Mapping[str, Tensor | StoredTensor], quantized: Mapping[str, LayerPlan]
) -> tuple[list[str], list[str]]:
    """Layers with a float matrix, and those of them that cannot be named.

    vLLM-Omni leaves alone whatever has one of the names anywhere in its own, so a name must not be a part of that of a
    quantized layer.
    """
    weights = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
    plain = [name for name in weights if name not in quantized and len(tensors[f"{name}.weight"].shape) == 2]
    return plain, [name for name in plain if any(name in other for other in quantized)]


def remarks(plan: Plan, stored: Mapping[str, StoredTensor]) -> list[str]:
    """The inputs that vLLM-Omni rounds though the checkpoint does not, and layers in float that the config cannot name."""
    found = [f"vLLM-Omni rounds the inputs of all {len(plan.layers)} layers to E2M1 in groups of {_GROUP}"]
    if hidden := _in_float(stored, plan.layers)[1]:
        more = f" and {len(hidden) - _SHOWN} more" if len(hidden) > _SHOWN else ""
        found.append(
            f"{', '.join(hidden[:_SHOWN])}{more}: in float, but not in modules_to_not_convert, since names of quantized layers "
            "contain theirs; vLLM-Omni refuses the file if it wants to quantize them itself"
        )
    return found


def layers_in(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the layers of this layout in a file."""
    return [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]


def check(name: str, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What is wrong with a layer of this layout, `tensors` being those of the file."""
    weight = tensors[f"{name}.qweight"]
    if weight.dtype != torch.int8 or weight.dim() != 2 or 2 * weight.shape[1] % _GROUP:
        yield f"qweight must be int8 [o, i / 2] with i a multiple of {_GROUP}, got {weight.dtype} {list(weight.shape)}"
        return
    rows, columns = weight.shape[0], 2 * weight.shape[1]
    down = tensors.get(f"{name}.proj_down")
    rank = -1 if down is None else int(down.shape[-1])
    wanted = {
        "wscales": ((columns // _GROUP, rows), torch.float8_e4m3fn),
        "proj_down": ((columns, rank), torch.bfloat16),
        "proj_up": ((rows, rank), torch.bfloat16),
        "smooth_factor": ((columns,), torch.bfloat16),
        "wcscales": ((rows,), torch.bfloat16),
        "wtscale": ((1,), torch.bfloat16),
    }
    for key, (shape, dtype) in wanted.items():
        tensor = tensors.get(f"{name}.{key}")
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            yield f"{key} must be {dtype} {list(shape)} in {METHOD}, got {got}"
        elif not bool(tensor.float().isfinite().all()):
            yield f"{key} must be finite, got NaN or infinity"
        elif key == "smooth_factor" and not bool((tensor > 0).all()):
            yield "smooth_factor must be positive, since inputs are divided by it, got zero or less"
