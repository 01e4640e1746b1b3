"""Captured denoiser calls, cut into rows that can be merged again into a call of any batch size.

A call is nested arguments (tuples, lists, dicts, None, numbers, bools, strings, tensors). Its *rows* are the
entries of the batch axis. Every tensor of a row is stored once, under a hash of its content, so a text
embedding that a sampler passes at every step, or an empty prompt that every picture shares, costs its bytes once.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from difloat.timesteps import TIMESTEP_NAMES
from difloat.trajectories import Course

# Position tables have no batch axis, even where their first size happens to equal the batch size.
SHARED_NAMES = frozenset({"img_ids", "txt_ids", "image_rotary_emb"})
# A recording keeps one row of each of up to this many timesteps, whatever its limit, so that thinning it
# while the sampler still runs cannot empty the early part of a trajectory.
MAX_TIMESTEPS = 1024


@dataclass(frozen=True)
class Row:
    """One entry of the batch axis of one call.

    Attributes:
        timestep: The sampler's timestep in its own unit; the number of the call if the call has no timestep.
        part: Which block of the batch it comes from: with classifier-free guidance 0 and 1, otherwise 0.
        template: JSON of the call's structure with everything in it that is no tensor.
        leaves: Content hash of every tensor, in the template's order.
        trajectory: Which trajectory the row is a point of, the same for all parts; "" if that is not known.
        step: Which step of it.
    """

    timestep: float
    part: int
    template: str
    leaves: tuple[str, ...]
    trajectory: str = ""
    step: int = 0


def content_hash(tensor: Tensor) -> str:
    """Hash of dtype, shape and bytes of a CPU tensor."""
    digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    # Expanded tensors of one element keep stride 0 and still count as contiguous; only a clone clears that.
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def stratified_indices(rows: Sequence[Row], count: int, generator: torch.Generator) -> list[int]:
    """Choose `count` rows spread evenly over timesteps and, among equals, over parts; ascending, no repeats.

    Every timestep gets the same number of rows as far as it has them; a remainder goes to timesteps at equal
    distances from a random start. Rows of one timestep and part are chosen at random, in all parts those of the same
    trajectories, so that what guidance computes from them is known.
    """
    points = [(row.timestep, row.trajectory) if row.trajectory else number for number, row in enumerate(rows)]
    distinct = list(dict.fromkeys(points))
    order = dict(zip(distinct, torch.randperm(len(distinct), generator=generator).tolist(), strict=True))
    tiebreak = [order[point] for point in points]
    groups: dict[float, dict[int, list[int]]] = {}
    for index in sorted(range(len(rows)), key=tiebreak.__getitem__):
        groups.setdefault(rows[index].timestep, {}).setdefault(rows[index].part, []).append(index)
    open_groups = [groups[timestep] for timestep in sorted(groups)]
    taken_of = {id(group): Counter[int]() for group in open_groups}
    total: Counter[int] = Counter()
    chosen: list[int] = []
    while open_groups and len(chosen) < count:
        turn, missing = open_groups, count - len(chosen)
        if missing < len(open_groups):
            start = float(torch.rand((), generator=generator, dtype=torch.float64))
            places = (int((place + start) * len(open_groups) / missing) for place in range(missing))
            turn = [open_groups[min(place, len(open_groups) - 1)] for place in places]
        for group in turn:
            taken = taken_of[id(group)]
            part = min(
                (p for p in group if group[p]), key=lambda p: (total[p], taken[p], tiebreak[group[p][0]])
            )
            chosen.append(group[part].pop(0))
            taken[part] += 1
            total[part] += 1
        open_groups = [group for group in open_groups if any(group.values())]
    return sorted(chosen)


class Recorder:
    """Forward pre-hook (`with_kwargs=True`) that keeps rows of a denoiser's calls, evenly over timesteps.

    Holds at most twice `limit` rows (or one row per timestep if that is more) plus one call, on the CPU,
    and ends with `limit`, thinned by `generator`. Final.
    """

    def __init__(
        self,
        module: nn.Module,
        limit: int,
        generator: torch.Generator,
        *,
        images: int | None = None,
        on_call: Callable[[], object] | None = None,
        trajectories: str | None = None,
    ) -> None:
        """Prepare for calls of `module`, which sample `images` pictures at once (None: not known, no parts).

        Trajectories are called `trajectories` and a number; None: the calls do not follow one.
        """
        self.rows: list[Row] = []
        self.blobs: dict[str, Tensor] = {}
        self.calls = 0
        self._limit = limit
        self._generator = generator
        self._images = images
        self._on_call = on_call
        self._trajectories = trajectories
        self._course = Course()
        self._names = [
            parameter.name
            for parameter in inspect.signature(module.forward).parameters.values()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        self._seen: Counter[float] = Counter()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the rows of one call."""
        # Tensors made in inference mode can never enter autograd, so the copies are made outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._take(args, kwargs)
        self.calls += 1
        if len(self.rows) > 2 * self._capacity():
            self.thin()
        if self._on_call is not None:
            self._on_call()

    @property
    def calls_per_step(self) -> int:
        """Calls with the first timestep: 2 where guidance calls the denoiser twice per step instead of a double batch."""
        return next(iter(self._seen.values()))

    def _capacity(self) -> int:
        return max(self._limit, min(len({row.timestep for row in self.rows}), MAX_TIMESTEPS))

    def thin(self) -> None:
        """Drop rows above the limit, and the tensors that no row needs any more."""
        keep = stratified_indices(self.rows, self._capacity(), self._generator)
        self.rows = [self.rows[index] for index in keep]
        needed = {leaf for row in self.rows for leaf in row.leaves}
        self.blobs = {key: blob for key, blob in self.blobs.items() if key in needed}

    def _take(self, args: tuple[Any, ...], kwargs: Mapping[str, object]) -> None:
        names = self._names + [f"argument {index}" for index in range(len(self._names), len(args))]
        named = dict(zip(names, args, strict=False)) | dict(kwargs)
        sample_name, batch = _sample(named)
        timestep_name = _timestep_name(named, sample_name, batch)
        if timestep_name is not None:
            named[timestep_name] = _per_row_timestep(named[timestep_name], batch)
        values = _timestep_values(named[timestep_name] if timestep_name else None, batch, self.calls)
        leaves: list[tuple[str, Tensor]] = []
        nodes = {name: _encode(value, name, leaves) for name, value in named.items()}
        per_row = [
            tensor.ndim > 0 and len(tensor) == batch and name not in SHARED_NAMES for name, tensor in leaves
        ]
        template = json.dumps({"positional": len(args), "per_row": per_row, "arguments": nodes})
        for name, tensor in leaves:
            self._check_finite(name, tensor, values[0])
        whole = [
            None if split else self._store(tensor) for (_, tensor), split in zip(leaves, per_row, strict=True)
        ]
        self._course.advance(values[0], batch)
        parts = batch // self._images if self._images and batch % self._images == 0 else 1
        for index in range(batch):
            keys = tuple(
                key or self._store(tensor[index : index + 1])
                for (_, tensor), key in zip(leaves, whole, strict=True)
            )
            # Samplers that guide by two calls per step show the same timestep again: that is the other part.
            part = index * parts // batch if parts > 1 else self._seen[values[0]] if self._images else 0
            self.rows.append(Row(values[index], part, template, keys, *self._point(index)))
        self._seen[values[0]] += 1

    def _point(self, index: int) -> tuple[str, int]:
        """Trajectory and step of entry `index` of the current call."""
        if self._trajectories is None:
            return "", 0
        name, course = f"{self._trajectories}/{self._course.passes}", self._course
        if (
            self._images
        ):  # what is called twice in a step, or has two rows in a batch, is another part of the same picture
            return f"{name}/{index % self._images}", course.step
        return f"{name}/{course.repeat}/{index}", course.step

    def _check_finite(self, name: str, tensor: Tensor, timestep: float) -> None:
        # An additive attention mask may hold -inf on purpose.
        if tensor.is_floating_point() and "mask" not in name and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"calibration data must be finite, got NaN or infinity in '{name}' at timestep {timestep:g} "
                f"(denoiser call {self.calls}); sample in float32 or bfloat16 and check the model's weights"
            )

    def _store(self, tensor: Tensor) -> str:
        copy = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        key = content_hash(copy)
        self.blobs.setdefault(key, copy)
        return key


