"""Writing and reading the layers and tensors of a plain module, which no library knows how to build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from difloat.checkpoint import empty_layers
from difloat.checkpoint.layout import (
    CONFIG,
    INPUT_BUNDLE,
    CheckpointError,
    StoredTensor,
    bundle,
    check_stored,
    plan_tensors,
    unbundle,
    write_json,
)
from difloat.checkpoint.plan_config import quantization_config
from difloat.layers import attention, install, packed
from difloat.layers.packed import QuantizedLayer
from difloat.layers.timestep_clock import Clock
from difloat.plan.plan import Plan


def write_module(module: nn.Module, plan: Plan, directory: Path, max_shard_bytes: int | None) -> None:
    """Write `config.json` and `model.safetensors`, or shards of at most `max_shard_bytes` and their index.

    Raises:
        CheckpointError: if the state dict holds something else than tensors.
    """
    state = module.state_dict()
    if strange := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(
            f"state of a module must be tensors, got no tensor in {strange[0]!r}; remove its extra state"
        )
    # What is tied or a view is copied: a file has no notion of shared memory.
    seen: set[int] = set()
    tensors = {}
    for name, tensor in bundle(empty_layers.as_stored(plan, state), plan).items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    config = {"module_class": type(module).__name__, "quantization_config": quantization_config(plan)}
    write_json(directory / CONFIG, config)
    _write_shards(directory, tensors, max_shard_bytes)


def _write_shards(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int | None) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    shard_bytes = 0
    for name, tensor in tensors.items():
        if max_shard_bytes is not None and shards[-1] and shard_bytes + tensor.nbytes > max_shard_bytes:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = tensor
        shard_bytes += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = (
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
        safetensors.torch.save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def load_into(
    module: nn.Module,
    plan: Plan,
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> nn.Module:
    """Give `module` the quantized layers of the plan and all stored tensors, in place, as `checkpoint.load` does.

    Raises:
        CheckpointError: if the checkpoint is not of this module; it is then unchanged.
    """
    _check_fits(module, plan, stored)
    homes = {name: tensor.device for name, tensor in module.state_dict().items()}
    state: dict[str, Tensor] = {}
    for file in sorted({tensor.file for tensor in stored.values()}):
        state |= safetensors.torch.load_file(file)
    state = unbundle(state, plan)
    planned = {
        name: {key: state.pop(f"{name}.{key}") for key in layer.tensors}
        for name, layer in plan.layers.items()
    }
    for name, tensors in planned.items():
        for key in tensors.keys() - {"weight"}:
            check_stored(f"{name}.{key}", plan.layers[name], tensors[key])
    tied = _tied(module, state)

    def place(name: str) -> torch.device:
        return torch.device(device or ("cpu" if homes[name].type == "meta" else homes[name]))

    for name, layer in plan.layers.items():
        new = packed.empty_like(module.get_submodule(name))  # type: ignore[arg-type]
        install.swap(module, name, new)
        if new.input_dtype is not None and dtype is not None:
            new.input_dtype = dtype
        new.load(replace(layer, tensors=planned[name]), place(f"{name}.weight"))
    rest = {
        name: tensor.to(
            place(name), dtype if tensor.is_floating_point() and dtype is not None else tensor.dtype
        )
        for name, tensor in state.items()
    }
    module.load_state_dict(rest, strict=False, assign=True)
    for first, *others in tied:  # assigning gave each its own tensor
        for name in others:
            owner, _, key = name.rpartition(".")
            setattr(module.get_submodule(owner), key, module.get_parameter(first))
    attention.install(module, plan.attention)
    if plan.timesteps:
        install.set_clock(module, Clock(module, plan.timesteps))
    return module


def _tied(module: nn.Module, state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names in `state` of parameters that are one tensor in the module. CheckpointError if their stored values differ."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in state:
            names.setdefault(id(parameter), []).append(name)
    tied = [group for group in names.values() if len(group) > 1]
    for first, *others in tied:
        for name in others:
            # Compared as bytes, since NaN is not equal to itself.
            if state[name].dtype != state[first].dtype or not torch.equal(
                state[name].contiguous().view(torch.uint8), state[first].contiguous().view(torch.uint8)
            ):
                raise CheckpointError(
                    f"tensors {first!r:.200} and {name!r:.200} must be equal, since the module has them tied, but are stored "
                    "with different values; pass the architecture that was saved"
                )
    return tied


def _check_fits(module: nn.Module, plan: Plan, stored: Mapping[str, StoredTensor]) -> None:
    """CheckpointError unless the checkpoint has all of the module's tensors, in their shapes, and no more."""
    own = set(plan_tensors(plan)) | {INPUT_BUNDLE}
    again = empty_layers.other_names(module, plan)
    for name, module_layer in module.named_modules():
        layer = plan.layers.get(name)
        if isinstance(module_layer, QuantizedLayer):
            shape, own = (
                module_layer.float_shape,
                own | {f"{name}.{key}" for key in module_layer.plan().tensors},
            )
        else:
            shape = (
                tuple(module_layer.weight.shape) if isinstance(module_layer, nn.Linear | nn.Conv2d) else ()
            )
        if layer is not None and layer.shape != shape:
            raise CheckpointError(
                f"layer {name!r:.200} must have the planned shape {list(layer.shape)}, got {list(shape)}; "
                "pass the architecture that was saved"
            )
        if layer is None and isinstance(module_layer, QuantizedLayer):
            raise CheckpointError(
                f"layer {name!r} must be float, since it is in the checkpoint; pass a float module"
            )
    if unknown := sorted(plan.layers.keys() - dict(module.named_modules()).keys()):
        raise CheckpointError(
            f"plan must name layers of the module, but {unknown[0]!r:.200} is none; pass the architecture that was saved"
        )
    attention.check(module, plan.attention)
    state = module.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in own | again}
    got = {name: tensor.shape for name, tensor in stored.items() if name not in own}
    for name in sorted(expected.keys() | got.keys()):
        wrong = "is one too many" if name not in expected else "is missing" if name not in got else ""
        if not wrong and expected[name] != got[name]:
            wrong = f"has the shape {list(got[name])}"
        elif not wrong and state[name].is_floating_point() != stored[name].is_floating_point:
            wrong = f"is {stored[name].dtype} instead of {state[name].dtype}"
        if wrong:
            raise CheckpointError(
                f"tensor {name!r:.200} must be stored as the module has it, but {wrong}; "
                "pass the architecture that was saved"
            )
