"""Diagnosis of a quantized model: the errors of its blocks and layers, overflow, and the fewest layers to exclude.

First the float model runs along its own trajectory, and every block and layer of the quantized model is given the very same
inputs. Their errors are *forced*: a layer's own. The quantized model also runs on its own intermediate results, where errors
are *accumulated*. Then pictures are drawn with the worst blocks back in full precision, and after that with the worst layers of
these blocks. Bisection finds how few it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from difloat import api
from difloat.evaluation.comparison import latent_error
from difloat.evaluation.generation import Generated, generate
from difloat.evaluation.picture_metrics import NotFiniteError
from difloat.layers import install, packed
from difloat.layers.packed import QuantizedLayer
from difloat.methods.trace import Call, removed, tensors_of
from difloat.plan.request import MOST_SEED
from difloat.plan.validation import Positive, Rule, record

_TIMESTEPS = 6  # of the trajectory that errors are measured at, evenly spread
_FLOAT16_MAX = torch.finfo(torch.float16).max
_FINITE_GOAL = 1.0  # relative error to reach where the quantized model draws no finite pictures at all


@record("settings of a diagnosis")
class DiagnosisSettings:
    """How a diagnosis is made.

    Attributes:
        samples: Denoiser inputs that errors are measured on.
        images: Pictures per sampling run.
        steps: Sampler steps. If it is left out, as many as the pipeline's call takes by itself.
        guidance_scale: Scale of classifier-free guidance. If it is left out, the one that the pipeline's call takes by itself.
        share: Share of today's error that is good enough; 0.5 halves it.
        seed: Seed of everything random.
    """

    samples: Positive = 24
    images: Positive = 2
    steps: Positive | None = None
    guidance_scale: float | None = None
    share: Annotated[float, Field(gt=0, lt=1), Rule("be between 0 and 1")] = 0.5
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] = 0


@dataclass
class Health:
    """The errors of one block or layer. They are relative, roots of summed squares, by timestep.

    Attributes:
        name: The dotted name in the denoiser.
        forced: The errors on the float model's inputs.
        accumulated: The errors on the quantized model's own inputs, which are measured for blocks only.
        largest: The largest magnitude of its outputs, in either model.
        finite: Whether the quantized one returns finite numbers for finite inputs.
    """

    name: str
    forced: dict[float, float] = field(default_factory=dict)
    accumulated: dict[float, float] = field(default_factory=dict)
    largest: float = 0.0
    finite: bool = True

    @property
    def error(self) -> float:
        """The mean of the forced errors, which is infinite if an output is not finite."""
        return sum(self.forced.values()) / max(len(self.forced), 1) if self.finite else math.inf

    @property
    def overflows_float16(self) -> bool:
        """Whether values are beyond the range of float16."""
        return not self.largest <= _FLOAT16_MAX


@dataclass(frozen=True)
class Diagnosis:
    """The result of a diagnosis.

    Attributes:
        blocks: The blocks, the worst first.
        layers: The quantized layers, the worst first.
        exclude: The fewest layers found that bring the error to the goal when they stay in full precision, in the order of
            their errors. It is empty if there is nothing to repair or no set of layers repairs it.
        before: The relative error of the sampler's last state, quantized against full precision. NaN pictures count as
            infinite.
        after: The same error with the layers of `exclude` in full precision.
        goal: The error that `after` had to reach.
        runs: How many sampling runs were made.
    """

    blocks: list[Health]
    layers: list[Health]
    exclude: tuple[str, ...]
    before: float
    after: float
    goal: float
    runs: int


def runs_needed(original: nn.Module, quantized: nn.Module) -> int:
    """How many sampling runs a diagnosis of a quantized denoiser takes at most: two, and those of the bisections.

    Raises:
        ValueError: if the models do not belong together.
    """
    _check(original, quantized)
    units = _units(original, quantized)
    count = sum(len(members) for members in units.values())
    return 2 + math.ceil(math.log2(len(units) + 1)) + math.ceil(math.log2(max(count, 1)))


def diagnose(
    float_pipeline: Any,
    quantized_pipeline: Any,
    *,
    prompts: Sequence[str] | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Diagnosis:
    """Find the layers whose quantization costs most. Both pipelines are as before on return.

    >>> import difloat
    >>> original, quantized = difloat.reference("emoji-unet"), difloat.reference("emoji-unet")
    >>> _ = difloat.quantize(quantized, "rtn", "w2a16", exclude=["down_blocks", "up_blocks"], progress=False)
    >>> few = {"prompts": ["red apple"], "samples": 2, "images": 1, "steps": 1, "progress": False}
    >>> found = difloat.diagnose(original, quantized, **few)
    >>> found.layers[0].error >= found.layers[-1].error, found.after <= found.before
    (True, True)

    Args:
        float_pipeline: The pipeline in full precision.
        quantized_pipeline: The pipeline that was quantized from it, of the same dtype, on the same device.
        prompts: The texts to sample with. None takes general built-in ones.
        call_kwargs: Further arguments of the pipeline's call.
        progress: Whether to show progress bars.
        **settings: Fields of `DiagnosisSettings`.

    Raises:
        ValueError: if the pipelines do not belong together, or a setting is not allowed.
    """
    wanted = DiagnosisSettings(**settings)
    original, quantized = api.denoiser(float_pipeline), api.denoiser(quantized_pipeline)
    _check(original, quantized)
    texts = api.prompts_for(float_pipeline, prompts)
    sampler: dict[str, Any] = {"steps": wanted.steps, "guidance_scale": wanted.guidance_scale}
    sampler |= {"call_kwargs": call_kwargs}
    data = api.calibrate(
        float_pipeline,
        prompts=texts,
        progress=progress,
        samples=wanted.samples,
        seed=wanted.seed,
        **sampler,
    )
    units = _units(original, quantized)
    blocks, found = _measure(original, quantized, _calls(data), units)
    seeds = range(wanted.seed, wanted.seed + wanted.images)
    drawn = {"prompts": texts, "seeds": seeds, "batch_size": wanted.images, "progress": progress, **sampler}
    trials = _Trials(float_pipeline, quantized_pipeline, drawn)
    before = trials.error_without([])
    goal = wanted.share * before if math.isfinite(before) else _FINITE_GOAL
    ranked = [[layer.name for layer in found if layer.name in units[block.name]] for block in blocks]
    order = {layer.name: rank for rank, layer in enumerate(found)}
    exclude, after = _fewest(ranked, order, trials.error_without, goal) if before > 0 else ((), before)
    return Diagnosis(blocks, found, exclude, before, after if exclude else before, goal, trials.runs)


@final
class _Trials:
    """Sampling runs with some layers in full precision.

    Attributes:
        runs: How many sampling runs were made, that of the float model included.
    """

    def __init__(self, float_pipeline: Any, quantized_pipeline: Any, arguments: Mapping[str, Any]) -> None:
        """Draw with the float model. `arguments` are those of `evaluate.generate`."""
        self.runs = 0
        self._original, self._quantized = api.denoiser(float_pipeline), api.denoiser(quantized_pipeline)
        self._pipeline, self._arguments = quantized_pipeline, arguments
        self._reference = self._draw(float_pipeline)

    def _draw(self, pipeline: Any) -> Generated:
        self.runs += 1
        return generate(pipeline, trajectory=True, **self._arguments)

    def error_without(self, names: Sequence[str]) -> float:
        """The relative error of the last state with these layers in full precision. NaN pictures count as infinite."""
        with _as_float(self._quantized, self._original, names):
            try:
                return latent_error(self._reference, self._draw(self._pipeline))[-1].value
            except NotFiniteError:
                return math.inf


def _check(original: nn.Module, quantized: nn.Module) -> None:
    """Raise a ValueError unless the second model is the first, quantized."""
    modules = dict(original.named_modules())
    names = [name for name, module in quantized.named_modules() if isinstance(module, QuantizedLayer)]
    if not names:
        raise ValueError("the second model must be quantized, got a float one; pass the float model first")
    for name in names:
        layer = quantized.get_submodule(name)
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or isinstance(modules[name], QuantizedLayer):
            raise ValueError(f"the first model must have {name!r} as a float layer; pass what was quantized")
        if tuple(weight.shape) != layer.float_shape:
            raise ValueError(
                f"both models must have {name!r} in one shape, got {tuple(weight.shape)} and {layer.float_shape}"
            )
    dtypes = {_dtype(original), _dtype(quantized)}
    if len(dtypes) > 1:
        raise ValueError(f"both models must have one dtype, got {sorted(map(str, dtypes))}; load both alike")


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _units(original: nn.Module, quantized: nn.Module) -> dict[str, list[str]]:
    """The quantized layers by their blocks. Layers outside of blocks are units of their own."""
    taken = {name for name, module in quantized.named_modules() if isinstance(module, QuantizedLayer)}
    units = {
        name: [member for member in members if member in taken]
        for name, members in packed.blocks(original).items()
    }
    return {name: members for name, members in units.items() if members}


def _calls(data: Any) -> dict[float, Call]:
    """One denoiser call for each of some timesteps that are spread over the trajectory."""
    rows: dict[float, list[int]] = {}
    for row, timestep in enumerate(data.timesteps):
        rows.setdefault(timestep, []).append(row)
    grid = sorted(rows, reverse=True)
    count = min(_TIMESTEPS, len(grid))
    chosen = [grid[place * (len(grid) - 1) // max(count - 1, 1)] for place in range(count)]
    return {timestep: data.batch(rows[timestep]) for timestep in chosen}


def _measure(
    original: nn.Module, quantized: nn.Module, calls: Mapping[float, Call], units: Mapping[str, list[str]]
) -> tuple[list[Health], list[Health]]:
    """The health of blocks and of layers, the worst first."""
    blocks = {name: Health(name) for name in units}
    members = [name for names in units.values() for name in names]
    found = {name: Health(name) for name in members}
    for timestep, (args, kwargs) in calls.items():
        own: dict[str, list[Tensor]] = {}
        with removed([_watch(quantized, name, own) for name in blocks]), torch.no_grad():
            quantized(*args, **kwargs)
        hooks = [_compare(original, quantized, health, timestep, {}) for health in found.values()]
        hooks += [_compare(original, quantized, health, timestep, own) for health in blocks.values()]
        # Layers of the quantized model are called one by one here.
        alone = install.as_in_call(quantized, args, kwargs)
        with removed([handle for pair in hooks for handle in pair]), torch.no_grad(), alone:
            original(*args, **kwargs)
    worst_first = [sorted(each.values(), key=lambda h: h.error, reverse=True) for each in (blocks, found)]
    return worst_first[0], worst_first[1]


def _watch(model: nn.Module, name: str, own: dict[str, list[Tensor]]) -> Any:
    """Keep the outputs of a block of the quantized model on its own inputs."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        own[name] = [tensor.detach().clone() for tensor in tensors_of(output)]

    return model.get_submodule(name).register_forward_hook(hook)


