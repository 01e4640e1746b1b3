"""Captured denoiser calls, cut into rows that can be merged again into a call of any batch size.

The arguments of a call are nested tuples, lists and dicts of tensors, numbers, strings and None. Its *rows* are the entries
of the batch axis. Every tensor of a row is stored once, under a hash of its content. So a text embedding that a sampler
passes at every step, or an empty prompt that every picture shares, costs its bytes once.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from difloat import devices
from difloat.calibration.batch_axis import (
    SHARED_NAMES,
    cut,
    decode,
    encode,
    entries_per_row,
    first_tensor,
    numbers_in,
    own_entries,
    per_row_timestep,
    sample_of,
    timestep_name,
    timestep_values,
)
from difloat.calibration.pace import Pace
from difloat.calibration.trajectory import Course
from difloat.plan.validation import LISTED, record

__all__ = [
    "MAX_TIMESTEPS",
    "SHARED_NAMES",
    "Recorder",
    "Row",
    "content_hash",
    "first_tensor",
    "merge",
    "recording",
    "stratified_indices",
]

# A recording keeps one row of each of up to this many timesteps, whatever its limit, so that thinning it
# while the sampler still runs cannot empty the early part of a trajectory.
MAX_TIMESTEPS = 1024


@record("calibration row")
class Row:
    """One entry of the batch axis of one call.

    Attributes:
        timestep: The sampler's timestep in its own unit, or the number of the call if the call has no timestep.
        part: The block of the batch that the row comes from: 0 or 1 with classifier-free guidance, otherwise 0.
        template: The JSON of the call's structure, with everything in it that is no tensor.
        leaves: The content hash of every tensor, in the template's order.
        trajectory: The trajectory that the row is a point of, the same for all parts, or "" if that is not known.
        step: The step of the trajectory.
    """

    timestep: float
    part: int
    template: str
    leaves: Annotated[tuple[str, ...], LISTED]
    trajectory: str = ""
    step: int = 0


def content_hash(tensor: Tensor) -> str:
    """A hash of the dtype, shape and bytes of a CPU tensor."""
    digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    # Expanded tensors of one element keep stride 0 and still count as contiguous; only a clone clears that.
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def stratified_indices(rows: Sequence[Row], count: int, generator: torch.Generator) -> list[int]:
    """Numbers of rows, ascending and without repeats, spread evenly over timesteps and, among equals, over parts.

    Every timestep gets the same number of rows, as far as it has them. A remainder goes to timesteps at equal distances from a
    random start. Rows of one timestep and part are chosen at random. In all parts they are those of the same trajectories, so
    that guidance can be computed from them.
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
    """A forward pre-hook (`with_kwargs=True`) that keeps rows of a denoiser's calls, evenly over timesteps.

    It holds at most twice its limit of rows on the CPU (or one row per timestep if that is more), plus one call. In the end
    they are thinned to the limit by its generator.
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
        """Prepare for calls of a module.

        Args:
            module: The denoiser.
            limit: How many rows are kept in the end.
            generator: The generator that chooses them.
            images: How many pictures a call samples at once, or None if that is not known, which makes no parts.
            on_call: A function that is called after every call.
            trajectories: The beginning of the trajectories' names, or None if the calls follow no trajectory.
        """
        self.rows: list[Row] = []
        self.blobs: dict[str, Tensor] = {}
        self.calls = 0
        self.pace = Pace()
        self._newest: tuple[float, int] | None = None  # when the newest call began, and its rows
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
        self._numbers: dict[str, float] = {}  # Python numbers of the call before, where no timestep is known

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the rows of one call."""
        # Tensors made in inference mode can never enter autograd, so the copies are made outside of it.
        with torch.inference_mode(False), torch.no_grad():
            count = self._take(args, kwargs)
        self.calls += 1
        self._time(count)
        if len(self.rows) > 2 * self._capacity():
            self.thin()
        if self._on_call is not None:
            self._on_call()

    def _time(self, count: int) -> None:
        """Note that a call of `count` rows begins, which ends the time of the call before it."""
        now = time.perf_counter()  # a GPU has been waited for: the call's tensors were copied from it
        pace, newest = self.pace, self._newest
        seconds, timed = (0.0, 0) if newest is None else (now - newest[0], newest[1])
        pictures = self._images or 0
        self.pace = Pace(pace.seconds + seconds, pace.timed + timed, pace.computed + count, pictures)
        self._newest = now, count

    def _capacity(self) -> int:
        return max(self._limit, min(len({row.timestep for row in self.rows}), MAX_TIMESTEPS))

    def thin(self) -> None:
        """Drop rows above the limit, and the tensors that no row needs any more."""
        keep = stratified_indices(self.rows, self._capacity(), self._generator)
        self.rows = [self.rows[index] for index in keep]
        needed = {leaf for row in self.rows for leaf in row.leaves}
        self.blobs = {key: blob for key, blob in self.blobs.items() if key in needed}

    def _take(self, args: tuple[Any, ...], kwargs: Mapping[str, object]) -> int:
        """Keep the rows of one call, and return their number."""
        names = self._names + [f"argument {index}" for index in range(len(self._names), len(args))]
        named = dict(zip(names, args, strict=False)) | dict(kwargs)
        sample_name, batch = sample_of(named)
        in_lists = not isinstance(named[sample_name], Tensor)
        timestep = timestep_name(named, sample_name, batch)
        if timestep is None:
            self._check_numbers(numbers_in(named))
        else:
            named[timestep] = per_row_timestep(named[timestep], batch)
            _check_timestep(timestep, named[timestep], batch, in_lists)
        values = timestep_values(named[timestep] if timestep else None, batch, self.calls)
        calls = [
            {name: cut(value, batch, row) for name, value in named.items()} if in_lists else named
            for row in range(batch if in_lists else 1)
        ]
        encoded = [_encoded(call, len(args), batch) for call in calls]
        # Refused before any row is kept, so that a broken call leaves the recording as it was.
        for name, tensor, _ in (leaf for _, leaves, _ in encoded for leaf in leaves):
            self._check_finite(name, tensor, values[0])
        stored: dict[int, str] = {}  # of tensors that all rows share
        self._course.advance(values[0], batch)
        parts = batch // self._images if self._images and batch % self._images == 0 else 1
        for index in range(batch):
            template, leaves, per_row = encoded[index if in_lists else 0]
            keys = tuple(
                self._store_once(tensor, stored)
                if not split or split == "listed"
                else self._store(own_entries(tensor, split, index))
                for (_, tensor, _), split in zip(leaves, per_row, strict=True)
            )
            # Samplers that guide by two calls per step show the same timestep again: that is the other part.
            part = index * parts // batch if parts > 1 else self._seen[values[0]] if self._images else 0
            self.rows.append(Row(values[index], part, template, keys, *self._point(index)))
        self._seen[values[0]] += 1
        return batch

    def _point(self, index: int) -> tuple[str, int]:
        """The trajectory and step of an entry of the current call."""
        if self._trajectories is None:
            return "", 0
        name, course = f"{self._trajectories}/{self._course.passes}", self._course
        # A second call in a step, or a second row in a batch, is another part of the same picture.
        if self._images:
            return f"{name}/{index % self._images}", course.step
        return f"{name}/{course.repeat}/{index}", course.step

    def _check_finite(self, name: str, tensor: Tensor, timestep: float) -> None:
        # An additive attention mask may hold -inf on purpose.
        if tensor.is_floating_point() and "mask" not in name and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"calibration data must be finite, got NaN or infinity in '{name}' at timestep {timestep:g} "
                f"(denoiser call {self.calls}); sample in float32 or bfloat16 and check the model's weights"
            )

    def _check_numbers(self, numbers: dict[str, float]) -> None:
        """Refuse a call without a timestep if one of its numbers changed since the call before, which makes it the timestep."""
        for name, value in numbers.items():
            if name in self._numbers and self._numbers[name] != value:
                raise ValueError(
                    "a denoiser must be given its timestep as a tensor, or in an argument called timestep, t, sigma or the "
                    f"like, got the Python numbers {self._numbers[name]!r} and {value!r} in '{name}'; pass "
                    f"torch.tensor({name}) in the sampling loop, or rename the argument"
                )
        self._numbers = numbers

    def _store_once(self, tensor: Tensor, stored: dict[int, str]) -> str:
        if id(tensor) not in stored:
            stored[id(tensor)] = self._store(tensor)
        return stored[id(tensor)]

    def _store(self, tensor: Tensor) -> str:
        # A view would keep the whole batch in memory as long as one of its rows.
        copy = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        key = content_hash(copy)
        self.blobs.setdefault(key, copy)
        return key


