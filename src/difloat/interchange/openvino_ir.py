"""OpenVINO: a denoiser as its intermediate representation, with our codes as compressed constants.

OpenVINO converts the float model, traced with a call that the pipeline itself makes. Then the constant of every quantized
layer gives way to ``codes -> Convert -> Multiply scales -> Add zero points -> Reshape``, exactly the numbers of the layer.
Codes are u4, i4, u8, i8, f4e2m1 or f8e4m3 where the grid is one of these, else they look their values up (Gather).
The file says that inputs stay float (`DYNAMIC_QUANTIZATION_GROUP_SIZE` 0), which the CPU would else round to 8 bits.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from difloat import api
from difloat.calibration.sampler_runs import Sampling, Stopped
from difloat.interchange.layers import obstacle_of_inputs, obstacle_of_rotation, obstacle_of_structure
from difloat.numbers.formats import Format
from difloat.numbers.integer_grids import grid_of
from difloat.plan.plan import LayerPlan
from difloat.plan.request import CalibrationSettings

SUFFIX = ".xml"
_MODEL = "model"  # the traced module's name of the denoiser, which the names of constants begin with
_STEPS = 2  # of the sampler that the traced call is taken from


def obstacle(layer: LayerPlan) -> str:
    """Why the representation cannot hold a layer, as the end of "layer L ...", with what to do; "" if it can."""
    return obstacle_of_structure(layer) or obstacle_of_rotation(layer) or obstacle_of_inputs(layer)


def example_call(
    pipeline: Any, name: str, prompts: list[str] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a pipeline calls its denoiser `name` with first, at its default size.

    Raises:
        ValueError: if the pipeline needs more than prompts to be called.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise Stopped

    settings = CalibrationSettings(samples=1, steps=_STEPS, prompts_per_batch=1)
    sampling = Sampling(pipeline, prompts, settings, {}, name)
    handle = sampling.denoiser.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        sampling.run(0)
    except Stopped:
        pass
    finally:
        handle.remove()
    return seen[0]


def write(
    module: nn.Module,
    layers: Mapping[str, LayerPlan],
    call: tuple[tuple[Any, ...], dict[str, Any]],
    file: Path,
) -> None:
    """Write a denoiser as `file` (``.xml``) and the constants beside it (``.bin``).

    Args:
        module: The quantized denoiser; float on return.
        layers: The plans of its quantized layers by name.
        call: Arguments of `example_call`; tensors among them become inputs of the same names and free sizes.
        file: The path of the file, in a folder that exists.

    Raises:
        ValueError: if a layer cannot be held exactly, or tracing has lost it.
        ImportError: if the package openvino is missing.
    """
    ov = package()
    for name, layer in layers.items():
        if reason := obstacle(layer):
            raise ValueError(f"openvino files must hold every layer without loss, but {name!r} {reason}")
    api.restore(module, torch.float32)
    model = _converted(ov, module.float().eval(), call)
    constants = {
        node.get_friendly_name(): node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Constant"
    }
    for name, layer in layers.items():
        node = constants.get(f"self.{_MODEL}.{name}.weight")
        if node is None or tuple(node.get_output_shape(0)) != tuple(layer.shape):
            raise ValueError(
                f"openvino files must hold every layer that is quantized, but tracing has lost {name!r}; keep it as it is "
                "with --exclude"
            )
        compressed = _compressed(ov, layer)
        compressed.set_friendly_name(f"{name}.weight")
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(compressed.output(0))
    model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    ov.save_model(model, file, compress_to_fp16=False)


def _converted(ov: ModuleType, module: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    leaves, structure = _pytree.tree_flatten_with_path(by_name(module, call))
    names = [_name(path) for path, leaf in leaves if isinstance(leaf, Tensor)]
    tensors = [_float32(leaf) for _, leaf in leaves if isinstance(leaf, Tensor)]

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, _MODEL, module)

        def forward(self, *given: Tensor) -> Any:
            rest = iter(given)
            filled = [next(rest) if isinstance(leaf, Tensor) else leaf for _, leaf in leaves]
            return module(**{**_pytree.tree_unflatten(filled, structure), "return_dict": False})[0]

    with torch.no_grad(), _quietly():
        # What `openvino.convert_model` does, without its report of usage to Intel.
        decoder = TorchScriptPythonDecoder(Traced(), example_input=tuple(tensors))
        frontend = ov.frontend.FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(decoder))
    if len(model.inputs) != len(names):
        raise ValueError(
            f"all {len(names)} tensors of the denoiser's call must matter to be inputs, but only {len(model.inputs)} do; "
            "export to another format"
        )
    for parameter, name, tensor in zip(model.get_parameters(), names, tensors, strict=True):
        parameter.set_element_type(ov.Type(tensor.numpy().dtype))
        parameter.set_partial_shape(ov.PartialShape([-1] * tensor.dim()))
        parameter.set_friendly_name(name)
    model.validate_nodes_and_infer_types()
    for port, name in zip(model.inputs, names, strict=True):
        port.get_tensor().set_names({name})
    return model


def by_name(module: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    """The arguments of a call of a denoiser by the names of its parameters."""
    args, kwargs = call
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def _compressed(ov: ModuleType, layer: LayerPlan) -> Any:
    """The weight of a layer as operations over its codes and scales, which compute `plan.encode.dequantize`."""
    from openvino import opset13 as op

    part, shape = layer.parts[0], list(layer.shape)
    spec, format = part.weight, part.weight.format
    codes, kind, factor = _stored(layer.codes()[0], format)
    grouped = spec.group_size is not None and spec.group_size < shape[1]
    size = (
        math.gcd(spec.group_size or 0, shape[1]) if grouped else shape[1]
    )  # the last group of a row may be short
    laid = [shape[0], shape[1] // size, size, *shape[2:]] if grouped else shape
    ones = [1] * len(shape[2:])
    if spec.granularity == "tensor":
        per = [1] * len(laid)
    else:
        per = [shape[0], shape[1] // size, 1, *ones] if grouped else [shape[0], 1, *ones]
    if kind:
        given = ov.Tensor(_packed(codes, kind), ov.Shape(laid), getattr(ov.Type, kind))
        constant = ov.op.Constant(given, shared_memory=False)  # OpenVINO does not keep the array alive
        values = op.convert(constant, np.float32)
    else:  # no type of OpenVINO has these values: codes number the entries of a table
        table = op.constant(torch.tensor(format.decode_table).nan_to_num(0.0).numpy())
        numbers = op.constant(codes.reshape(laid).to(torch.uint8).numpy())
        values = op.gather(table, op.convert(numbers, np.int32), op.constant(0))

    def numbers_of(key: str) -> Tensor:
        numbers = layer.tensors[key]
        if grouped:
            starts = torch.arange(0, shape[1], size) // (spec.group_size or 1)
            numbers = numbers.reshape(shape[0], -1)[:, starts]
        return numbers.reshape(per).contiguous()

    result = op.multiply(values, op.constant((numbers_of("weight_scale") / factor).numpy()))
    if spec.zero_point:
        result = op.add(result, op.constant(numbers_of("weight_zero_point").numpy()))
    return op.reshape(result, op.constant(shape), False) if grouped else result


def _stored(codes: Tensor, format: Format) -> tuple[Tensor, str, int]:
    """What is stored of codes, OpenVINO's type of it ("" for entries of a table), and what values are multiplied by in it."""
    if format.name in ("e2m1", "e4m3fn"):
        return codes, {"e2m1": "f4e2m1", "e4m3fn": "f8e4m3"}[format.name], 1
    grid = grid_of(format)
    if format.levels or grid is None:
        return codes, "", 1
    values = torch.tensor(format.decode_table)[codes.int()] * grid.multiplier
    least, largest = format.min * grid.multiplier, format.max * grid.multiplier
    for kind, low, high in (("u4", 0, 15), ("i4", -8, 7), ("u8", 0, 255), ("i8", -128, 127)):
        if low <= least and largest <= high:
            return values.to(torch.int16).to(torch.uint8), kind, grid.multiplier
    raise AssertionError(f"{format.name} fits 8 bits")


def _packed(codes: Tensor, kind: str) -> Any:
    """Bytes of codes, of two 4-bit ones the first in the low half."""
    flat = codes.reshape(-1)
    if "4" not in kind.replace("f8e4m3", ""):
        return flat.numpy()
    flat = nn.functional.pad(flat & 15, (0, len(flat) % 2))
    return (flat[::2] | (flat[1::2] << 4)).numpy()


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _name(path: Sequence[Any]) -> str:
    """Name an input by its place among the arguments, like "encoder_hidden_states" or "added_cond_kwargs.time_ids"."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the warnings of tracing: OpenVINO keeps sizes free, which the tests prove by other sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def package() -> ModuleType:
    """The package openvino. Without it an ImportError says what to do."""
    try:
        import openvino
    except ImportError as error:
        raise ImportError(
            "the package openvino must be installed for OpenVINO's files, but is not; pip install openvino"
        ) from error
    found: ModuleType = openvino
    return found