def _compare(
    original: nn.Module,
    quantized: nn.Module,
    health: Health,
    timestep: float,
    own: Mapping[str, list[Tensor]],
) -> list[Any]:
    """Run the quantized counterpart of a module on the float module's inputs, and compare their outputs."""
    twin, module = quantized.get_submodule(health.name), original.get_submodule(health.name)
    results: list[list[Tensor]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        # Copies, since blocks may change their inputs in place.
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
        results.append(tensors_of(twin(*args, **kwargs)))

    def after(_: nn.Module, args: Any, output: Any) -> None:
        wanted, forced = tensors_of(output), results.pop()
        health.forced[timestep] = max(_distance(wanted, forced), health.forced.get(timestep, 0.0))
        if health.name in own:
            health.accumulated[timestep] = _distance(wanted, own[health.name])
        fine = all(bool(tensor.isfinite().all()) for tensor in forced)
        health.finite = health.finite and (fine or not all(bool(t.isfinite().all()) for t in wanted))
        largest = max((float(t.abs().max()) for t in [*wanted, *forced] if t.numel()), default=0.0)
        health.largest = max(health.largest, largest) if not math.isnan(largest) else math.inf

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]


def _distance(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The relative error over all tensors together, which is infinite where a number is not finite."""
    pairs = list(zip(wanted, got, strict=True))
    error = math.sqrt(sum(float((a.double() - b.double()).square().sum()) for a, b in pairs))
    size = math.sqrt(sum(float(a.double().square().sum()) for a in wanted))
    return error / max(size, 1e-30) if math.isfinite(error) else math.inf


@contextmanager
def _as_float(quantized: nn.Module, original: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Put the float layers of these names into the quantized model inside a ``with`` block."""
    kept = {name: quantized.get_submodule(name) for name in names}
    try:
        for name in names:
            install.replace(quantized, name, original.get_submodule(name))
        yield
    finally:
        for name, module in kept.items():
            install.replace(quantized, name, module)


def _fewest(
    blocks: Sequence[Sequence[str]],
    order: Mapping[str, int],
    error_without: Callable[[Sequence[str]], float],
    goal: float,
) -> tuple[tuple[str, ...], float]:
    """The fewest of the worst layers, out of the fewest of the worst blocks, that reach the goal, and the error then."""
    count, after = _bisect([name for block in blocks for name in block], blocks, error_without, goal)
    if count is None:
        return (), after
    names = sorted((name for block in blocks[:count] for name in block), key=order.__getitem__)
    fewer, error = _bisect(names, [[name] for name in names], error_without, goal, known=after)
    assert fewer is not None
    return tuple(names[:fewer]), error


def _bisect(
    names: Sequence[str],
    groups: Sequence[Sequence[str]],
    error_without: Callable[[Sequence[str]], float],
    goal: float,
    known: float | None = None,
) -> tuple[int | None, float]:
    """How many groups from the front it takes to reach the goal, and the error then. None means that all are too few.

    This supposes that more layers in full precision never hurt. `known` is the error with all of `names` in full precision,
    if it was measured.
    """
    low, high = 1, len(groups) + (known is None)
    errors: dict[int, float] = {} if known is None else {len(groups): known}
    while low < high:
        middle = (low + high) // 2
        chosen = [name for group in groups[:middle] for name in group]
        errors[middle] = error_without(chosen)
        if errors[middle] <= goal:
            high = middle
        else:
            low = middle + 1
    if low > len(groups):
        return None, errors[len(groups)]
    return low, errors[low]
