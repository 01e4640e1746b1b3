"""The sensitivity of the guided output to errors in each output channel of a layer.

With classifier-free guidance the sampler takes ``u + g (c - u)`` of the outputs without and with condition, so errors of both
halves of a pair count. A random projection of that, differentiated with respect to the outputs y of all layers, tells of all of
them at once. With independent signs r, the mean of ``(d (r . output) / d y)^2`` is the squared change of the output that an
independent error in y makes, per unit of that error's square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from difloat import torch_modes
from difloat.calibration.batch_axis import predict, samples_of
from difloat.layers import packed
from difloat.methods import malloc_trim
from difloat.methods.cost import WITH_GRADIENT
from difloat.methods.task import Task
from difloat.methods.trace import Call, removed
from difloat.methods.training.batches import guidance_pairs

_CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")  # what diffusers sets on modules
_KEPT = 4  # tensors for each that a layer gives: it, its copy, and what norms, activations and attention keep of it


@dataclass(frozen=True)
class SensitivitySettings:
    """How sensitivities are measured.

    Attributes:
        rows: How many calibration rows are taken, spread over timesteps. With guidance they come in pairs.
        rows_per_call: How many rows a forward and backward pass takes, which keeps all their activations.
        recompute: Whether blocks of a diffusers model run once more for their gradients instead of keeping all activations.
        probes: How many random projections of the output of every call are differentiated.
        guidance: The sampler's scale g, where rows come in pairs.
    """

    rows: int = 48
    rows_per_call: int = 8
    recompute: bool = False
    probes: int = 1
    guidance: float = 3.0


GRADIENT_ROWS = WITH_GRADIENT * SensitivitySettings.rows * SensitivitySettings.probes
"""What the gradients of the default settings cost, in rows of forward passes."""


@dataclass(frozen=True)
class Probe:
    """A call of the denoiser that is differentiated.

    Attributes:
        call: The arguments of the denoiser.
        weights: The weight of every row, or of every pair.
        paired: Whether rows come in pairs, with the one without condition first.
    """

    call: Call
    weights: tuple[float, ...]
    paired: bool


def probes_of(task: Task, settings: SensitivitySettings, weights: Mapping[float, float]) -> list[Probe]:
    """Calls with some of a task's calibration rows, in pairs where the sampler was guided.

    Args:
        task: The task with calibration rows.
        settings: How sensitivities are measured.
        weights: The weight of a squared error of the output at every timestep.

    Raises:
        ValueError: if there are no rows.
    """
    data = task.calibration
    if not len(data):
        raise ValueError("sensitivities must be measured on calibration rows, got none; collect some")
    generator = torch.Generator().manual_seed(task.seed)
    points, paired = guided_points(task)
    chosen = _spread(
        [data.timesteps[point[0]] for point in points], settings.rows // len(points[0]), generator
    )
    held = min(settings.rows_per_call, task.memory_bytes // _kept_bytes(task))
    size = max(1, held // len(points[0]))
    result = []
    for at in range(0, len(chosen), size):
        some = [points[index] for index in chosen[at : at + size]]
        of_points = tuple(weights[data.timesteps[point[0]]] for point in some)
        result.append(Probe(data.batch([row for point in some for row in point]), of_points, paired))
    return result


def guided_points(task: Task) -> tuple[Sequence[tuple[int, ...]], bool]:
    """The rows that make up a guided output, and whether they are pairs, the row without condition first."""
    pairs = guidance_pairs(task.calibration)
    return (pairs, True) if pairs else ([(row,) for row in range(len(task.calibration))], False)


def _kept_bytes(task: Task) -> int:
    """About what a forward pass of one row keeps for its gradients, counted from what the layers give."""
    given = [0]

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        given[0] += output.nbytes

    layers = packed.quantizable(task.model)
    handles = [layer.register_forward_hook(count) for layer in layers.values()]
    with torch_modes.plain(), torch.no_grad(), removed(handles):
        args, kwargs = task.calibration.batch([0])
        predict(task.model, args, kwargs)
    return max(1, _KEPT * given[0])


def _spread(timesteps: Sequence[float], count: int, generator: torch.Generator) -> list[int]:
    """Entries at all timesteps in turn, drawn without repeats within each, and at least one."""
    waiting: dict[float, list[int]] = {}
    for index in torch.randperm(len(timesteps), generator=generator).tolist():
        waiting.setdefault(timesteps[index], []).append(index)
    turns = [sorted(waiting)[n] for n in torch.randperm(len(waiting), generator=generator).tolist()]
    chosen: list[int] = []
    while len(chosen) < max(1, min(count, len(timesteps))):
        chosen += [waiting[timestep].pop() for timestep in turns if waiting[timestep]]
    return chosen[: max(1, count)]


def sensitivities(
    model: nn.Module, probes: Sequence[Probe], names: Sequence[str], settings: SensitivitySettings, seed: int
) -> dict[str, Tensor]:
    """The squared change of the guided output, summed over its entries, per squared error of an output channel of a layer.

    The error is one that is independent at every position (token or pixel) and in both rows of a pair. Parameters of the model
    get no gradients, and a second half of the output's channels, which holds a learned variance, is left out.

    Args:
        model: The float denoiser.
        probes: The calls that `probes_of` made.
        names: The names of the layers.
        settings: How many projections are taken, and the guidance scale.
        seed: The seed of the signs.

    Returns:
        float32 [o] by layer, as means over rows or pairs. They are zero for layers that the output does not depend on.

    Raises:
        ValueError: if no gradients pass through the model, or they are not finite (the layer is named).
    """
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.zeros(packed.weight_of(model, name).shape[0]) for name in names}
    with torch_modes.plain(), _frozen(model), _recomputed(model, settings.recompute):
        for probe in probes:
            starts: list[Tensor] = []
            handles = [model.get_submodule(n).register_forward_hook(_adding(found[n], starts)) for n in names]
            with removed(handles):  # also while gradients are taken, since blocks may run once more
                args, kwargs = probe.call
                seen = seen_by_sampler(predict(model, args, kwargs), probe, settings.guidance)
                torch_modes.check_gradients(seen)
                _differentiate(seen, list(starts), settings.probes, generator)
    malloc_trim.release()
    count = settings.probes * sum(len(probe.weights) for probe in probes)
    for name, gamma in found.items():
        if not gamma.isfinite().all():
            raise ValueError(
                f"gradients must be finite, got NaN or Inf at layer {name!r}; run the model in float32"
            )
    return {name: gamma / count for name, gamma in found.items()}


def _adding(total: Tensor, starts: list[Tensor]) -> Callable[..., Tensor]:
    """A hook on a layer that adds the squared gradients to its output, by channel, as they are found.

    An output without gradient begins a graph of its own. It goes to `starts`, and a copy that may be changed in place goes on.
    """

    def add(gradient: Tensor) -> None:
        channels = 1 if gradient.dim() == 4 else -1
        squares = gradient.float().square().movedim(channels, -1)  # [..., o]
        total.add_(squares.reshape(-1, squares.shape[-1]).sum(0).cpu())

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if output.requires_grad:
            output.register_hook(add)
            return output
        start = output.detach().requires_grad_()
        start.register_hook(add)
        starts.append(start)
        return start.clone()

    return hook


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no weight ask for gradients, so that none are computed for it."""
    asking = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in asking:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in asking:
            weight.requires_grad_(True)