def _check_timestep(name: str, timestep: Tensor, batch: int, in_lists: bool) -> None:
    """Refuse a list as batch axis if the timestep has another number of entries."""
    if in_lists and timestep.ndim > 0 and len(timestep) != batch:
        raise ValueError(
            "a list of tensors as a denoiser's sample must hold one tensor per row of the batch, got a list of "
            f"{batch} and {len(timestep)} entries in '{name}'; pass the noisy sample as one tensor [batch, ...] first"
        )


def _encoded(
    named: Mapping[str, object], positional: int, batch: int
) -> tuple[str, list[tuple[str, Tensor, bool]], list[bool | str | int]]:
    """A call as JSON, its tensors, and how many entries of each a row has.

    The last is a number, "listed" for a tensor of a list, or False for a tensor that all rows share.
    """
    leaves: list[tuple[str, Tensor, bool]] = []
    nodes = {name: encode(value, name, leaves) for name, value in named.items()}
    per_row: list[bool | str | int] = [
        "listed" if listed else entries_per_row(name, tensor, batch) for name, tensor, listed in leaves
    ]
    return json.dumps({"positional": positional, "per_row": per_row, "arguments": nodes}), leaves, per_row


@contextmanager
def recording(module: nn.Module, hook: Callable[..., None], seed: int) -> Iterator[None]:
    """Show a module's calls to a hook inside a ``with`` block, without gradients, with torch's random state seeded there."""
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad(), devices.seeded(devices.home(module), seed):
            yield
    finally:
        handle.remove()


