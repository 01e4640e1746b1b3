"""Quantizing a pipeline from files to files, one block in memory at a time: for models larger than the memory.

What a model consists of is read off its config and headers. Then, block by block, weights are read, planned and written; the
other components are copied as they are. The result equals that of quantizing in memory, but for the number of its files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import final

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from difloat.checkpoint import empty_layers, outline
from difloat.checkpoint.directories import resolved, whole_directory
from difloat.checkpoint.layout import (
    CONFIG,
    CheckpointError,
    bundle,
    bundled_names,
    plan_tensors,
    read_headers,
    read_json,
    write_json,
)
from difloat.checkpoint.manifest import write_manifest
from difloat.checkpoint.plan_config import quantization_config
from difloat.checkpoint.remote_code import INDEX
from difloat.checkpoint.save_load import clean_configs
from difloat.layers import packed
from difloat.methods import malloc_trim
from difloat.plan.plan import LayerPlan, Plan

_STEM = "diffusion_pytorch_model"
_SHARD_BYTES = 512 << 20  # written at once, and held until then
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".onnx_data", ".h5", ".gguf")

PlanBlock = Callable[[nn.Module, frozenset[str]], Plan]
OnLayer = Callable[[str, LayerPlan, Tensor], None]


@final
class Streamed:
    """The denoiser of a pipeline's directory with its values in the files.

    Attributes:
        model: The model as its config builds it, in the dtypes of the files. Its tensors are zeros that take no memory, but for
            the weights of a block while it is worked on.
    """

    def __init__(self, directory: Path) -> None:
        """Read configs and headers.

        Raises:
            FileNotFoundError: something is missing.
            CheckpointError: the files are damaged, or hold other tensors than the model.
        """
        if not (directory / INDEX).is_file():
            raise CheckpointError(
                f"source must be the directory of a pipeline to be streamed, got {str(directory)!r} without {INDEX}; leave out "
                "--offload"
            )
        self.directory = directory
        self.name = outline.denoiser_name(directory)
        self.model = outline.outline(directory).model
        self.stored = read_headers(directory / self.name)
        expected = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        for name in sorted(expected.keys() | self.stored.keys()):
            if name not in self.stored or expected.get(name) != self.stored[name].shape:
                raise CheckpointError(
                    f"files must hold the tensors of {type(self.model).__name__} by their names to be streamed, but differ in "
                    f"{name!r:.200}; load and save the pipeline with diffusers first, or leave out --offload"
                )

        for name in expected:
            self._place(name, self._nothing(name))

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors as they are stored."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.stored[name].file, []).append(name)
        found: dict[str, Tensor] = {}
        for file, own in by_file.items():
            with safe_open(file, framework="pt") as opened:
                found |= {name: opened.get_tensor(name).clone() for name in own}  # not of the mapped file
        return found

    @contextmanager
    def at_hand(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, the weights of these layers are in the model."""
        for name, tensor in self.read([f"{layer}.weight" for layer in names]).items():
            self._place(name, tensor)
        try:
            yield
        finally:
            for layer in names:
                self._place(f"{layer}.weight", self._nothing(f"{layer}.weight"))

    def _nothing(self, name: str) -> Tensor:
        """Zeros of a stored tensor's dtype and shape that all share one element."""
        stored = self.stored[name]
        return torch.zeros((), dtype=safetensors.torch._getdtype(stored.dtype)).expand(stored.shape)

    def _place(self, name: str, tensor: Tensor) -> None:
        path, _, key = name.rpartition(".")
        module = self.model.get_submodule(path)
        parameter = key in module._parameters
        setattr(module, key, nn.Parameter(tensor, requires_grad=False) if parameter else tensor)


