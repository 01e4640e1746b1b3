"""The file format, versions 1 and 2: names, shapes and checks that saving, loading and verifying share.

`docs/format.md` specifies it for readers of other origin. In memory every layer has its own vectors; in the file the
input vectors of all layers are one tensor, because the header entry of a tensor takes some 120 bytes and most of
these vectors hold one number.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from difloat.layers.packed import QuantizedLayer
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.specs import SIDE

QUANT_METHOD = "difloat"
INPUT_BUNDLE = "difloat.input"
CONFIG = "config.json"
WEIGHT_STEMS = ("diffusion_pytorch_model", "model")

_BUNDLED = ("input_scale", "input_zero_point")
_SPELLED = {torch.uint8: "U8", torch.float32: "F32", torch.float16: "F16"}  # what a plan stores


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read. The message is one sentence that says what to do.

    >>> import difloat
    >>> try:
    ...     difloat.load(".")
    ... except (difloat.CheckpointError, FileNotFoundError) as error:
    ...     print(type(error).__name__)
    FileNotFoundError
    >>> issubclass(difloat.CheckpointError, ValueError)
    True
    """


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a safetensors file says of a tensor, with `dtype` as spelled there (`U8`, `F32`)."""

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def is_floating_point(self) -> bool:
        """Whether its numbers are floating-point ones (`F32`, `BF16`, `F8_E4M3`)."""
        return self.dtype.startswith(("F", "BF"))

    @property
    def nbytes(self) -> int:
        """Bytes of its values.

        The first number in the name of a dtype counts bits, and truth values take a byte each.
        """
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8


def plan_tensors(plan: Plan) -> dict[str, Tensor]:
    """The plan's tensors by their names in a state dict, `<layer>.<tensor>`."""
    return {
        f"{name}.{key}": tensor
        for name, layer in plan.layers.items()
        for key, tensor in layer.tensors.items()
    }


def bundled_names(plan: Plan) -> dict[str, int]:
    """Names and lengths of the vectors that `INPUT_BUNDLE` holds, in its order: layers by name, scales before zero points."""
    return {
        f"{name}.{key}": layer.tensors[key].numel()
        for name, layer in sorted(plan.layers.items())
        for key in _BUNDLED
        if key in layer.tensors
    }


