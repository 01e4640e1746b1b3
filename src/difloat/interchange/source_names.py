"""Names kept: a model that came in one file under other names than diffusers' goes back under them.

diffusers turns such a file into its own model by a function per family. Here that very function is run on tensors that
carry their identity in place of the weights, row by row, so what it did is read off its result and nothing is typed per
family. All of them rename tensors, and cut and join them along the first axis; anything else is noticed and given up.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from difloat.checkpoint.source_names import VERSION

_ENTRIES = 2  # kept of every further axis: enough to see it turned or exchanged with another
_COLUMNS = 16  # at most so many of them in a row, as weights have at most five axes
_SMALL = 1 << 16  # bytes of a tensor without a place in the model that is kept nevertheless

Shapes = Mapping[str, Sequence[int]]
Convert = Callable[..., Mapping[str, Tensor]]


def find(model: nn.Module, state: Mapping[str, Tensor], *, keep_unused: bool) -> dict[str, Any] | None:
    """What `checkpoint.source_names` keeps of a file. None if the names are diffusers' own or the way back is unknown.

    Args:
        model: What diffusers made of the file.
        state: The file's tensors. Their names and shapes count, and the values of small ones that the model leaves out.
        keep_unused: Keep those, for the file of a denoiser alone. A whole pipeline's other components are no leftovers.
    """
    convert = _conversion(model)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if convert is None or shapes.keys() == expected.keys():
        return None
    try:
        tensors = inverse(convert, dict(getattr(model, "config", {})), shapes, expected)
    except (
        ArithmeticError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ):  # it computes with values or sizes
        return None
    if tensors is None:
        return None
    left = [name for name in state if name not in tensors] if keep_unused else []
    unused = {name: _stored(state[name]) for name in left if state[name].nbytes <= _SMALL}
    return {"version": VERSION, "tensors": tensors, "unused": unused}


def inverse(
    convert: Convert, config: Mapping[str, Any], shapes: Shapes, expected: Shapes
) -> dict[str, dict[str, Any]] | None:
    """Find the shape of every tensor of a file that a conversion used, and the rows of converted tensors that make it.

    Args:
        convert: diffusers' conversion, called with `checkpoint` and `config`.
        config: The model's config.
        shapes: Shapes of the file's tensors.
        expected: Shapes of the model's tensors, all of which must come out so.

    Returns:
        None if the conversion does more than moving rows, or leaves out some of a tensor's.
    """
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    converted = {name: t for name, t in convert(checkpoint=meta, config=config).items() if t is not None}
    if any(name not in converted or tuple(converted[name].shape) != s for name, s in expected.items()):
        return None
    identities, starts = _identities(shapes)
    try:
        moved = convert(checkpoint=dict(identities), config=config)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
        return None  # it counts columns, of which there are fewer here
    places: dict[int, tuple[str, int]] = {}
    for name, shape in expected.items():
        rows = _rows(moved[name], shape)
        if rows is None:
            return None
        for row, number in enumerate(rows):
            places.setdefault(number, (name, row))
    found: dict[str, dict[str, Any]] = {}
    for source, start in starts.items():
        shape = shapes[source]
        numbers = range(start, start + (shape[0] if shape else 1))
        present = [number in places for number in numbers]
        if not any(present):
            continue
        if not all(present):
            return None
        found[source] = {"shape": list(shape), "rows": _runs([places[number] for number in numbers])}
    return found


def _conversion(model: nn.Module) -> Convert | None:
    """The function by which diffusers turns a single file into this class of models. None for classes without one."""
    from diffusers.loaders import single_file_model

    name = single_file_model._get_single_file_loadable_mapping_class(type(model))
    if name is None:
        return None
    entries: Mapping[str, Any] = single_file_model.SINGLE_FILE_LOADABLE_CLASSES
    function: Convert = entries[name]["checkpoint_mapping_fn"]
    return function


def _identities(shapes: Shapes) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors of a few columns whose entries name row and column, and the number of every tensor's first row, from 1 on."""
    identities: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    start = 1
    for name, shape in shapes.items():
        rows = shape[0] if shape else 1
        inner = [min(size, _ENTRIES) for size in shape[1:]]
        row = torch.arange(start, start + rows, dtype=torch.float64)[:, None] * _COLUMNS
        values = row + torch.arange(math.prod(inner), dtype=torch.float64)
        identities[name] = values.reshape([rows, *inner] if shape else [])
        starts[name] = start
        start += rows
    return identities, starts


def _rows(moved: Tensor, shape: Sequence[int]) -> list[int] | None:
    """The number of every row of a converted tensor. None where its columns are not those of one row in their order."""
    inner = [min(size, _ENTRIES) for size in shape[1:]]
    if list(moved.shape[1:]) != inner:
        return None
    values = moved.reshape(shape[0] if shape else 1, -1).round().long()
    numbers, columns = values // _COLUMNS, values % _COLUMNS
    whole = bool((numbers == numbers[:, :1]).all() and (columns == torch.arange(values.shape[1])).all())
    return [int(number) for number in numbers[:, 0]] if whole and bool((numbers > 0).all()) else None


def _runs(places: Sequence[tuple[str, int]]) -> list[list[Any]]:
    """Rows one after the other as runs of one tensor: its name, the first row and the one behind the last."""
    runs: list[list[Any]] = []
    for name, row in places:
        if runs and runs[-1][0] == name and runs[-1][2] == row:
            runs[-1][2] = row + 1
        else:
            runs.append([name, row, row + 1])
    return runs


def _stored(tensor: Tensor) -> dict[str, Any]:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "base64": base64.b64encode(raw).decode()}


def unused_tensors(names: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that the model had no place for, as they were in the file."""
    found = {}
    for name, entry in names["unused"].items():
        raw = torch.frombuffer(bytearray(base64.b64decode(entry["base64"])), dtype=torch.uint8)
        found[name] = raw.view(getattr(torch, entry["dtype"])).reshape(entry["shape"])
    return found