@contextmanager
def _recomputed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Have a diffusers model keep what goes into its blocks alone, and run each block again for its gradients."""
    of_diffusers: Any = model
    able = wanted and getattr(model, "_supports_gradient_checkpointing", False)
    if not able or of_diffusers.is_gradient_checkpointing:
        yield
        return
    before = {
        module: {name: vars(module)[name] for name in _CHECKPOINTING if name in vars(module)}
        for module in model.modules()
    }
    of_diffusers.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for module, attributes in before.items():
            for name in _CHECKPOINTING:
                vars(module).pop(name, None)
            vars(module).update(attributes)


def seen_by_sampler(output: Tensor, probe: Probe, guidance: float) -> Tensor:
    """The output that the sampler goes on with for every row or pair, multiplied by the root of its weight, [n, ...]."""
    sample = samples_of(*probe.call)[0]
    if output.dim() > 1 and sample.dim() == output.dim() and output.shape[1] == 2 * sample.shape[1]:
        output = output[:, : sample.shape[1]]
    if probe.paired:
        without, given = output[0::2], output[1::2]  # [n, ...] each
        output = without + guidance * (given - without)
    weights = torch.tensor(probe.weights, device=output.device).sqrt()
    return output.float() * weights.reshape(-1, *[1] * (output.dim() - 1))


def _differentiate(seen: Tensor, starts: Sequence[Tensor], probes: int, generator: torch.Generator) -> None:
    """Gradients of projections of `seen`, which the hooks of `_adding` see on their way to the starts."""
    for number in range(probes):
        signs = torch.randint(2, seen.shape, generator=generator).to(seen) * 2 - 1  # -1 or 1
        # One backward pass gives the gradients to the outputs of all layers.
        torch.autograd.grad(seen, starts, signs, retain_graph=number + 1 < probes, allow_unused=True)
