"""Import of a file of another program into a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difloat.checkpoint.layout import CONFIG, read_json
from difloat.checkpoint.save_load import mark_quantized
from difloat.interchange import comfy_tables, read_foreign
from difloat.interchange.export import INPUT_SCALES
from difloat.interchange.layers import decode
from difloat.interchange.read_foreign import SUFFIXES, Foreign
from difloat.interchange.schemes import Scheme, check_dialect
from difloat.layers import install, packed
from difloat.plan.plan import LayerPlan, Plan

RECIPE = "import"  # the recipe in plans of foreign files


def import_into(module: nn.Module, path: str | os.PathLike[str], source: str) -> Plan:
    """Give a float model the quantized layers and all other tensors of a foreign file, in place, and return its plan.

    >>> import difloat
    >>> from difloat import interchange
    >>> model, options = nn.Sequential(nn.Linear(32, 64)), {"weight_granularity": "group", "group_size": 32}
    >>> _ = difloat.quantize(model, "rtn", "w4a16", scale_format="e8m0", keep_8bit=(), progress=False, **options)
    >>> file = interchange.export_checkpoint(difloat.save(model, "model"), "exported.safetensors", "mxfp4")
    >>> other = nn.Sequential(nn.Linear(32, 64))
    >>> list(import_into(other, file, "mxfp4").layers), torch.equal(other[0].weight, model[0].weight)
    (['0'], True)

    Weights keep their codes and scales. Layouts do not say how inputs are quantized, so inputs stay as they are. An
    `input_scale` is kept in the plan's options, so that it can be exported again.

    Args:
        module: A model of the same architecture, with the names that the file has. It may hold any weights.
        path: The file, or a directory with it or its shards.
        source: The kind of file, which is one of `schemes.DIALECTS`.

    Raises:
        ValueError: if the file is not of that kind or not of this model. The model is unchanged then.
    """
    schemes = check_dialect(source)
    read = read_foreign.read(path)
    names = read.quantized()
    if not names:
        raise ValueError(
            f"{source} file must hold quantized layers, got none in {str(path)!r}; is it another file?"
        )
    float_layers = packed.quantizable(module)
    planned: dict[str, LayerPlan] = {}
    for name in names:
        if name not in float_layers:
            raise ValueError(
                f"file must be of a {type(module).__name__} with its names, but has the layer {name!r}; "
                "import it into its own model"
            )
        planned[name] = _layer(read, name, float_layers[name], schemes, source)
    taken = {
        f"{name}.{key}" for name in names for key in (*SUFFIXES, read_foreign.PACKED, *comfy_tables.KEYS)
    }
    _check_rest(module, read, taken, set(planned))
    plan = Plan(RECIPE, _bits(planned), planned, options=_options(read, names, source))
    install.apply(module, plan)
    rest = {name: tensor for name, tensor in read.tensors.items() if name not in taken}
    module.load_state_dict(rest, strict=False)
    mark_quantized(module, plan)
    return plan


def _layer(
    read: Foreign, name: str, layer: nn.Linear | nn.Conv2d, schemes: tuple[Scheme, ...], source: str
) -> LayerPlan:
    if source == "comfy" and read.comfy_formats().get(name) == comfy_tables.FORMAT:
        decoded = comfy_tables.decode(name, read.tensors, read.comfy_marks()[name])
        if decoded.shape != tuple(layer.weight.shape):
            raise ValueError(
                f"{name!r} must have the shape {list(layer.weight.shape)}, got {list(decoded.shape)}; "
                "import it into its own model"
            )
        return decoded
    scheme, tensors = read_foreign.scheme_of(read, name), read.layer(name)
    if scheme not in schemes or scheme is None:
        found = "of an unknown layout" if scheme is None else scheme.name
        raise ValueError(
            f"{source} file must hold layers of {' or '.join(s.name for s in schemes)}, but {name!r} is {found}; "
            "see difloat validate"
        )
    shape = tuple(layer.weight.shape)
    if len(shape) != 2:
        raise ValueError(f"quantized layers of a {source} file must be linear, but {name!r} is a convolution")
    wanted = {
        "weight": (scheme.weight_dtype, scheme.weight_shape(shape)),
        "weight_scale": (scheme.scale_dtype, scheme.scale_shape(shape)),
    }
    if scheme.scales == "e4m3":
        wanted["weight_scale_2"] = (torch.float32, ())
    for key, (dtype, size) in wanted.items():
        tensor = tensors.get(key)
        if tensor is not None and tensor.dtype == torch.float8_e8m0fnu:
            tensors[key] = tensor = tensor.view(torch.uint8)
        one = tensor is not None and not size and tensor.numel() == 1
        if tensor is None or tensor.dtype != dtype or not (one or tuple(tensor.shape) == size):
            got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(
                f"{name}.{key} must be {dtype} {list(size)} in {scheme.name}, got {got}; see difloat validate"
            )
    if "pre_quant_scale" in tensors:
        raise ValueError(
            f"{name!r} must have no pre_quant_scale, which plans cannot hold; get a file without"
        )
    try:
        return decode(tensors, scheme, shape)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def _check_rest(module: nn.Module, read: Foreign, taken: set[str], planned: set[str]) -> None:
    """Raise a ValueError unless the file has exactly the other tensors of the model, in their shapes."""
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
        if not (name.endswith(".weight") and name.removesuffix(".weight") in planned)
    }
    got = {name: tuple(tensor.shape) for name, tensor in read.tensors.items() if name not in taken}
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            wrong = (
                "is missing" if name not in got else "is one too many" if name not in expected else "differs"
            )
            raise ValueError(
                f"file must hold the tensors of the {type(module).__name__}, but {name!r} {wrong}; "
                "import it into its own model"
            )


def _bits(planned: dict[str, LayerPlan]) -> str:
    widths = [layer.parts[0].weight.format.bits for layer in planned.values()]
    return f"w{max(set(widths), key=widths.count)}a16"


def _options(read: Foreign, names: list[str], source: str) -> dict[str, Any]:
    scales = {name: read.layer(name)["input_scale"] for name in names if "input_scale" in read.layer(name)}
    options: dict[str, Any] = {"from": source}
    if scales:
        options[INPUT_SCALES] = {name: float(scale.reshape(-1)[0]) for name, scale in scales.items()}
    return options


def model_of(directory: str | os.PathLike[str]) -> Any:
    """A diffusers model with fresh weights, built from the `config.json` of a directory.

    >>> from difloat.reference_models import ASSETS
    >>> type(model_of(ASSETS / "emoji-pixart" / "transformer")).__name__
    'PixArtTransformer2DModel'

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file names no model of the installed diffusers.
    """
    import diffusers

    config = read_json(Path(directory) / CONFIG)
    name = config.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, diffusers.ModelMixin):
        raise ValueError(
            f"_class_name must be a model of diffusers {diffusers.__version__}, got {name!r:.80}; update diffusers"
        )
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with torch.random.fork_rng(devices=[]):  # fresh weights must not move the caller's random numbers
        return found.from_config(plain).eval()


def model_with(directory: str | os.PathLike[str], state: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """A diffusers model as `model_of` builds it, with weights under the names of diffusers.

    Args:
        directory: Where the `config.json` is.
        state: All tensors of the model, of any dtype.
        dtype: That of the model's floating tensors.

    Raises:
        ValueError: if tensors are missing, too many, or of other shapes.
    """
    model = model_of(directory)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            got = "none" if name not in given else f"one of {list(given[name])}"
            wanted = f"a tensor {list(expected[name])}" if name in expected else "no tensor"
            raise ValueError(
                f"file must hold a {type(model).__name__} under the names of diffusers, which knows no others of this class, "
                f"so {wanted} under {name!r}, got {got}; convert it"
            )
    cast = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()
    }
    model.load_state_dict(cast, assign=True)
    return model
