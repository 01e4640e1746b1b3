"""Where a model comes from: an embedded model, a directory, a name on a hub, a checkpoint in one file, a component alone.

```python
pipeline = load(Source("stable-diffusion-v1-5/stable-diffusion-v1-5", variant="fp16"))
pipeline = load(Source("fine-tune.safetensors", base="stable-diffusion-v1-5/stable-diffusion-v1-5"))
```

Files say in which dtype a model is kept, the machine in which it computes: CPUs take up to a hundred times as long for float16.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from difloat import reference_models
from difloat.checkpoint import outline
from difloat.checkpoint import source_names as kept_names
from difloat.checkpoint.layout import CONFIG, read_json
from difloat.checkpoint.remote_code import INDEX
from difloat.checkpoint.save_load import dtype_argument
from difloat.checkpoint.stored_dtypes import dtypes_of_tensors, stored_dtypes
from difloat.interchange import gguf_files, import_, source_names
from difloat.load_errors import hub_errors, load_errors
from difloat.methods import malloc_trim
from difloat.pipelines import DENOISER_NAMES, denoiser_of

DTYPES = ("auto", "stored", "float32", "bfloat16", "float16")
_WHOLE = (
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
    "vae.",
    "text_encoders.",
)  # not of a denoiser alone
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """What a user names.

    Attributes:
        name: An embedded model, a directory, ``owner/model`` on a hub, or a file that holds a checkpoint.
        base: Directory or hub name of the pipeline that a file or a component belongs to.
        revision: Branch, tag or commit on the hub.
        variant: Variant of the files, like "fp16". If it is left out, the only one that there is.
        dtype: What is computed in: "auto" is as stored, except that CPUs compute float16 as bfloat16 where they have its
            instructions and as float32 elsewhere; "stored" is as stored in any case, every component of a directory in its own;
            else float32, bfloat16 or float16.
    """

    name: str
    base: str | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def embedded(self) -> bool:
        """Whether it is one of the models that come with difloat."""
        return self.name in reference_models.NAMES


def load(source: Source, device: torch.device | str = "cpu") -> Any:
    """The pipeline, or the module where a component has no `base`, on the CPU and in the dtype that `device` computes in.

    Raises:
        FileNotFoundError: there is nothing of that name, here or on the hub.
        ValueError: what is there does not load, or a part of the description is missing.
    """
    if source.embedded:
        return reference_models.load(source.name)
    path = located(source)
    if path.is_file():
        return _from_file(path, source, device)
    if (path / INDEX).is_file():
        return _from_directory(path, source, device)
    return _component(path, source, device)


def load_into(pipeline: Any, source: Source, device: torch.device | str = "cpu") -> None:
    """Load a source once more into its own pipeline, unless that is in the dtypes that the source says already.

    The models that it holds are let go before, so that memory holds one of both.

    Args:
        pipeline: What `load` gave for this source with any dtype, its models still in float.
        source: The source, with the dtype that is wanted now.
        device: Where the models are put, and what they are to be computed on.

    Raises:
        FileNotFoundError: as `load`.
        ValueError: as `load`.
    """
    if has_dtypes(pipeline, source, device):
        return
    names = [name for name, part in pipeline.components.items() if isinstance(part, nn.Module)]
    for name in names:
        vars(pipeline)[name] = None  # assigned, it would be noted in the pipeline's config
    malloc_trim.release()
    again = load(source, device)
    for name in names:
        setattr(pipeline, name, getattr(again, name).to(torch.device(device)))


def has_dtypes(pipeline: Any, source: Source, device: torch.device | str = "cpu") -> bool:
    """Whether most values of every model are in the dtype that loading gives. False of single files, where loading tells."""
    if source.embedded:
        return True
    path = located(source)
    if source.base is not None or not (path / INDEX).is_file():
        return False
    wanted = _dtypes(path, source.dtype, device)
    for name in stored_dtypes_of(path):
        counts: Counter[torch.dtype] = Counter()
        for tensor in getattr(pipeline, name).parameters():
            counts[tensor.dtype] += tensor.numel()
        if counts.most_common(1)[0][0] != (wanted[name] if isinstance(wanted, dict) else wanted):
            return False
    return True


@contextmanager
def as_in_files(pipeline: Any, source: Source) -> Iterator[None]:
    """Inside, floating tensors of a pipeline have the dtypes that the files of its source have them in, to be saved so.

    Libraries load some tensors of half-precision files in float32 (T5's last projections), which would be written so. Tensors
    that are not in the files of a directory by their name and shape stay as they are.
    """
    changed = []
    path = None if source.embedded else located(source)
    for name, part in pipeline.components.items() if path is not None else ():
        folder = path / name
        if source.base is not None or not (folder / CONFIG).is_file() or not isinstance(part, nn.Module):
            continue
        dtypes = dtypes_of_tensors(folder)
        for key, tensor in part.state_dict(keep_vars=True).items():
            wanted, shape = dtypes.get(key, (tensor.dtype, tensor.shape))
            if tensor.is_floating_point() and tensor.dtype != wanted and tuple(tensor.shape) == tuple(shape):
                changed.append((tensor, tensor.data))
                tensor.data = tensor.data.to(wanted)
    try:
        yield
    finally:
        for tensor, before in changed:
            tensor.data = before


def outlined(source: Source) -> outline.Outline:
    """The denoiser as its files describe it, without values. Checkpoints in one file have other names and no outline.

    Raises:
        FileNotFoundError: there is nothing of that name, here or on the hub.
        ValueError: it is a file.
    """
    if source.embedded:
        folder = reference_models.ASSETS / source.name
        return outline.outline(next(config.parent for config in folder.glob(f"*/{CONFIG}")))
    path = located(source)
    if path.is_file():
        raise ValueError(
            f"source must be a directory or a hub name to be outlined, got the file {source.name!r}"
        )
    return outline.outline(path)


def located(source: Source) -> Path:
    """The directory or file of a source on this machine. What a hub has is downloaded into its cache.

    Raises:
        FileNotFoundError: there is nothing of that name, here or on the hub.
    """
    path = Path(source.name)
    if path.exists():
        return path
    if not _HUB_NAME.fullmatch(source.name):
        known = ", ".join(reference_models.NAMES)
        raise FileNotFoundError(
            f"source must be a directory, a file, a hub name like owner/model or one of {known}, got {source.name!r}, which "
            "does not exist"
        )
    return _downloaded(source)


def stored_dtypes_of(path: Path) -> dict[str, torch.dtype]:
    """The dtype that most values of every component of a pipeline's directory are stored in, by component."""
    counts = {config.parent.name: stored_dtypes(config.parent) for config in path.glob(f"*/{CONFIG}")}
    return {name: found.most_common(1)[0][0] for name, found in counts.items() if found}


def computed_in(stored: torch.dtype, dtype: str, device: torch.device | str) -> torch.dtype:
    """What values that are stored in a dtype are computed in, as `Source.dtype` and the machine have it."""
    if dtype not in ("auto", "stored"):
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    if dtype == "stored" or stored != torch.float16 or torch.device(device).type != "cpu":
        return stored
    return torch.bfloat16 if _computes_bfloat16() else torch.float32


def _computes_bfloat16() -> bool:
    """Whether this CPU has products of bfloat16 numbers."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _downloaded(source: Source) -> Path:
    from diffusers import DiffusionPipeline

    chosen = {"revision": source.revision, "variant": source.variant}
    with hub_errors(source.name):
        return Path(
            DiffusionPipeline.download(source.name, **{k: v for k, v in chosen.items() if v is not None})
        )


def _from_directory(path: Path, source: Source, device: torch.device | str, **parts: Any) -> Any:
    from diffusers import DiffusionPipeline

    variant = source.variant or _variant_of(path)
    with load_errors(source.name):
        dtypes = _dtypes(path, source.dtype, device)
        return DiffusionPipeline.from_pretrained(path, variant=variant, **{dtype_argument(): dtypes}, **parts)


def _dtypes(path: Path, dtype: str, device: torch.device | str) -> Any:
    """One dtype for all components where values of several do not fit together: that of the most values."""
    if dtype == "stored":
        return {"default": torch.float32} | stored_dtypes_of(path)
    counts: Counter[torch.dtype] = Counter()
    for config in path.glob(f"*/{CONFIG}"):
        counts.update(stored_dtypes(config.parent))
    most = counts.most_common(1)[0][0] if counts else torch.float32
    return computed_in(most, dtype, device)


def _variant_of(path: Path) -> str | None:
    """The variant that all weights of a pipeline have in their names, as hubs offer "fp16" apart. None without one."""
    names = [file.name.removesuffix(".safetensors") for file in path.glob("*/*.safetensors")]
    found = {name.partition(".")[2].partition("-")[0] for name in names}
    return found.pop() or None if len(found) == 1 else None


def _component(path: Path, source: Source, device: torch.device | str) -> Any:
    """A model of diffusers alone, in the pipeline `base` if there is one."""
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(
            f"source must hold model_index.json or config.json, got {source.name!r} without; is the download complete?"
        )
    import diffusers

    class_name = read_json(path / CONFIG).get("_class_name")
    model_class: Any = getattr(diffusers, str(class_name), None)
    if model_class is None:
        raise ValueError(
            f"class of the model must be one of diffusers, got {class_name!r:.80} in {source.name!r}"
        )
    counts = stored_dtypes(path)
    stored = counts.most_common(1)[0][0] if counts else torch.float32
    dtype = computed_in(stored, source.dtype, device)
    with load_errors(source.name):
        module: nn.Module = model_class.from_pretrained(path, **{dtype_argument(): dtype})
    return module if source.base is None else _in_base({"": module}, source, device)


def _from_file(path: Path, source: Source, device: torch.device | str) -> Any:
    """A checkpoint in one file: all of a pipeline, or its denoiser, which needs a `base` for the rest."""
    import diffusers
    from diffusers.loaders import single_file_utils

    with load_errors(source.name):
        if path.suffix == gguf_files.SUFFIX:
            state, stored = _float_gguf(path)
        else:
            state = single_file_utils.load_single_file_checkpoint(str(path))
            floats = Counter(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
            stored = floats.most_common(1)[0][0]
        repository = single_file_utils.fetch_diffusers_config(state)["pretrained_model_name_or_path"]
    dtype = computed_in(stored, source.dtype, device)
    whole = any(name.startswith(_WHOLE) for name in state)
    what: Any = dict(state) if path.suffix == gguf_files.SUFFIX else str(path)
    base = source.base or (repository if whole else None)
    if base is None:
        raise ValueError(
            f"base must name the pipeline that {source.name!r}, a denoiser alone, belongs to (such as {repository}), got none; "
            "a LoRA goes to generate --lora"
        )
    index = _index_of(base, source)
    if whole:
        pipeline_class: Any = getattr(diffusers, index["_class_name"])
        with load_errors(source.name):
            pipeline = pipeline_class.from_single_file(what, config=base, torch_dtype=dtype)
            _keep_names(denoiser_of(pipeline)[1], state, whole)
        return pipeline
    name = next(name for name in DENOISER_NAMES if index.get(name, [None])[0])
    model_class: Any = getattr(diffusers, index[name][1])
    if not hasattr(model_class, "from_single_file"):
        folder = located(Source(base, revision=source.revision)) / name
        return _in_base({name: import_.model_with(folder, state, dtype)}, source, device)
    with load_errors(source.name):
        module = model_class.from_single_file(what, config=base, subfolder=name, torch_dtype=dtype)
        _keep_names(module, state, whole)
    return _in_base({name: module}, source, device)


def _keep_names(module: nn.Module, state: Mapping[str, torch.Tensor], whole: bool) -> None:
    """Note on a model under which names its tensors came, so that an export can give them back."""
    if (names := source_names.find(module, state, keep_unused=not whole)) is not None:
        kept_names.keep(module, names)


def _float_gguf(path: Path) -> tuple[dict[str, torch.Tensor], torch.dtype]:
    """The float weights of a GGUF file, and what its values are taken to be stored in: blocks are products with a float16."""
    state, counts = gguf_files.read(path)
    wide = counts["F32"] > counts.total() - counts["F32"]
    bfloat16 = counts["BF16"] > counts.total() - counts["BF16"]
    return state, torch.float32 if wide else torch.bfloat16 if bfloat16 else torch.float16


def _index_of(base: str, source: Source) -> Mapping[str, Any]:
    """`model_index.json` of a pipeline."""
    from diffusers import DiffusionPipeline

    if Path(base).exists() or not _HUB_NAME.fullmatch(base):
        return read_json(located(Source(base)) / INDEX)
    with hub_errors(base):
        found: Mapping[str, Any] = DiffusionPipeline.load_config(base, revision=source.revision)
    return found


def _in_base(modules: dict[str, nn.Module], source: Source, device: torch.device | str) -> Any:
    """The pipeline `base` with modules in their places. A module without a name goes where its class is."""
    assert source.base is not None
    path = located(Source(source.base, revision=source.revision))
    index = read_json(path / INDEX)
    classes = {entry[1]: name for name, entry in index.items() if isinstance(entry, list)}
    places = {name or classes.get(type(module).__name__, ""): module for name, module in modules.items()}
    if "" in places:
        raise ValueError(
            f"base must be a pipeline with a {type(places['']).__name__}, got {source.base!r} without; name another"
        )
    return _from_directory(path, replace(source, variant=None), device, **places)
