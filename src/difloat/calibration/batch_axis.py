"""The batch axis of the arguments of a denoiser's call, and the call's structure as JSON without its tensors.

Most denoisers take tensors whose first axis is the batch. Some (Z-Image) take lists with one tensor per picture. Then the list
is the batch axis, every list of that length is taken apart, and its tensors may have different sizes. A list is the batch only
where the sample itself is one, because lists beside a tensor (residuals of a ControlNet) are as long as the network is deep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from difloat.layers.timestep_clock import TIMESTEP_NAMES

# Position tables have no batch axis, even where their first size happens to equal the batch size.
SHARED_NAMES = frozenset(
    {"img_ids", "txt_ids", "image_rotary_emb", "timestep_indices", "token_tags"}
    | {f"indices_latents{which}" for which in ("", "_clean", "_history_2x", "_history_4x")}
)
# Arguments whose batch axis is the second, behind one for the layers of a language model (HiDream).
SECOND_AXIS_NAMES = frozenset({"encoder_hidden_states_llama3"})

# Arguments of a denoiser of videos with an entry for every frame of every row, row after row (AnimateDiff).
FRAMEWISE_NAMES = frozenset(
    {"encoder_hidden_states", "down_block_additional_residuals", "mid_block_additional_residual"}
)


def entries_per_row(name: str, tensor: Tensor, batch: int) -> bool | int | Literal["second"]:
    """How many entries of an argument's first axis belong to a row, judged by the length of the axis.

    >>> entries_per_row("hidden_states", torch.zeros(4, 3), batch=4), entries_per_row("img_ids", torch.zeros(4, 3), batch=4)
    (True, False)

    Returns:
        True for one entry, a number for several, False for an argument that all rows share, and "second" where the batch is
        the second axis.
    """
    if tensor.ndim == 0 or name in SHARED_NAMES:
        return False
    if name in SECOND_AXIS_NAMES and tensor.ndim == 4:
        return "second" if tensor.shape[1] == batch else False
    if name in FRAMEWISE_NAMES and tensor.ndim >= 3 and len(tensor) > batch and len(tensor) % batch == 0:
        return len(tensor) // batch
    return len(tensor) == batch


def own_entries(tensor: Tensor, split: bool | int | str, row: int) -> Tensor:
    """The entries of one row, as `entries_per_row` counts them. The axis stays."""
    if split == "second":
        return tensor[:, row : row + 1]
    return tensor[row * int(split) : (row + 1) * int(split)]


@dataclass(frozen=True)
class Rows:
    """A list of a call that is its batch axis, cut to one row.

    Attributes:
        entry: The list's entry for the row.
        kind: "list" or "tuple".
    """

    entry: object
    kind: str


def sample_of(named: Mapping[str, object]) -> tuple[str, int]:
    """The name and batch size of the noisy sample, which is the first tensor with a batch axis or list of tensors.

    Raises:
        ValueError: if there is neither.
    """
    for name, value in named.items():
        if isinstance(value, Tensor) and value.ndim >= 2:
            return name, len(value)
        if _is_rows(value) and not _split_by(value, named):
            return name, len(value)  # type: ignore[arg-type]
    for name, value in named.items():
        if isinstance(value, Tensor) and value.ndim == 1:
            return name, len(value)
    raise ValueError(
        "a denoiser must be called with a sample of shape [batch, ...], or a list of one tensor per picture, as a direct "
        f"argument, got the arguments {list(named)}; pass the noisy sample itself"
    )


def _is_rows(value: object) -> bool:
    """Whether a value is a list of tensors, or of lists of tensors, one per picture."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(entry, Tensor) and entry.ndim > 0 or _is_rows(entry) for entry in value)
    )


def _split_by(rows: object, named: Mapping[str, object]) -> bool:
    """Whether the entries of a list share the batch axis of another argument, as several embeddings of the same rows do."""
    batch = next((len(v) for v in named.values() if isinstance(v, Tensor) and v.ndim >= 2), None)
    return all(isinstance(entry, Tensor) and len(entry) == batch for entry in rows)  # type: ignore[attr-defined]


