"""Validation of quantized files: our own checkpoints and those of other programs.

An error is certain: a reader refuses the file or gets wrong numbers. A suspicion is a statistic that usually goes with a
mistake, and may be false. The order of nibbles cannot be seen in a file alone, since both orders give the same statistics of
every group. With the float model at hand all arrangements are compared.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from difloat.checkpoint.layout import CONFIG, QUANT_METHOD, read_json
from difloat.checkpoint.manifest import MANIFEST
from difloat.checkpoint.verify import verify
from difloat.interchange import comfy, comfy_tables, gguf_files, openvino_ir, read_foreign, vllm
from difloat.interchange.layers import decode
from difloat.interchange.read_foreign import METADATA, PACKED, Foreign
from difloat.interchange.remarks import WRONG, Remark
from difloat.interchange.schemes import E8M0_NAN, Scheme, from_tiles, swap_nibbles, tile_shape, to_tiles
from difloat.interchange.validate_files import validate_gguf, validate_openvino
from difloat.numbers import packing
from difloat.plan.encode import dequantize

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def validate(path: str | os.PathLike[str], reference: Mapping[str, Tensor] | None = None) -> list[Remark]:
    """Check a file or directory, our own or foreign. It is right if no remark is an error.

    >>> import difloat
    >>> from difloat import interchange
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64))
    >>> _ = difloat.quantize(model, "rtn", "w8a16", progress=False, weight_format="e4m3fn")
    >>> file = interchange.export_checkpoint(difloat.save(model, "model"), "exported.safetensors", "fp8")
    >>> [(remark.level, remark.message) for remark in validate(file)]
    [('ok', '1 quantized layers as FP8 per row stores them')]

    Args:
        path: A safetensors file, GGUF, OpenVINO's ``.xml``, a directory with safetensors, or a difloat checkpoint.
        reference: The state dict of the float model, with the names of the file. It makes wrong arrangements certain.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is no whole safetensors file, or GGUF.
    """
    source = Path(path)
    source = _exported(source)
    if source.is_file() and source.suffix == gguf_files.SUFFIX:
        return list(validate_gguf(source, reference))
    if source.is_file() and source.suffix == openvino_ir.SUFFIX:
        return list(validate_openvino(source))
    if source.is_dir() and _is_own(source):
        return [
            Remark("ok" if finding.passed else "error", finding.component, finding.message)
            for finding in verify(source)
        ]
    read = read_foreign.read(source)
    try:
        read.comfy_formats()
    except ValueError as error:
        return [Remark("error", "", str(error))]
    if names := vllm.layers_in(read.tensors):
        return list(_vllm(read, names))
    names = list(dict.fromkeys([*read.quantized(), *_without_scales(read)]))
    remarks = [remark for name in names for remark in _layer(read, name, reference)]
    if not names:
        remarks.append(Remark("error", "", "file must hold quantized layers, but no tensor looks like one"))
    elif not [remark for remark in remarks if remark.level == "error"]:
        schemes = dict.fromkeys(s.name for name in names if (s := read_foreign.scheme_of(read, name)))
        own = (comfy.BRANCH_FORMAT, comfy_tables.FORMAT)
        schemes |= {format: None for format in own if format in read.comfy_formats().values()}
        remarks.append(Remark("ok", "", f"{len(names)} quantized layers as {', '.join(schemes)} stores them"))
    return remarks


def _vllm(read: Foreign, names: list[str]) -> Iterator[Remark]:
    found = [Remark("error", name, message) for name in names for message in vllm.check(name, read.tensors)]
    yield from found
    if not found:
        yield Remark("ok", "", f"{len(names)} quantized layers as vLLM-Omni's {vllm.METHOD} stores them")


def _exported(path: Path) -> Path:
    """The GGUF or OpenVINO file of a directory that holds one and no checkpoint, else the path itself."""
    found = [file for suffix in (gguf_files.SUFFIX, openvino_ir.SUFFIX) for file in path.glob(f"*{suffix}")]
    return found[0] if len(found) == 1 and not _is_own(path) and not any(path.glob("*.safetensors")) else path


def _is_own(directory: Path) -> bool:
    if (directory / MANIFEST).is_file() or (directory / "model_index.json").is_file():
        return True
    config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    entry = config.get("quantization_config")
    return isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD


def _without_scales(read: Foreign) -> list[str]:
    """Layers whose weight has a quantized dtype, whether or not there are scales."""
    found = []
    for name, tensor in read.tensors.items():
        layer, _, key = name.rpartition(".")
        if key in ("weight", PACKED) and tensor.dtype in (*_FP8, torch.uint8):
            found.append(layer)
    return found


def _layer(read: Foreign, name: str, reference: Mapping[str, Tensor] | None) -> Iterator[Remark]:
    tensors = read.layer(name)
    marked = read.comfy_formats().get(name)
    if "weight" not in tensors:
        where = METADATA if METADATA in read.metadata else "its scales"
        yield Remark(
            "error", name, f"weight must be in the file, since {where} name the layer, but is missing"
        )
        return
    if marked == comfy.BRANCH_FORMAT:
        yield from (Remark("error", name, message) for message in comfy.check_branch(name, read.tensors))
        return
    if marked == comfy_tables.FORMAT:
        found = comfy_tables.check(name, read.tensors, read.comfy_marks()[name])
        yield from (Remark("error", name, message) for message in found)
        return
    scheme = read_foreign.scheme_of(read, name)
    if scheme is None:
        what = f"format {marked!r}" if marked is not None else f"dtype {tensors['weight'].dtype}"
        yield Remark("error", name, f"weight must be of a known layout, got {what}")
        return
    if "weight_scale" not in tensors:
        if tensors["weight"].dtype in _FP8 and marked is None:
            message = "weight is FP8 without weight_scale: a plain cast, or the scale was lost"
            yield Remark("suspicion", name, message)
        else:
            yield Remark("error", name, "weight_scale must be beside a quantized weight, but is missing")
        return
    problems = list(_structure(tensors, scheme))
    yield from (Remark("error", name, message) for message in problems)
    if problems:
        return
    weight = None if reference is None else reference.get(f"{name}.weight")
    if weight is not None:
        yield from (Remark("error", name, m) for m in against(tensors, scheme, weight))
    else:
        yield from (Remark("suspicion", name, m) for m in alone(tensors, scheme))


def _structure(tensors: Mapping[str, Tensor], scheme: Scheme) -> Iterator[str]:
    """A sentence for every wrong dtype, shape or value of one layer."""
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if weight.dtype != scheme.weight_dtype:
        yield f"weight must be {scheme.weight_dtype} in {scheme.name}, got {weight.dtype}"
        return
    if weight.dim() != 2:
        yield f"weight must have two axes in {scheme.name}, got {list(weight.shape)}"
        return
    allowed = {scheme.scale_dtype} | ({torch.float8_e8m0fnu} if scheme.scales == "e8m0" else set())
    if scale.dtype not in allowed:
        yield f"weight_scale must be {scheme.scale_dtype} in {scheme.name}, got {scale.dtype}"
        return
    columns = weight.shape[1] * (2 if scheme.element.bits == 4 else 1)
    yield from _scale_shape(scale, scheme, (weight.shape[0], columns))
    if scheme.scales == "e4m3":
        yield from _scalar(tensors, "weight_scale_2", f"{scheme.name} needs it")
    if scheme.input_scale:
        yield from _scalar(tensors, "input_scale", "diffusers' bfl backend refuses the file without")
    yield from _values(scale, scheme)
    if weight.dtype in _FP8 and not bool(weight.float().isfinite().all()):
        yield "weight must be finite, got NaN or infinity"


def _scale_shape(scale: Tensor, scheme: Scheme, shape: tuple[int, int]) -> Iterator[str]:
    expected, got = scheme.scale_shape(shape), tuple(scale.shape)
    if got == expected or (not expected and scale.numel() == 1):
        return
    groups = scheme.groups(shape)
    linear, turned = got == groups, got == groups[::-1]
    hint = ""
    if turned and not scheme.tiled:
        hint = ": it is transposed"
    elif scheme.tiled and linear:
        hint = ": it is in linear order, not in cuBLAS' tiles"
    elif scheme.group_size and scale.numel() == math.prod(tile_shape(*groups)):
        hint = ": it is in cuBLAS' tiles, not in linear order"
    elif scheme.group_size == 0 and scale.numel() == 1:
        hint = ": it is one scale per tensor, as ComfyUI stores them"
    elif len(got) == 2 and got[0] == shape[0] and shape[1] % got[1] == 0:
        hint = f": it is one scale per {shape[1] // got[1]} input channels"
    yield f"weight_scale must have the shape {list(expected)} in {scheme.name}, got {list(got)}{hint}"


def _scalar(tensors: Mapping[str, Tensor], key: str, reason: str) -> Iterator[str]:
    tensor = tensors.get(key)
    if tensor is None:
        yield f"{key} must be beside the weight, but is missing; {reason}"
    elif tensor.dtype != torch.float32 or tensor.numel() != 1:
        yield f"{key} must be one float32 number, got {tensor.dtype} {list(tensor.shape)}"
    elif not (bool(tensor.isfinite().all()) and float(tensor.reshape(())) > 0):
        yield f"{key} must be finite and positive, got {float(tensor.reshape(())):g}"


def _values(scale: Tensor, scheme: Scheme) -> Iterator[str]:
    if scheme.scales == "e8m0":
        if bool((scale.view(torch.uint8) == E8M0_NAN).any()):
            yield "weight_scale must be finite, got NaN (e8m0 byte 255)"
        return
    values = scale.float()
    if not bool(values.isfinite().all()):
        yield f"weight_scale must be finite, got {int((~values.isfinite()).sum())} NaN or infinite scales"
    elif bool((values < 0).any()):
        yield f"weight_scale must not be negative, got {float(values.min()):g}"
    elif not bool((values > 0).any()):
        yield "weight_scale must be positive somewhere, got zeros only"


_SATURATED = (
    0.5  # share of groups that should reach the upper end of the grid; with absmax scales nearly all do
)
_LARGEST_WEIGHT = 1000.0  # no trained layer has weights beyond it
_CLEARLY = 0.8  # another arrangement is likelier if it leaves less than this share of the spread within rows


def alone(tensors: Mapping[str, Tensor], scheme: Scheme) -> Iterator[str]:
    """A sentence for everything that looks wrong in a layer of the right structure, without the float weight."""
    shape = _shape(tensors["weight"], scheme)
    if scheme.group_size:
        codes = packing.unpack(tensors["weight"].view(torch.uint8), scheme.element.bits, shape[1])
        magnitude = torch.tensor(scheme.element.decode_table).abs()[codes.int()]
        groups = magnitude.unflatten(1, (-1, scheme.group_size)).amax(-1)  # [o, groups]
        used = groups[groups > 0]
        reaching = float((used > scheme.element.max / 2).float().mean()) if used.numel() else 1.0
        if reaching < _SATURATED:
            yield (
                f"only {reaching:.0%} of the groups reach the upper half of {scheme.element.name}: groups and scales may not "
                f"belong together (another group size, or another order of channels)"
            )
        yield from _order_of_scales(tensors, scheme, shape)
    if scheme.scales == "e4m3" and float(tensors["weight_scale_2"]) > 1:
        yield (
            f"weight_scale_2 is {float(tensors['weight_scale_2']):g}: it may be the inverse, as compressed-tensors stores it"
        )
        return
    largest = float(dequantize(decode(tensors, scheme, shape)).abs().max())
    if largest > _LARGEST_WEIGHT:
        yield f"weights reach {largest:g}: the scale may be inverted or counted twice"


def _order_of_scales(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Iterator[str]:
    """A sentence if scales seem to be in the wrong order.

    Rows of a trained weight differ in size, so scales of one row are alike. In the wrong order they are not.
    """
    rows, columns = scheme.groups(shape)
    if rows < 32 or columns < 2:
        return
    stored = tensors["weight_scale"]
    linear = _magnitudes(from_tiles(stored, rows, columns) if scheme.tiled else stored, scheme)
    others = {}
    if tile_shape(rows, columns) == (rows, columns):  # elsewhere the shape tells
        other = stored.reshape(rows, columns) if scheme.tiled else from_tiles(stored, rows, columns)
        order = "in linear order" if scheme.tiled else "in cuBLAS' tiles"
        others[order] = _magnitudes(other, scheme)
    if rows == columns:
        others["transposed"] = linear.T
    for what, scales in others.items():
        if _within_rows(scales) < _CLEARLY * _within_rows(linear):
            yield f"weight_scale may be {what}: read so, scales of one row are more alike"


def _magnitudes(stored: Tensor, scheme: Scheme) -> Tensor:
    """The binary logarithms of stored scales, up to a constant of the tensor."""
    if scheme.scales == "e8m0":
        return stored.view(torch.uint8).double()
    return stored.double().clamp_min(2.0**-9).log2()


def _within_rows(scales: Tensor) -> float:
    """The share of the variance that is left inside of rows, once the means of columns are subtracted."""
    scales = scales - scales.mean(0)
    total = float(scales.square().mean())
    return float((scales - scales.mean(1, keepdim=True)).square().mean()) / total if total > 0 else 1.0


def against(tensors: Mapping[str, Tensor], scheme: Scheme, weight: Tensor) -> Iterator[str]:
    """A sentence if the arrangement as stored is not the nearest of all to the float weight."""
    shape = (int(weight.shape[0]), int(weight.shape[1])) if weight.dim() == 2 else (0, 0)
    if scheme.weight_shape(shape) != tuple(tensors["weight"].shape):
        yield f"weight must be of the float layer's shape {list(weight.shape)}, got {list(tensors['weight'].shape)} packed"
        return
    errors = {
        what: _error(variant, scheme, weight)
        for what, variant in {"": dict(tensors), **_variants(tensors, scheme, shape)}.items()
    }
    best = min(errors, key=lambda what: errors[what])
    if best and errors[best] < errors[""] / 2:
        yield (
            f"{best}: read so, the relative error to the float weight is {errors[best]:.3f} instead of {errors['']:.3f}"
        )
    elif errors[""] > WRONG:
        yield f"weight must be near the float one, got a relative error of {errors['']:.3f} in every arrangement"


def _variants(
    tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]
) -> dict[str, dict[str, Tensor]]:
    """The layer as it would be in other arrangements, each under the mistake that it would explain."""
    found: dict[str, dict[str, Tensor]] = {}
    stored, weight = tensors["weight_scale"], tensors["weight"]
    rows, columns = scheme.groups(shape)
    if scheme.group_size and tile_shape(rows, columns) == (rows, columns):
        linear = (
            to_tiles(stored.reshape(rows, columns)) if scheme.tiled else from_tiles(stored, rows, columns)
        )
        order = "linear order" if scheme.tiled else "cuBLAS' tiles"
        found[f"weight_scale is in {order}"] = {**tensors, "weight_scale": linear}
    if scheme.group_size and not scheme.tiled and rows == columns:
        found["weight_scale is transposed"] = {**tensors, "weight_scale": stored.T.contiguous()}
    if "weight_scale_2" in tensors:
        found["weight_scale_2 is inverted"] = {**tensors, "weight_scale_2": 1 / tensors["weight_scale_2"]}
    if scheme.element.bits == 4:
        swapped = swap_nibbles(weight)
        pairs = {f"{what} and the nibbles are swapped": one for what, one in found.items()}
        found["the nibbles are swapped"] = {**tensors, "weight": swapped}
        found |= {what: {**one, "weight": swapped} for what, one in pairs.items()}
    return found


def _error(tensors: Mapping[str, Tensor], scheme: Scheme, weight: Tensor) -> float:
    """The relative error of the decoded weight."""
    wanted = weight.detach().float()
    found = dequantize(decode(tensors, scheme, (int(wanted.shape[0]), int(wanted.shape[1]))))
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _shape(weight: Tensor, scheme: Scheme) -> tuple[int, int]:
    """The rows and columns as stored, before packing."""
    return int(weight.shape[0]), int(weight.shape[1]) * (2 if scheme.element.bits == 4 else 1)