def device_of(module: nn.Module) -> torch.device:
    """Device of the module's first parameter; the CPU if it has none or they are offloaded."""
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device


@contextmanager
def recording(module: nn.Module, hook: Callable[..., None], seed: int) -> Iterator[None]:
    """Show the module's calls to `hook`, without gradients, torch's random state seeded inside and restored after."""
    device = device_of(module)
    cuda_devices = [device] if device.type == "cuda" else []
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=cuda_devices):
            torch.default_generator.manual_seed(seed)
            for cuda_device in cuda_devices:
                with torch.cuda.device(cuda_device):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        handle.remove()


def _sample(named: Mapping[str, object]) -> tuple[str, int]:
    """Name and batch size of the first tensor with a batch axis: the noisy sample."""
    for least_ndim in (2, 1):
        for name, value in named.items():
            if isinstance(value, Tensor) and value.ndim >= least_ndim:
                return name, len(value)
    raise ValueError(
        "a denoiser must be called with a sample tensor of shape [batch, ...] as a direct argument, "
        f"got the arguments {list(named)}; pass the noisy sample itself"
    )


def _timestep_name(named: Mapping[str, object], sample_name: str, batch: int) -> str | None:
    """Argument that holds the timestep: by name, else the first scalar or [batch] tensor after the sample."""
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