def rows_in_lists(args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """Whether the sample of a denoiser's call is a list of one tensor per picture."""
    named = _named(args, kwargs)
    return not isinstance(named[sample_of(named)[0]], Tensor)


def rows_of(args: Sequence[object], kwargs: Mapping[str, object]) -> int:
    """The number of rows that a denoiser is called with."""
    return sample_of(_named(args, kwargs))[1]


def samples_of(args: Sequence[object], kwargs: Mapping[str, object]) -> list[Tensor]:
    """The tensors of the noisy sample, which are one or one per picture."""
    named = _named(args, kwargs)
    leaves = pytree.tree_leaves(named[sample_of(named)[0]])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _named(args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
    return {**{str(number): value for number, value in enumerate(args)}, **kwargs}


def cut(value: object, batch: int, row: int) -> object:
    """An argument of a call whose batch axis is a list, cut to one row. Lists of `batch` entries become the row's entry.

    Lists inside dicts are cut as well. Lists of numbers and words stay whole, since they are settings such as patch sizes.
    """
    if isinstance(value, Mapping):
        return {key: cut(entry, batch, row) for key, entry in value.items()}
    plain = (bool, int, float, str)
    if (
        isinstance(value, (list, tuple))
        and len(value) == batch
        and not any(isinstance(v, plain) for v in value)
    ):
        return Rows(value[row], "list" if isinstance(value, list) else "tuple")
    return value


def timestep_name(named: Mapping[str, object], sample_name: str, batch: int) -> str | None:
    """The argument that holds the timestep, known by its name, or the first scalar or [batch] tensor after the sample."""
    for name in TIMESTEP_NAMES:
        value = named.get(name)
        if name != sample_name and value is not None and isinstance(value, (Tensor, int, float)):
            return name
    order = list(named)
    for name in order[order.index(sample_name) + 1 :]:
        value = named[name]
        if isinstance(value, Tensor) and value.dtype != torch.bool and value.ndim <= 1:
            if value.numel() in (1, batch):
                return name
    return None


def numbers_in(named: Mapping[str, object]) -> dict[str, float]:
    """The arguments that are Python numbers."""
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def per_row_timestep(value: object, batch: int) -> Tensor:
    """The timestep with a batch axis [b]. A scalar becomes the same value for every row."""
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else torch.int64)
    return value.reshape(1).expand(batch) if value.numel() == 1 else value


def timestep_values(timestep: object, batch: int, call: int) -> list[float]:
    """One number per row: the largest timestep of the row's entries, or the call's number where there is no timestep."""
    if not isinstance(timestep, Tensor):
        return [float(call)] * batch
    if len(timestep) != batch:
        return [float(timestep.max())] * batch
    return timestep.reshape(batch, -1).amax(1).double().tolist()


def encode(value: object, name: str, leaves: list[tuple[str, Tensor, bool]]) -> dict[str, object]:
    """The JSON form of an argument.

    Tensors go to `leaves`, with their name and whether they belong to one row of a list. The JSON holds their number instead.
    """
    return _encode(value, name, leaves, False)


def _encode(
    value: object, name: str, leaves: list[tuple[str, Tensor, bool]], in_rows: bool
) -> dict[str, object]:
    if isinstance(value, Rows):
        return {"rows": [value.kind, _encode(value.entry, name, leaves, True)]}
    if isinstance(value, Tensor):
        leaves.append((name, value, in_rows))
        return {"tensor": len(leaves) - 1}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(entry, name, leaves, in_rows) for entry in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(entry, key, leaves, in_rows) for key, entry in value.items()}}
    if isinstance(value, Mapping) and all(type(key) is int for key in value):
        return {"numbered": {str(key): _encode(entry, name, leaves, in_rows) for key, entry in value.items()}}
    raise ValueError(
        "a denoiser's arguments must be tensors, numbers, strings, None, or lists, tuples, dicts of them, "
        f"got {type(value).__name__} in '{name}'; wrap the denoiser in a module that builds it itself"
    )


def decode(node: Mapping[str, Any], tensors: Sequence[Any], rows: int, row: int | None = None) -> object:
    """The argument that `encode` made JSON of, for a call of so many rows.

    Args:
        node: The JSON.
        tensors: The tensors in the order of the leaves. Those in lists of rows are lists with one tensor per row.
        rows: How many rows the call has.
        row: The number of the row inside of a list of rows, or None outside.
    """
    ((kind, content),) = node.items()
    if kind == "rows":
        entries = [decode(content[1], tensors, rows, each) for each in range(rows)]
        return entries if content[0] == "list" else tuple(entries)
    if kind == "tensor":
        return tensors[content] if row is None else tensors[content][row]
    if kind == "dict":
        return {key: decode(entry, tensors, rows, row) for key, entry in content.items()}
    if kind == "numbered":
        return {int(key): decode(entry, tensors, rows, row) for key, entry in content.items()}
    if kind in ("list", "tuple"):
        entries = [decode(entry, tensors, rows, row) for entry in content]
        return entries if kind == "list" else tuple(entries)
    return content


def prediction(output: object, in_lists: bool) -> Tensor | list[Tensor]:
    """The denoiser's prediction in its output: a tensor [batch, ...], or a list of one tensor per row.

    It is the output itself, or the first entry of a tuple, list, dict or diffusers output. A list inside of these holds a
    tensor per row, and so does the output of a denoiser that takes its rows `in_lists`.

    Raises:
        ValueError: if there is no tensor.
    """
    if isinstance(output, Tensor):
        return output
    if in_lists and isinstance(output, list) and _is_rows(output):
        return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)) and output:
        return prediction(output[0], isinstance(output[0], list))
    raise ValueError(
        "a denoiser must return a tensor, or a tuple, list or dict that starts with one, "
        f"got {type(output).__name__}; wrap it in a module that does"
    )


def first_tensor(output: object, in_lists: bool = False) -> Tensor:
    """The denoiser's `prediction` [batch, ...] in its output. A list of one tensor per row is stacked.

    Raises:
        ValueError: if there is no tensor, or the rows of a list have different sizes.
    """
    found = prediction(output, in_lists)
    if isinstance(found, Tensor):
        return found
    if len(shapes := {tuple(tensor.shape) for tensor in found}) > 1:
        raise ValueError(
            f"rows of one call must have one picture size here, got outputs of {sorted(shapes)}; calibrate with one size"
        )
    return torch.stack(found)


def predict(module: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The prediction [batch, ...] of one call of a denoiser, with the errors of `first_tensor`."""
    return first_tensor(module(*args, **kwargs), rows_in_lists(args, kwargs))
