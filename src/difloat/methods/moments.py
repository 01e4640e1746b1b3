"""Second moments of layers' inputs: the mean of ``x x^T``, with x rounded as the layer rounds its input.

Inputs come from the float model, which runs as it is while hooks look on. No activation is kept. Vectors are drawn from every
call, added to the matrix of their layer, and let go. Layers that read the same tensor and round it alike, such as query, key
and value, share a matrix. As many matrices are filled at a time as memory allows, while the calls wait behind their layers.

A convolution multiplies its rows with patches. The moments of whole patches, [i * kh * kw] squared, are taken up to a limit of
bytes. Beyond it the moments of its input channels are taken, which ignore how the taps of a patch go together.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from difloat.calibration.batch_axis import rows_of
from difloat.kernels import reference, rotation
from difloat.layers import packed
from difloat.methods import held_tensors, malloc_trim, trace
from difloat.methods.mixed_rows import input_vectors
from difloat.methods.paused_forwards import Passes
from difloat.methods.trace import Call, removed
from difloat.plan.plan import LayerPlan

_PIECE_BYTES = 1 << 26  # of vectors multiplied at a time
_TILE = 1024  # columns of a product of which one half is left out


@dataclass(frozen=True)
class MomentSettings:
    """How many vectors are gathered, and the memory that this may take.

    Attributes:
        fewest: The fewest vectors per layer. Four times the columns of its matrix are drawn, within the limits.
        most: The most vectors per layer.
        patch_bytes: The most bytes of the matrices of one convolution's patches. A larger one is known by its channels.
        memory_bytes: The most bytes of the matrices filled at a time. A single layer's may take more.
        seed: The seed of the draw.
    """

    fewest: int = 8192
    most: int = 16384
    patch_bytes: int = 64 << 20
    memory_bytes: int = 1 << 30
    seed: int = 0


@dataclass(frozen=True)
class Source:
    """One distinct input.

    Attributes:
        names: The layers that read it, in the order of their first call.
        groups: How many matrices it has, which is one but for grouped convolutions.
        columns: How many columns each matrix has.
        patches: Whether a convolution's columns are the entries of a patch instead of its channels.
        wanted: How many vectors are drawn.
        held: The bytes that a call of the model holds when the first layer has read the input.
    """

    names: tuple[str, ...]
    groups: int
    columns: int
    patches: bool
    wanted: int
    held: int = field(default=0, compare=False)

    @property
    def nbytes(self) -> int:
        """The bytes of the matrices."""
        return 4 * self.groups * self.columns**2


@dataclass(frozen=True)
class Moments:
    """The moments of one input.

    Attributes:
        source: The input.
        matrix: float32 [groups, n, n], the mean of ``x x^T``.
        vectors: How many x the mean is taken over. With fewer than n of them the matrix is singular.
    """

    source: Source
    matrix: Tensor = field(repr=False)
    vectors: int


def sources(
    model: nn.Module, call: Call, plans: Mapping[str, LayerPlan], settings: MomentSettings
) -> list[Source]:
    """The distinct inputs of the layers of `plans`, in the order of execution, found by one call of the model.

    Raises:
        ValueError: if the model does not call one of the layers, or the input of one is smoothed or rounded by timestep.
    """
    for name, plan in plans.items():
        if plan.smoothed or plan.input_schedule:
            raise ValueError(
                f"inputs of layer {name!r} must be rounded alike at all timesteps and not smoothed, got a plan with factors "
                "or a schedule; choose a recipe without them"
            )
    seen: dict[str, list[tuple[int, int]]] = {}
    serial, serials = itertools.count(), WeakTensorKeyDictionary()

    def look(name: str, layer: nn.Module, x: Tensor) -> None:
        if x not in serials:
            serials[x] = next(serial)
        seen.setdefault(name, []).append((serials[x], x._version))

    held: dict[str, int] = {}
    with removed(held_tensors.watch(model, plans, held)):
        _run(model, [call], {name: look for name in plans})
    if missing := [name for name in plans if name not in seen]:
        raise ValueError(
            f"layer {missing[0]!r} must be called by the model's forward, but a pass did not reach it"
        )
    readers: dict[Any, list[str]] = {}
    for name in seen:
        readers.setdefault((*seen[name], *_reading(model.get_submodule(name), plans[name])), []).append(name)
    return [_source(model, names, settings, held[names[0]]) for names in readers.values()]


def _reading(layer: nn.Module, plan: LayerPlan) -> tuple[Any, ...]:
    """A key of what a layer does with its input before it multiplies, by which layers are compared."""
    rounding = tuple((part.channels, part.activation) for part in plan.parts if part.activation is not None)
    stored = tuple(
        tuple(None if number is None else float(number) for number in (inputs.scale, inputs.zero_point))
        for inputs in plan.layout.stored_inputs(plan.tensors)
    )
    geometry: tuple[Any, ...] = ()
    if isinstance(layer, nn.Conv2d):
        padding = (str(layer.padding), layer.padding_mode)
        geometry = (layer.kernel_size, layer.stride, layer.dilation, layer.groups, *padding)
    return rounding, stored if rounding else (), geometry, plan.rotation


def _source(model: nn.Module, names: Sequence[str], settings: MomentSettings, held: int) -> Source:
    layer, channels = model.get_submodule(names[0]), packed.weight_of(model, names[0]).shape[1]
    groups, taps = 1, 1
    if isinstance(layer, nn.Conv2d):
        groups, taps = layer.groups, math.prod(layer.kernel_size)
    patches = taps > 1 and 4 * groups * (channels * taps) ** 2 <= settings.patch_bytes
    columns = channels * taps if patches else channels
    wanted = max(settings.fewest, min(settings.most, 4 * columns))
    return Source(tuple(names), groups, columns, patches, wanted, held)


def passes(found: Sequence[Source], memory_bytes: int) -> list[list[Source]]:
    """The inputs that are gathered together, in the order of execution.

    The matrices of a run of inputs, of one at least, fit into memory. Between two runs calls wait for each other. So a run ends
    where a call holds least, among those ends that leave at least half of the memory filled which the longest run would fill.
    """
    result: list[list[Source]] = []
    start = 0
    while start < len(found):
        filled = list(itertools.accumulate(source.nbytes for source in found[start:]))
        longest = max(1, sum(size <= memory_bytes for size in filled))
        ends = [n for n in range(1, longest + 1) if 2 * filled[n - 1] >= filled[longest - 1]]
        if start + longest == len(found):
            ends = [longest]
        end = start + min(ends, key=lambda n: (found[start + n - 1].held, -n))
        result.append(list(found[start:end]))
        start = end
    return result


def cost(found: Sequence[Source], settings: MomentSettings) -> dict[str, int]:
    """The cost of gathering.

    Returns:
        The numbers of layers, of distinct inputs and of times that matrices are filled (passes), the bytes of all matrices and
        of those held at once, and the most multiplications besides the model's own.
    """
    together = passes(found, settings.memory_bytes)
    return {
        "layers": sum(len(source.names) for source in found),
        "inputs": len(found),
        "passes": len(together),
        "bytes": sum(source.nbytes for source in found),
        "bytes_at_once": max((sum(source.nbytes for source in some) for some in together), default=0),
        "multiplications": sum(source.wanted * source.groups * source.columns**2 for source in found),
    }


def gather(
    model: nn.Module,
    calls: Sequence[Call],
    plans: Mapping[str, LayerPlan],
    settings: MomentSettings,
    found: Sequence[Source] | None = None,
) -> Generator[Moments]:
    """Moments of the inputs of layers, one distinct input after the other, in the order of execution.

    Every call runs once. Where memory does not hold all matrices, the calls wait together behind the layers whose matrices are
    filled until these are used. Which vectors are drawn depends on the seed, the layer and the calls alone. Products are
    computed in float32, on accelerators whatever `torch` is set to.

    Args:
        model: The float denoiser.
        calls: The calls with calibration rows.
        plans: The layers with the rounding of their inputs. Weights are not looked at.
        settings: How many vectors are gathered, and the memory that this may take.
        found: The result of `sources`, if it was asked before.

    Raises:
        ValueError: if `sources` refuses the model, there are no calls, or an input is not finite (the layer is named).
    """
    if not calls:
        raise ValueError("moments must be gathered from at least one calibration row, got none; collect some")
    found = sources(model, calls[0], plans, settings) if found is None else found
    rows = sum(rows_of(*call) for call in calls)
    shares = [rows_of(*call) / rows for call in calls]
    seeds = {source.names[0]: settings.seed + zlib.crc32(source.names[0].encode()) for source in found}
    stages = passes(found, settings.memory_bytes)
    with Passes(model, calls) if len(stages) > 1 else nullcontext() as held:
        for together in stages:
            sums = {s.names[0]: _Sum(s, plans[s.names[0]], seeds[s.names[0]]) for s in together}
            # Every call gives its share, so that all timesteps are in the mean.
            begin = partial(_share_out, sums, shares)
            look = {name: one.look for name, one in sums.items()}
            if held is None:
                for number, call in enumerate(calls):
                    begin(number)
                    _run(model, [call], look)
            else:
                with removed(_looking(model, look)):
                    held.past(together[-1].names[0], begin)
            while sums:
                yield sums.pop(next(iter(sums))).mean()


def _share_out(sums: Mapping[str, _Sum], shares: Sequence[float], number: int) -> None:
    """Let a call give its share of the vectors."""
    # Calls that wait have a thread each, and glibc keeps freed memory apart for every one of them.
    malloc_trim.release()
    for one in sums.values():
        one.left = math.ceil(one.source.wanted * shares[number])


class _Sum:
    """The sum of ``x x^T`` of one input, while calls run."""

    def __init__(self, source: Source, plan: LayerPlan, seed: int) -> None:
        self.source, self._plan = source, plan
        self.left = 0  # vectors still to be drawn from the call that runs
        self._draw = torch.Generator().manual_seed(seed)
        self._matrix: Tensor | None = None
        self._vectors = 0

    def look(self, name: str, layer: nn.Module, x: Tensor) -> None:
        """Add vectors of an input. A layer that is called several times gives them from its first call on."""
        if not x.numel() or not self.left:
            return
        source = self.source
        x = x if x.dim() > 1 else x[None]
        # In pieces, since the vectors of a whole input may take many times its own memory.
        pieces = x.chunk(math.ceil(4 * self.left * source.groups * source.columns / _PIECE_BYTES))
        for piece, still in zip(pieces, range(len(pieces), 0, -1), strict=True):
            # Whole rows are rounded before vectors are drawn, because an online scale is that of a whole token.
            rounded = rounded_input(piece.detach(), self._plan)
            count = math.ceil(self.left / still)
            vectors = self._vectors_of(layer, rounded, count)
            product = _product(vectors)
            # What is not finite in a column is not finite in the sum of its squares.
            if not product.diagonal(dim1=1, dim2=2).isfinite().all():
                raise ValueError(
                    f"inputs must be finite, got NaN or Inf in layer {name!r}; check the calibration and the model"
                )
            self._matrix = product if self._matrix is None else self._matrix.add_(product)
            self._vectors += vectors.shape[1]
            self.left -= vectors.shape[1]

    def _vectors_of(self, layer: nn.Module, x: Tensor, count: int) -> Tensor:
        if not isinstance(layer, nn.Conv2d) or self.source.patches or max(layer.kernel_size) == 1:
            return input_vectors(layer, x, count, self._draw)
        pixels = x.movedim(1, -1).flatten(0, 2)  # [b * h * w, i]
        chosen = torch.randperm(len(pixels), generator=self._draw)[:count].to(x.device)  # without repeats
        return pixels[chosen].float().unflatten(1, (layer.groups, -1)).transpose(0, 1)

    def mean(self) -> Moments:
        if self._matrix is None:
            raise ValueError(
                f"layer {self.source.names[0]!r} must be fed something, got inputs without entries"
            )
        return Moments(self.source, self._matrix.div_(self._vectors), self._vectors)


def _product(vectors: Tensor) -> Tensor:
    """``sum x x^T`` [groups, d, d] of vectors [groups, n, d], in float32 and without TF32 on an accelerator."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        columns = vectors.shape[2]
        if columns <= 2 * _TILE:
            return vectors.mT @ vectors
        product = vectors.new_empty(len(vectors), columns, columns)
        for start in range(0, columns, _TILE):  # one half is the mirror image of the other
            own, others = slice(start, start + _TILE), slice(start + _TILE, columns)
            product[:, own, start:] = vectors[:, :, own].mT @ vectors[:, :, start:]
            product[:, others, own] = product[:, own, others].mT
        return product
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def rounded_input(x: Tensor, plan: LayerPlan) -> Tensor:
    """The input [..., i] or [b, i, h, w] as the layer multiplies it, rotated and rounded, in float32."""
    if plan.rotation is not None:
        x = rotation.rotate(x.float(), plan.rotation)
    axis = -1 if plan.kind == "linear" else 1
    inputs = plan.layout.stored_inputs(plan.tensors)
    if plan.kind == "linear":
        shape, x = x.shape, x.reshape(-1, x.shape[-1])  # four axes would count as a picture
    # A grouped convolution reads more channels than its one part says.
    pieces = [x] if len(plan.parts) == 1 else x.split([part.channels for part in plan.parts], dim=axis)
    rounded = [
        reference.round_input(piece.float(), own.scale, own.zero_point, part)
        for piece, own, part in zip(pieces, inputs, plan.parts, strict=True)
    ]
    joined = rounded[0] if len(rounded) == 1 else torch.cat(rounded, dim=axis)
    return joined.reshape(shape) if plan.kind == "linear" else joined


def _run(
    model: nn.Module, calls: Sequence[Call], look: Mapping[str, Callable[[str, nn.Module, Tensor], None]]
) -> None:
    """Run calls, and show the inputs of the named layers to their functions first."""
    with removed(_looking(model, look)), torch.no_grad():
        for args, kwargs in calls:
            model(*args, **kwargs)


def _looking(
    model: nn.Module, look: Mapping[str, Callable[[str, nn.Module, Tensor], None]]
) -> list[RemovableHandle]:
    def hook_for(name: str) -> Callable[[nn.Module, Tensor], None]:
        return lambda layer, x: look[name](name, layer, x)

    return [trace.before_call(model.get_submodule(name), hook_for(name)) for name in look]