def _per_row_timestep(value: object, batch: int) -> Tensor:
    """Timestep with a batch axis: a scalar becomes the same value for every row."""
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else torch.int64)
    return value.reshape(1).expand(batch) if value.numel() == 1 else value


def _timestep_values(timestep: object, batch: int, call: int) -> list[float]:
    """One number per row: the largest of a row's entries, or the call's number where there is no timestep."""
    if not isinstance(timestep, Tensor):
        return [float(call)] * batch
    if len(timestep) != batch:
        return [float(timestep.max())] * batch
    return timestep.reshape(batch, -1).amax(1).double().tolist()


def _encode(value: object, name: str, leaves: list[tuple[str, Tensor]]) -> dict[str, object]:
    """JSON form of an argument; tensors go to `leaves` and leave their place in it."""
    if isinstance(value, Tensor):
        leaves.append((name, value))
        return {"tensor": len(leaves) - 1}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(entry, name, leaves) for entry in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(entry, key, leaves) for key, entry in value.items()}}
    raise ValueError(
        "a denoiser's arguments must be tensors, numbers, strings, None, or lists, tuples, dicts of them, "
        f"got {type(value).__name__} in '{name}'; wrap the denoiser in a module that builds it itself"
    )


def _decode(node: Mapping[str, Any], tensors: Sequence[Tensor]) -> object:
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(entry, tensors) for key, entry in content.items()}
    if kind in ("list", "tuple"):
        entries = [_decode(entry, tensors) for entry in content]
        return entries if kind == "list" else tuple(entries)
    return content


def merge(rows: Sequence[Row], read: Callable[[str], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Join rows into one call `(args, kwargs)`; `read` returns the tensor of a content hash.

    Raises:
        ValueError: Rows differ in something that has no batch axis, or in the shape of what has one.
    """
    template = json.loads(rows[0].template)
    for row in rows:
        if row.template != rows[0].template:
            mine, other = template["arguments"], json.loads(row.template)["arguments"]
            names = [name for name in mine | other if mine.get(name) != other.get(name)]
            _refuse_merge(f"different values or structure of {names or list(other)}")
    tensors = []
    for leaf, split in enumerate(template["per_row"]):
        keys = [row.leaves[leaf] for row in rows]
        if not split:
            if len(set(keys)) > 1:
                _refuse_merge(f"different contents of tensor {leaf} of the call, which has no batch axis")
            tensors.append(read(keys[0]).clone())
            continue
        pieces = [read(key) for key in keys]
        shapes = {(tuple(piece.shape), piece.dtype) for piece in pieces}
        if len(shapes) > 1:
            _refuse_merge(f"a tensor with {sorted(map(str, shapes))}")
        tensors.append(torch.cat(pieces))
    values = {name: _decode(node, tensors) for name, node in template["arguments"].items()}
    names = list(values)
    count = template["positional"]
    return tuple(values[name] for name in names[:count]), {name: values[name] for name in names[count:]}


def _refuse_merge(difference: str) -> None:
    raise ValueError(
        f"rows merged into one denoiser call must agree in all that has no batch axis, got {difference}; "
        "merge fewer rows, or calibrate with one picture size and one prompt length"
    )


def first_tensor(output: object) -> Tensor:
    """First tensor of a denoiser's output: itself, or of a tuple, list, dict or diffusers output."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)) and output:
        return first_tensor(output[0])
    raise ValueError(
        "a denoiser must return a tensor, or a tuple, list or dict that starts with one, "
        f"got {type(output).__name__}; wrap it in a module that does"
    )