def quantize(
    streamed: Streamed,
    out: Path,
    plan_block: PlanBlock,
    kept: Mapping[str, str],
    *,
    overwrite: bool = False,
    on_layer: OnLayer = lambda name, plan, weight: None,
    progress: bool = True,
) -> Plan:
    """Quantize a pipeline's denoiser without data and write the checkpoint.

    Args:
        streamed: What is quantized.
        out: The checkpoint; it appears whole or not at all.
        plan_block: Plans layers of the model, given by name, whose weights are there.
        kept: Layers that stay as they are, with the reason.
        overwrite: Whether a checkpoint that is there is replaced.
        on_layer: Is shown every layer's plan and float weight.
        progress: Show a bar over blocks.

    Returns:
        The plan; its tensors are on the meta device, their values in the files.

    Raises:
        CheckpointError: the directory is in use, or the disk is full; nothing is left behind.
        ValueError: there is no layer to quantize, or a weight is not finite.
    """
    model, target = streamed.model, resolved(out)
    units = {
        unit: own
        for unit, names in packed.blocks(model).items()
        if (own := [name for name in names if name not in kept])
    }
    if not units:
        raise ValueError(
            f"{type(model).__name__} must have a layer to quantize, got none; exclude fewer layers"
        )
    with whole_directory(target, overwrite, 0) as partial:
        _copy_others(streamed, partial)
        shards = _Shards(partial / streamed.name)
        made = []
        for names in tqdm(units.values(), desc="blocks", disable=not progress):
            made.append(_block(streamed, names, plan_block, shards, on_layer))
        layers = {name: layer for own in made for name, layer in own.layers.items()}
        ordered = {name: layers[name] for name in packed.quantizable(model) if name in layers}
        skipped = {layer: reason for own in made for layer, reason in own.skipped.items()} | dict(kept)
        plan = replace(made[0], layers=ordered, skipped=skipped, measured={})
        _write_rest(streamed, plan, shards)
        config = read_json(streamed.directory / streamed.name / CONFIG)
        config |= {"quantization_config": quantization_config(plan)}
        write_json(partial / streamed.name / CONFIG, config)
        clean_configs(partial, {partial / streamed.name})
        write_manifest(partial)
    return replace(plan, layers={name: empty_layers.without_values(layer) for name, layer in ordered.items()})


def _block(
    streamed: Streamed, names: Sequence[str], plan_block: PlanBlock, shards: _Shards, on_layer: OnLayer
) -> Plan:
    """The plan of a block's layers, whose values are on their way to the files."""
    with streamed.at_hand(names):
        plan = plan_block(streamed.model, frozenset(names))
        for name, layer in plan.layers.items():
            on_layer(name, layer, packed.weight_of(streamed.model, name))
    vectors = bundled_names(plan)
    shards.add({name: tensor for name, tensor in plan_tensors(plan).items() if name not in vectors})
    malloc_trim.release()
    return replace(plan, layers={name: _with_vectors_only(layer) for name, layer in plan.layers.items()})


def _with_vectors_only(layer: LayerPlan) -> LayerPlan:
    """The plan of a layer without the values that are in a file by now. Stored input ranges are written at the end."""
    tensors = {
        key: tensor if key.startswith("input_") else tensor.to("meta")
        for key, tensor in layer.tensors.items()
    }
    return replace(layer, tensors=tensors)


def _write_rest(streamed: Streamed, plan: Plan, shards: _Shards) -> None:
    """All that is not quantized, and the bundle of the input vectors."""
    planned = {f"{name}.weight" for name in plan.layers}
    rest = [name for name in streamed.stored if name not in planned]
    while rest:
        size, taken = 0, []
        while rest and size < _SHARD_BYTES:
            taken.append(rest.pop(0))
            size += streamed.stored[taken[-1]].nbytes
        shards.add(streamed.read(taken))
    names = bundled_names(plan)
    shards.add(bundle({name: tensor for name, tensor in plan_tensors(plan).items() if name in names}, plan))
    shards.close()


def _copy_others(streamed: Streamed, partial: Path) -> None:
    """Everything of the pipeline but the denoiser's weights. Of weights in several layouts it has the safetensors ones."""
    index = read_json(streamed.directory / INDEX)
    shutil.copyfile(streamed.directory / INDEX, partial / INDEX)
    for name, entry in index.items():
        folder = streamed.directory / name
        if not isinstance(entry, list) or not folder.is_dir():
            continue
        (partial / name).mkdir()
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        safe = any(file.suffix == ".safetensors" for file in files)
        for file in files:
            unsafe = safe and file.suffix in _WEIGHTS[1:]
            own = name == streamed.name and (file.suffix in _WEIGHTS or file.name.endswith(".index.json"))
            if not (unsafe or own):
                to = partial / name / file.relative_to(folder)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to)


@final
class _Shards:
    """Safetensors files of a model that are written one after the other, since how many there will be is not known."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, Tensor] = {}
        self._parts: list[list[str]] = []
        self._bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        self._held |= {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        if sum(tensor.nbytes for tensor in self._held.values()) >= _SHARD_BYTES:
            self._write()

    def _write(self) -> None:
        self._parts.append(list(self._held))
        held = {
            name: tensor.view(torch.uint8) if tensor.dtype == torch.int8 else tensor
            for name, tensor in self._held.items()
        }
        safetensors.torch.save_file(
            held, self._folder / f"part-{len(self._parts)}", metadata={"format": "pt"}
        )
        self._held = {}

    def close(self) -> None:
        """Write what is left, give the files the names that diffusers reads, and an index if there are several."""
        if self._held:
            self._write()
        count = len(self._parts)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._parts, start=1):
            file = (
                f"{_STEM}.safetensors" if count == 1 else f"{_STEM}-{number:05d}-of-{count:05d}.safetensors"
            )
            (self._folder / f"part-{number}").rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
            write_json(self._folder / f"{_STEM}.safetensors.index.json", index)