def bundle(state: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """State dict as stored: the input vectors become one tensor.

    Raises:
        CheckpointError: if the state dict lacks one of them.
    """
    names = bundled_names(plan)
    if missing := [name for name in names if name not in state]:
        raise CheckpointError(
            f"layers must be those of the plan, but {missing[0]!r} is gone; "
            "call difloat.save, which reads the plan off the layers"
        )
    stored = {name: tensor for name, tensor in state.items() if name not in names}
    if names:
        stored[INPUT_BUNDLE] = torch.cat([state[name].detach().cpu() for name in names])
    return stored


def unbundle(stored: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Undo `bundle` for the tensors of a state dict that are at hand, those of one shard, say."""
    state = dict(stored)
    bundled = state.pop(INPUT_BUNDLE, None)
    if bundled is not None:
        names = bundled_names(plan)
        # Copies, since tensors that share memory can neither be saved nor moved one by one.
        pieces = [piece.clone() for piece in bundled.split(list(names.values()))]
        state.update(zip(names, pieces, strict=True))
    return state


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. FileNotFoundError or CheckpointError, in one sentence, if there is none."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name} must be in the checkpoint directory, but {path} does not exist; download it again"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} must be JSON, but {error!s:.200}; download or save it again"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path} must be a JSON object, got {type(data).__name__}; download or save it again"
        )
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different, since otherwise every reader takes another of two entries."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r:.80} is in it twice")
    return found


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write compact JSON, the same text for the same data: a plan with line breaks would take twice its size."""
    path.write_text(json.dumps(data, sort_keys=True, separators=(",", ":")) + "\n", encoding="utf-8")


def weight_files(directory: Path) -> tuple[list[Path], Path | None]:
    """The safetensors files of a model directory, and their index if they are shards.

    Raises:
        FileNotFoundError: if there are none, or a shard of the index is missing.
        CheckpointError: if the index is damaged or points out of the directory.
    """
    for stem in WEIGHT_STEMS:
        index = directory / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _shards(index), index
        if (single := directory / f"{stem}.safetensors").is_file():
            return [single], None
    names = " or ".join(f"{stem}.safetensors" for stem in WEIGHT_STEMS)
    raise FileNotFoundError(f"{directory} must hold {names}, but neither exists; download it again")


def is_file_name(name: str) -> bool:
    """Whether a name from a file is that of a file in the same directory: no path, and not too long for a file system."""
    return (
        name == Path(name).name and len(name.encode(errors="replace")) <= 255 and not set(name) & {"\\", "\0"}
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(v, str) for v in weight_map.values())
    ):
        raise CheckpointError(
            f"{index} must have a weight_map of tensor names to file names; download it again"
        )
    for name in sorted(set(weight_map.values())):
        if not is_file_name(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"shards must be safetensors files beside their index, got {name!r:.200}; do not load this checkpoint"
            )
        if not (index.parent / name).is_file():
            raise FileNotFoundError(
                f"shard {name} must be beside its index in {index.parent}, but is missing; download it again"
            )
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model directory by its name in the files, without reading values.

    Raises:
        FileNotFoundError: if a file is missing.
        CheckpointError: if a file is truncated or damaged, or index and files disagree.
    """
    files, index = weight_files(directory)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    entry = opened.get_slice(name)
                    if name in tensors:
                        raise CheckpointError(
                            f"tensor {name!r} must be stored once, but is in two shards; download them again"
                        )
                    tensors[name] = StoredTensor(entry.get_dtype(), tuple(entry.get_shape()), file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} must be a whole safetensors file, but {error!s:.200}; download it again"
            ) from error
    if index is not None:
        expected = read_json(index)["weight_map"]
        wrong = {n for n in expected if n not in tensors or tensors[n].file.name != expected[n]} | (
            set(tensors) - set(expected)
        )
        if wrong:
            raise CheckpointError(
                f"index and shards must agree, but not on {min(wrong)!r:.200}; download both again"
            )
    return tensors


def check_headers(plan: Plan, stored: Mapping[str, StoredTensor]) -> None:
    """Compare the planned tensors with what the files say.

    Raises:
        CheckpointError: if one is missing, of another dtype or shape, or a planned layer has one too many.
    """
    bundled = bundled_names(plan)
    expected = {name: tensor for name, tensor in plan_tensors(plan).items() if name not in bundled}
    if bundled:
        expected[INPUT_BUNDLE] = torch.empty(sum(bundled.values()), dtype=torch.float32, device="meta")
    for name, tensor in expected.items():
        want = (_SPELLED[tensor.dtype], tuple(tensor.shape))
        if name not in stored:
            raise CheckpointError(
                f"tensor {name!r:.200} of the plan must be stored, but is missing; download or save it again"
            )
        got = (stored[name].dtype, stored[name].shape)
        if got != want:
            raise CheckpointError(
                f"tensor {name!r:.200} must be {want[0]} of shape {list(want[1])}, got {got[0]} {list(got[1])}; "
                "download or save it again"
            )
    for name in stored:
        layer, _, key = name.rpartition(".")
        if name not in expected and (name == INPUT_BUNDLE or (layer in plan.layers and key != "bias")):
            raise CheckpointError(
                f"stored tensors must be in the plan, but {name!r:.200} is not; download or save it again"
            )


def check_stored(name: str, layer: LayerPlan | QuantizedLayer, values: Tensor) -> None:
    """Check the values of a stored tensor besides packed codes, called ``<layer>.<tensor>``.

    Raises:
        CheckpointError: unless scales and factors are finite and positive (of tables: not 0), zero points and side branches
            finite, and as many rows belong to every band as the plan says.
    """
    if name.endswith(".row_band"):
        bands = layer.bands
        counts = torch.bincount(values.int(), minlength=len(bands)).tolist()
        if counts != [band.rows for band in bands]:
            raise CheckpointError(
                f"{name!r:.200} must put {[band.rows for band in bands]!r:.80} rows into the bands, got {counts!r:.80}; "
                "quantize or download the model again"
            )
        return
    positive = not name.endswith(("_zero_point", *(f".{key}" for key in SIDE)))
    specs = [spec for band in layer.bands for spec in band.weights] or [part.weight for part in layer.parts]
    signed = name.endswith(".weight_scale") and any(spec.format.levels for spec in specs)
    wrong = ~torch.isfinite(values)
    if positive:
        wrong |= (values == 0) if signed else (values <= 0)
    if bool(wrong.any()):
        rule = "finite and not 0" if signed else "finite and positive" if positive else "finite"
        raise CheckpointError(
            f"{name!r:.200} must be {rule}, got {values[wrong][0].item()}; quantize or download the model again"
        )
