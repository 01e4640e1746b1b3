"""Saving and loading models whose layers are quantized: diffusers pipelines, diffusers models and plain modules.

A save appears whole or not at all, and the same model gives the same bytes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from difloat import torch_modes
from difloat.checkpoint import integrity, rebuild, source_names
from difloat.checkpoint.directories import resolved, whole_directory
from difloat.checkpoint.layout import (
    CONFIG,
    QUANT_METHOD,
    CheckpointError,
    StoredTensor,
    check_headers,
    is_file_name,
    read_headers,
    read_json,
    write_json,
)
from difloat.checkpoint.manifest import MANIFEST, read_manifest, write_manifest
from difloat.checkpoint.plain_modules import load_into, write_module
from difloat.checkpoint.plan_config import parse_config, parsed_once, quantization_config
from difloat.checkpoint.remote_code import INDEX as PIPELINE_INDEX
from difloat.checkpoint.remote_code import write_loaders
from difloat.checkpoint.stored_dtypes import common_dtype
from difloat.layers import attention, offloading
from difloat.layers.install import clock_of
from difloat.layers.packed import QuantizedLayer
from difloat.plan.plan import LayerPlan, Plan

# Where a model was loaded from, as diffusers and transformers note it in their configs.
_ORIGIN = ("_name_or_path", "name_or_path", "is_local", "local_files_only")


def mark_quantized(model: nn.Module, plan: Plan) -> None:
    """Note on a model, whose layers are quantized already, what made them, so that it can be saved.

    A model of diffusers or transformers can be saved by its own `save_pretrained` then.
    """
    config = quantization_config(plan)
    own = _library_of(model)
    if own is not None:
        own.mark(model, own.quantizer(config))
    else:
        origin = {key: config[key] for key in ("recipe", "bits", "options", "skipped")}
        model.difloat_plan = origin  # type: ignore[assignment]


def unmark_quantized(model: nn.Module) -> None:
    """Take back what `mark_quantized` did, for a model whose layers are float again. Others stay as they are."""
    if "difloat_plan" not in vars(model):
        return
    own = _library_of(model)
    if own is not None:
        own.unmark(model)
    else:
        del model.difloat_plan


def _library_of(model: Any) -> ModuleType | None:
    """Our module for the library that a model is of, diffusers or transformers. None for a plain module."""
    if _is_of(model, "diffusers", "ModelMixin"):
        return import_module("difloat.checkpoint.diffusers_quantizer")
    if _is_of(model, "transformers", "PreTrainedModel"):
        return import_module("difloat.checkpoint.transformers_quantizer")
    return None


def plan_of(model: nn.Module) -> Plan:
    """The plan that `model` carries out, read off its layers, with which it shares tensors.

    Raises:
        ValueError: if it has no quantized layers, is not marked, has adapters, or its vectors were cast to another dtype.
    """
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    found = {name: module.plan() for name, module in quantized.items() if module.parts}
    origin = vars(model).get("difloat_plan")
    if not found or origin is None:
        raise ValueError(
            f"model must be quantized by difloat.apply or difloat.quantize, got a float {type(model).__name__}; "
            "quantize it first"
        )
    if wrapped := [name for name in found if name.endswith(".base_layer")]:
        raise ValueError(
            f"model must have no adapters to be read as a plan, but {wrapped[0].removesuffix('.base_layer')!r} has one; "
            "call unload_lora_weights, before it fuse_lora if they shall stay"
        )
    for name, layer in found.items():
        for key, tensor in layer.tensors.items():
            if tensor.is_meta:
                raise ValueError(
                    f"{name}.{key} must be in memory, but is offloaded; move the model to one device first"
                )
            if tensor.dtype != LayerPlan.dtype_of(key):
                raise ValueError(
                    f"{name}.{key} must keep its dtype, but was cast to {tensor.dtype}; "
                    "load the model again and give the dtype while loading"
                )
    entries = {name: entry for name, module in model.named_modules() if (entry := attention.plan_of(module))}
    clock = clock_of(model)
    return Plan(
        origin["recipe"],
        origin["bits"],
        found,
        origin["skipped"],
        origin["options"],
        attention=entries,
        timesteps=() if clock is None else clock.grid,
    )


def save(
    pipeline_or_module: Any,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_bytes: int | None = None,
    remote_code: bool = False,
) -> Path:
    """Write a pipeline, a diffusers model or a plain module with its quantized layers, and return the directory.

    >>> import difloat
    >>> model = nn.Sequential(nn.Linear(16, 32))
    >>> _ = difloat.quantize(model, "rtn", "w4a8", progress=False)
    >>> sorted(path.name for path in difloat.save(model, "model").iterdir())
    ['config.json', 'difloat.json', 'model.safetensors']

    Args:
        pipeline_or_module: A model that `difloat.apply` has quantized. All components of a pipeline are written.
        directory: The directory to write, which is made if it does not exist, with its parents.
        overwrite: Whether to replace a directory that `save` has written, with its report and card. A directory with a file
            of the user's is refused.
        max_shard_bytes: The most bytes of a file that tensors are split into. None is for one file (diffusers: 10 GB).
        remote_code: Whether to add a loader of a few lines, so that `AutoModel.from_pretrained(..., trust_remote_code=True)`
            loads a component where difloat is installed but not imported.

    Raises:
        ValueError: if nothing is quantized, or remote code is asked for a plain module.
        CheckpointError: if a model is not what its config builds (fused projections, adapters, modules added later), the
            directory is in use for something else, another run is at work on it, or the disk is full. Nothing is left then.
    """
    with offloading.all_lifted(pipeline_or_module):
        return _save(pipeline_or_module, resolved(directory), overwrite, max_shard_bytes, remote_code)


def _save(
    pipeline_or_module: Any, target: Path, overwrite: bool, max_shard_bytes: int | None, remote_code: bool
) -> Path:
    quantized = _quantized(pipeline_or_module)
    if remote_code and not hasattr(pipeline_or_module, "save_pretrained"):
        raise ValueError("remote_code must be False for a plain module, got True; no library builds it")
    needed_bytes = sum(
        tensor.nbytes for model in quantized.values() for tensor in [*model.parameters(), *model.buffers()]
    )
    with whole_directory(target, overwrite, needed_bytes) as partial:
        if hasattr(pipeline_or_module, "save_pretrained"):
            options = {} if max_shard_bytes is None else {"max_shard_size": max_shard_bytes}
            pipeline_or_module.save_pretrained(str(partial), **options)
            clean_configs(partial, {partial / name for name in quantized})
            for name, model in quantized.items():
                source_names.write(model, partial / name)
            if remote_code:
                write_loaders(partial, quantized)
        else:
            write_module(pipeline_or_module, plan_of(pipeline_or_module), partial, max_shard_bytes)
        write_manifest(partial)
    return target


def _quantized(pipeline_or_module: Any) -> dict[str, nn.Module]:
    """The models that hold quantized layers by their sub-directory, "" for a model on its own, with their marks renewed.

    Raises:
        CheckpointError: if a library could not build one of them again from its config.
    """
    models = {"": pipeline_or_module}
    if _is_of(pipeline_or_module, "diffusers", "DiffusionPipeline"):
        models = {
            name: model
            for name, model in pipeline_or_module.components.items()
            if isinstance(model, nn.Module)
            and any(isinstance(layer, QuantizedLayer) for layer in model.modules())
        }
        for name, model in models.items():
            if _library_of(model) is None:
                raise ValueError(
                    f"quantized components must be models of diffusers or transformers, got {name!r} of "
                    f"{type(model).__name__}; restore it first"
                )
    if not models:
        raise ValueError(
            "pipeline must have a quantized component, got none; quantize it first with difloat.quantize"
        )
    for model in models.values():
        mark_quantized(model, plan_of(model))
        if (library := _library_of(model)) is not None:
            rebuild.check(model, library.built_again(model))
    return models


def _is_of(value: Any, library: str, class_name: str) -> bool:
    """Whether `value` is of a class of a library, which is not imported to find out."""
    module = sys.modules.get(library)
    return module is not None and isinstance(value, getattr(module, class_name))


def clean_configs(directory: Path, quantized: set[Path]) -> None:
    """Make the files independent of where their model came from, and those with a plan compact."""
    for path in [*directory.rglob(f"*{CONFIG}"), *directory.glob(PIPELINE_INDEX)]:
        config = {key: value for key, value in read_json(path).items() if key not in _ORIGIN}
        if path.name == CONFIG and path.parent in quantized:
            write_json(path, config)
        else:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def components(directory: str | os.PathLike[str]) -> dict[str, Path]:
    """Model directories of a checkpoint that hold quantized layers: by component, or "" for a model on its own.

    Raises:
        FileNotFoundError: if the directory or its config is missing.
        CheckpointError: if nothing in it is quantized.
    """
    root = Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"checkpoint must be a directory, but {root} does not exist; check the path")
    if not (root / PIPELINE_INDEX).is_file():
        read_json(root / CONFIG)
        return {"": root}
    names = [name for name, entry in read_json(root / PIPELINE_INDEX).items() if isinstance(entry, list)]
    paths = {name: root / name / CONFIG for name in names if is_file_name(name)}
    configs = {
        name: read_json(path).get("quantization_config") for name, path in paths.items() if path.is_file()
    }
    quantized = {name: config for name, config in configs.items() if config is not None}
    # A text encoder may be of another library; if nothing is of difloat, reading its plan will say so.
    own = [
        name for name, c in quantized.items() if isinstance(c, dict) and c.get("quant_method") == QUANT_METHOD
    ]
    found = {name: root / name for name in own or quantized}
    if not found:
        raise CheckpointError(
            f"{root} must hold a quantized component, got a pipeline without; load it with diffusers"
        )
    return found


def read_plan(directory: Path) -> tuple[Plan, dict[str, StoredTensor]]:
    """Plan (its tensors on the meta device) and stored tensors of a model directory, checked against each other."""
    plan = parse_config(read_json(directory / CONFIG).get("quantization_config"))
    stored = read_headers(directory)
    check_headers(plan, stored)
    return plan, stored


@torch_modes.plain()
def load(
    directory: str | os.PathLike[str],
    into: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    verify: bool | None = None,
) -> Any:
    """Read a checkpoint: a diffusers pipeline, a diffusers model, or the layers and tensors of a plain module.

    >>> import difloat
    >>> model = nn.Sequential(nn.Linear(16, 32))
    >>> _ = difloat.quantize(model, "rtn", "w4a8", progress=False)
    >>> again = load(difloat.save(model, "model"), into=nn.Sequential(nn.Linear(16, 32)))
    >>> torch.equal(again[0].weight, model[0].weight)
    True

    Args:
        directory: A directory that `save` or `save_pretrained` has written.
        into: A plain module of the same architecture, float or quantized, also on the meta device. It is changed in place.
        dtype: The dtype of all that is not quantized, or None for the stored one. Codes and float32 vectors never change.
        device: Where to put the model. None is the CPU, or the device that `into` is on.
        verify: Whether to compare every file with its hash in the manifest right before it is read, which reads all files
            once more. None does what the environment variable ``DIFLOAT_VERIFY`` says (1 or 0), as `from_pretrained` does.

    Raises:
        FileNotFoundError: if a file is missing, or with `verify` the manifest.
        CheckpointError: if a file is damaged, of another version, or not of this model. `into` is unchanged then.
    """
    root, proven = Path(directory), integrity.wanted(verify)
    found = components(root)
    if proven:
        integrity.check_directory(root)
    elif (root / MANIFEST).is_file():
        read_manifest(root)
    with integrity.settled(), parsed_once():
        return _load(root, found, into, dtype, device)


def _load(
    root: Path,
    found: Mapping[str, Path],
    into: nn.Module | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Any:
    loaded = {name: read_plan(path) for name, path in found.items()}
    if (root / PIPELINE_INDEX).is_file():
        if into is not None:
            raise CheckpointError(
                "into must be None for a pipeline, got a module; pass the directory of one component"
            )
        model = _load_pipeline(root, loaded, dtype)
        for name, path in found.items():
            _keep_names(getattr(model, name), path)
    elif into is not None:
        plan, stored = loaded[""]
        model = load_into(into, plan, stored, dtype, device)
        mark_quantized(model, plan)
        return model
    else:
        model = _load_model(root, *loaded[""], dtype)
        _keep_names(model, root)
    return model if device is None else model.to(device)


def _keep_names(model: nn.Module, directory: Path) -> None:
    """Note on a loaded model under which names it came, so that it is saved with them again."""
    if (names := source_names.read(directory)) is not None:
        source_names.keep(model, names)


def _load_model(root: Path, plan: Plan, stored: Mapping[str, StoredTensor], dtype: torch.dtype | None) -> Any:
    config = read_json(root / CONFIG)
    names = config.get("architectures") or [config.get("_class_name")]
    library, base = (
        ("transformers", "PreTrainedModel") if "architectures" in config else ("diffusers", "ModelMixin")
    )
    if names[0] is None:
        kind = str(config.get("module_class", "module"))
        raise CheckpointError(
            f"into must be a {kind:.80} of the saved architecture, got None; pass load(directory, into=...)"
        )
    module = import_module(library)
    model_class = getattr(module, names[0], None) if isinstance(names[0], str) else None
    if not isinstance(model_class, type) or not issubclass(model_class, getattr(module, base)):
        raise CheckpointError(
            f"class of the model must be one of {library} {module.__version__}, got {names[0]!r:.80}; update {library}"
        )
    loader: Any = model_class
    argument = "dtype" if library == "transformers" else dtype_argument()
    with integrity.said_in_one_sentence(root, library):
        return loader.from_pretrained(str(root), **{argument: dtype or common_dtype(plan, stored)})


def _load_pipeline(
    root: Path, loaded: Mapping[str, tuple[Plan, dict[str, StoredTensor]]], dtype: torch.dtype | None
) -> Any:
    import diffusers

    dtypes: Any = dtype
    if dtype is None:
        dtypes = {"default": torch.float32} | {name: common_dtype(*model) for name, model in loaded.items()}
        for path in root.glob(f"*/{CONFIG}"):
            if path.parent.name not in loaded:
                dtypes[path.parent.name] = common_dtype(None, read_headers(path.parent))
    with integrity.said_in_one_sentence(root, "diffusers"):
        return diffusers.DiffusionPipeline.from_pretrained(str(root), **{dtype_argument(): dtypes})


def dtype_argument() -> str:
    """What diffusers calls it: older ones ignore the new name, newer ones warn of the old one."""
    from diffusers.pipelines import pipeline_utils

    return "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
