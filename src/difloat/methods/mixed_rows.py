"""The choice of output rows that get one bit more and one bit less: MPQ-DM's OMQ (arXiv:2412.11549).

Input channels are scaled first, by ``t_i = sqrt(max|X_i| / max|W_i|)`` in ``X W^T = (X / t) (W t)^T``. Rows are sorted by the
kurtosis of the scaled weight. For a number n the first n rows get N + 1 bits, the last n rows N - 1 bits, and the rest N bits,
which are N bits on average. n is the number with the lowest error of the layer's output on calibration inputs.

A row's output error ``|X (q(w) - w)|^2`` depends on its own width only. So every row is rounded at three widths, and the three
errors of all rows are measured once on held input vectors. The error of every n is then a sum over prefixes of the sorted rows,
so all n together cost one pass. (A Gram matrix X^T X would do the same, but costs more as soon as a row has more weights than
the layer has rows, as in every 3x3 convolution.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from difloat import distributed
from difloat.calibration.batch_axis import rows_of
from difloat.layers import packed
from difloat.methods import trace
from difloat.methods.task import MixedRows, Smoothing, Task
from difloat.methods.trace import Call, removed
from difloat.plan import encode
from difloat.plan.rules import Rule, draft_layer
from difloat.plan.target import restrict

Criterion = Literal["kurtosis", "magnitude", "error", "random"]
TENTH = 10  # rows are moved in tenths of a layer
_MOST_BITS = 8
_REACH = 1e3  # factors stay within this of their median: half precision must hold them, and unseen inputs must not explode
_VECTORS = 2048  # of a layer's input that output errors are measured on
_LAYER_BYTES = 1 << 26  # of one layer's input vectors
HELD_SHARE = 2  # the vectors of the layers of one pass take half of the memory for activations


@dataclass(frozen=True)
class AllocationSettings:
    """How rows are chosen.

    Attributes:
        criterion: What rows are sorted by, from the one most in need of bits: "kurtosis" of the scaled weight, "magnitude" its
            mean square, "error" what two bits more save of the row's output error, "random" nothing.
        candidates: "range" tries 0, k, 2k, ... up to half of the rows, k a tenth of them; "release" only 0 and k.
        extra_tenth: The k rows behind the first n get N + 1 bits as well (MPQ-DM+): N + 0.1 bits on average.
        scale_inputs: Scale input channels first, but for grouped convolutions.
        rows: Calibration rows to look at.
    """

    criterion: Criterion = "kurtosis"
    candidates: Literal["range", "release"] = "range"
    extra_tenth: bool = False
    scale_inputs: bool = True
    rows: int = 64


@dataclass(frozen=True)
class Allocation:
    """The widths of the rows of one layer.

    Attributes:
        mixed: The rows by width, or None where all rows get the same.
        smoothing: The factors of the input channels, or None.
        bits: The average width of the weight's codes.
        moved: n, which is the number of rows with one bit less.
        error: The squared error of the layer's output, relative to n = 0 with the same scales and all rows alike.
    """

    mixed: MixedRows | None = field(repr=False)
    smoothing: Smoothing | None = field(repr=False)
    bits: float
    moved: int
    error: float


def input_scale(largest_input: Tensor, weight: Tensor) -> Tensor:
    """The t_i of every input channel, float32 [i], positive and within a factor of 1000 of their median.

    A channel without input, or without weights, has no t_i of its own and gets the median (1 if all are dead).

    Args:
        largest_input: The largest magnitude of every input channel, [i].
        weight: The float weight [o, i, *k].
    """
    largest_weight = weight.detach().float().abs().transpose(0, 1).flatten(1).amax(1)  # [i]
    live = (largest_input > 0) & (largest_weight > 0)
    if not live.any():
        return torch.ones_like(largest_weight)
    factors = (
        largest_input.double() / largest_weight.where(live, torch.ones_like(largest_weight)).double()
    ).sqrt()
    median = factors[live].median()
    return factors.where(live, median).clamp(median / _REACH, median * _REACH).float()


def kurtosis(weight: Tensor) -> Tensor:
    """``mean((w - mean)^4) / std^4`` of every row, float64 [o], with the unbiased std. It is 0 for a row of equal values."""
    rows = weight.detach().double().flatten(1)  # [o, i * k]
    centred = rows - rows.mean(1, keepdim=True)
    # Kurtosis has no unit, so rows are scaled first: the fourth power of 1e-100 is no number any more.
    centred = centred / _largest(centred)
    variance = centred.square().sum(1) / max(1, rows.shape[1] - 1)  # [o]
    fourth = centred.square().square().mean(1)
    return torch.where(variance > 0, fourth / variance.square().clamp_min(1e-300), 0.0)


def _largest(rows: Tensor) -> Tensor:
    """The largest magnitude of every row, [o, 1], or 1 for a row of zeros."""
    largest = rows.abs().amax(1, keepdim=True)
    return largest.where(largest > 0, torch.ones_like(largest))


@dataclass(frozen=True)
class Choice:
    """The rows of one layer in the order of their need, and how many of them are moved.

    Attributes:
        order: int64 [o], the rows from the one most in need of bits.
        moved: n, which is how many of the last rows have one bit less.
        raised: How many of the first rows have one bit more.
        errors: The error of the whole output for every candidate n.
    """

    order: Tensor
    moved: int
    raised: int
    errors: dict[int, float]


def choose(
    score: Tensor, errors: Sequence[Tensor], *, only_one_step: bool = False, extra_tenth: bool = False
) -> Choice:
    """Sort rows and find the number to move.

    Args:
        score: The need of every row, [o].
        errors: The output error of every row with one bit less, as many bits, and one bit more, [o] each.
        only_one_step: Whether to try only 0 and one tenth of the rows.
        extra_tenth: Whether to raise one tenth more rows than are lowered.

    Returns:
        The choice with the lowest error, or of equals the one that moves least.
    """
    count = len(score)
    step = max(1, count // TENTH)
    extra = count // TENTH if extra_tenth else 0
    order = score.argsort(descending=True, stable=True)  # [o]
    less, same, more = (error.double()[order] for error in errors)
    zero = same.new_zeros(1)
    saved = torch.cat([zero, (same - more).cumsum(0)])  # by raising the first n
    paid = torch.cat([zero, (less - same).flip(0).cumsum(0)])  # for lowering the last n
    most = (count - extra) // 2
    tried = range(0, min(most, step if only_one_step else most) + 1, step)
    totals = {n: float(same.sum() - saved[n + extra] + paid[n]) for n in tried}
    moved = min(totals, key=lambda n: (totals[n], n))
    return Choice(order, moved, moved + extra, totals)


def allocate(
    task: Task, rule_of: Callable[[int], Rule], settings: AllocationSettings
) -> dict[str, Allocation]:
    """Decide the widths of the rows of every layer that the model calls and the user does not exclude.

    In a launch of several processes the main one decides, and the others wait for it.

    Args:
        task: Model, data, N.
        rule_of: What is asked of a weight of so many bits, rows apart; of its formats those that fit the task's target.
        settings: How widths are chosen.
    """
    return distributed.on_main(
        lambda: _allocate(task, lambda bits: restrict(rule_of(bits), task.target), settings)
    )


def _allocate(
    task: Task, rule_of: Callable[[int], Rule], settings: AllocationSettings
) -> dict[str, Allocation]:
    generator = torch.Generator().manual_seed(task.seed)
    rows = task.calibration.stratified(min(settings.rows, len(task.calibration)), generator)
    seen = trace.trace(task.model, task.calibration.batch(rows[:2]))
    names = [
        name
        for name in seen.order
        if (task.only is None or name in task.only) and name not in task.exclude.names
    ]
    calls = task.calls(rows, seen.row_bytes)
    largest = trace.channel_maxima(task.model, names, calls) if settings.scale_inputs else {}
    bits, found = task.bits.weight, {}
    held = _held_inputs(task, names, calls)
    for name, inputs in tqdm(held, desc="choose widths", total=len(names), disable=not task.progress):
        weight = packed.weight_of(task.model, name).detach().float()
        scale, smoothing = torch.ones(weight.shape[1], device=weight.device), None
        if name in largest and largest[name].numel() == len(scale):  # grouped convolutions read more channels
            scale = input_scale(largest[name].to(weight.device), weight)
            smoothing = Smoothing((1 / scale)[None])
        if bits >= _MOST_BITS:
            found[name] = Allocation(None, smoothing, bits, 0, 1.0)
            continue
        splits = list(seen.splits.get(name, ()))
        splits = splits if sum(splits) == weight.shape[1] else [weight.shape[1]]
        factor = scale.to(weight).reshape(1, -1, *[1] * (weight.dim() - 2))
        errors = []
        for width in (bits - 1, bits, bits + 1):
            rounded = encode.dequantize(draft_layer(weight * factor, splits, rule_of(width)).plan())
            errors.append(row_errors(rounded / factor - weight, inputs).cpu())
        need = _need(settings.criterion, weight * factor, errors, generator)
        one_step = settings.candidates == "release"
        choice = choose(need, errors, only_one_step=one_step, extra_tenth=settings.extra_tenth)
        found[name] = _allocation(choice, smoothing, bits, rule_of, settings.extra_tenth)
    return found


def _need(
    criterion: Criterion, weight: Tensor, errors: Sequence[Tensor], generator: torch.Generator
) -> Tensor:
    if criterion == "kurtosis":
        return kurtosis(weight).cpu()
    if criterion == "magnitude":
        return weight.flatten(1).double().square().mean(1).cpu()
    if criterion == "error":
        return errors[0] - errors[2]
    return torch.rand(len(weight), generator=generator)


def _allocation(
    choice: Choice,
    smoothing: Smoothing | None,
    bits: int,
    rule_of: Callable[[int], Rule],
    extra_tenth: bool,
) -> Allocation:
    rows = len(choice.order)
    counts = {
        bits + 1: choice.raised,
        bits: rows - choice.raised - choice.moved,
        bits - 1: choice.moved,
    }
    total = sum(width * count for width, count in counts.items())
    wanted = bits * rows + (rows // TENTH if extra_tenth else 0)
    assert total == wanted and min(counts.values()) >= 0, "the average width must be what was asked for"
    kept = {width: count for width, count in counts.items() if count}
    mixed = MixedRows(tuple(rule_of(width) for width in kept), tuple(kept.values()), choice.order)
    relative = choice.errors[choice.moved] / max(choice.errors[0], 1e-300)
    return Allocation(mixed, smoothing, total / rows, choice.moved, relative)


def summary(found: Mapping[str, Allocation]) -> dict[str, dict[str, float]]:
    """The average bits, moved rows and relative error of every layer, for `measured`."""
    return {name: {"bits": one.bits, "moved": one.moved, "error": one.error} for name, one in found.items()}


def row_errors(change: Tensor, inputs: Tensor) -> Tensor:
    """The squared error of every output channel that a change of the weight makes, float64 [o].

    Args:
        change: The change [o, i, *k] that is added to the weight.
        inputs: The input vectors [groups, n, d] of every group of the layer, which is one but for grouped convolutions.
    """
    rows = change.flatten(1).unflatten(0, (len(inputs), -1))  # [groups, o / groups, d]
    return (inputs.to(rows) @ rows.transpose(1, 2)).double().square().sum(1).flatten()


def _held_inputs(task: Task, names: Sequence[str], calls: Sequence[Call]) -> Iterator[tuple[str, Tensor]]:
    """The input vectors of every layer, float32 [groups, n, d], with as many layers per pass over `calls` as memory allows.

    The draw does not depend on the passes, since every layer draws its own vectors, call by call.
    """
    draws = {name: torch.Generator().manual_seed(task.seed + number) for number, name in enumerate(names)}
    rows = sum(rows_of(*call) for call in calls)
    waiting = list(names)
    while waiting:
        free, taken = task.memory_bytes // HELD_SHARE, dict[str, list[Tensor]]()
        wanted: dict[str, int] = {}
        while waiting and (not taken or free >= vectors_of(task.model, waiting[0])[1]):
            wanted[waiting[0]], size = vectors_of(task.model, waiting[0])
            taken[waiting.pop(0)] = []
            free -= size
        for call in calls:
            share = rows_of(*call) / rows
            counts = {name: max(1, math.ceil(count * share)) for name, count in wanted.items()}
            _listen(task.model, call, counts, taken, draws)
        for name in wanted:
            yield name, torch.cat(taken.pop(name), dim=1)


def vectors_of(model: nn.Module, name: str) -> tuple[int, int]:
    """How many input vectors of a layer are held, and their bytes."""
    layer = model.get_submodule(name)
    weight = packed.weight_of(model, name)
    vector_bytes = 4 * weight[0].numel() * getattr(layer, "groups", 1)
    count = max(1, min(_VECTORS, _LAYER_BYTES // vector_bytes))
    return count, count * vector_bytes


def _listen(
    model: nn.Module,
    call: Call,
    wanted: Mapping[str, int],
    taken: Mapping[str, list[Tensor]],
    draws: Mapping[str, torch.Generator],
) -> None:
    """Run one call and add so many input vectors of every layer to `taken`."""

    def hook_for(name: str) -> Callable[[nn.Module, Tensor], None]:
        def hook(module: nn.Module, x: Tensor) -> None:
            if not called[name]:
                called[name] = True
                taken[name].append(input_vectors(module, x.detach(), wanted[name], draws[name]))

        return hook

    called = dict.fromkeys(wanted, False)
    handles = [trace.before_call(model.get_submodule(name), hook_for(name)) for name in wanted]
    with removed(handles), torch.no_grad():
        model(*call[0], **call[1])


def input_vectors(layer: nn.Module, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Vectors that a layer multiplies its rows with, float32 [groups, n, d], drawn without repeats.

    Args:
        layer: A linear layer, or a convolution (padded with zeros, whatever its padding mode).
        x: The input of the layer, [..., i] or [b, i, h, w].
        count: The most vectors that are drawn.
        generator: The generator that draws them.
    """
    if not isinstance(layer, nn.Conv2d):
        flat = x.reshape(-1, x.shape[-1])  # [t, i]
        chosen = torch.randperm(len(flat), generator=generator)[:count]
        return flat[chosen.to(flat.device)].float()[None]
    x = nn.functional.pad(x, layer._reversed_padding_repeated_twice)
    windows = x
    for axis in (2, 3):
        reach = (layer.kernel_size[axis - 2] - 1) * layer.dilation[axis - 2] + 1
        windows = windows.unfold(axis, reach, layer.stride[axis - 2])
    windows = windows[..., :: layer.dilation[0], :: layer.dilation[1]]  # a view [b, i, h', w', kh, kw]
    pictures, _, height, width = windows.shape[:4]
    chosen = torch.randperm(pictures * height * width, generator=generator)[:count].to(x.device)
    place, column = chosen // width, chosen % width
    vectors = windows[place // height, :, place % height, column]  # [n, i, kh, kw]
    return vectors.float().unflatten(1, (layer.groups, -1)).flatten(2).transpose(0, 1)