def merge(rows: Sequence[Row], read: Callable[[str], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Join rows into one call `(args, kwargs)`.

    Rows of a denoiser that takes lists, with one tensor per picture, may have different sizes.

    Args:
        rows: The rows.
        read: A function that returns the tensor of a content hash.

    Raises:
        ValueError: if rows differ in something that has no batch axis, or in the shape of what has one.
    """
    template = json.loads(rows[0].template)
    for row in rows:
        if row.template != rows[0].template:
            mine, other = template["arguments"], json.loads(row.template)["arguments"]
            names = [name for name in mine | other if mine.get(name) != other.get(name)]
            numbers = [name for name in names if isinstance(mine.get(name, {}).get("value"), (int, float))]
            if numbers:
                raise ValueError(
                    "what changes along the trajectory must be a tensor with one entry per row, got different numbers "
                    f"in {numbers}; pass them as [batch] tensors in the sampling loop"
                )
            _refuse_merge(f"different values or structure of {names or list(other)}")
    tensors: list[Any] = []
    for leaf, split in enumerate(template["per_row"]):
        keys = [row.leaves[leaf] for row in rows]
        if split == "listed":
            tensors.append([read(key).clone() for key in keys])
            continue
        if not split:
            if len(set(keys)) > 1:
                _refuse_merge(f"different contents of tensor {leaf} of the call, which has no batch axis")
            tensors.append(read(keys[0]).clone())
            continue
        pieces = [read(key) for key in keys]
        shapes = {(tuple(piece.shape), piece.dtype) for piece in pieces}
        if len(shapes) > 1:
            _refuse_merge(f"a tensor with {sorted(map(str, shapes))}")
        tensors.append(torch.cat(pieces, int(split == "second")))
    values = {name: decode(node, tensors, len(rows)) for name, node in template["arguments"].items()}
    names = list(values)
    count = template["positional"]
    return tuple(values[name] for name in names[:count]), {name: values[name] for name in names[count:]}


def _refuse_merge(difference: str) -> None:
    raise ValueError(
        f"rows merged into one denoiser call must agree in all that has no batch axis, got {difference}; "
        "merge fewer rows, or calibrate with one picture size and one prompt length"
    )
