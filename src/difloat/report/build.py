"""The record of a report, filled from a model, its plan and its evaluation."""

from __future__ import annotations

import io
import math
import resource
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from difloat.checkpoint.directories import REPORT_FILES, replace_file
from difloat.evaluation.comparison import Evaluation, Generated
from difloat.layers.packed import weight_of
from difloat.plan.encode import dequantize
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.specs import SIDE, QuantSpec, rows_of_parts, weight_formats
from difloat.report import render
from difloat.report.record import NO_LAYER, ROTATED
from difloat.report.render import Histogram, LayerRow, Record

RECORD, PICTURES, PAGE = REPORT_FILES
_HISTOGRAM_BINS = 96
_FRAMES = 4  # of a video


@dataclass(frozen=True)
class Sizes:
    """The bytes of a model before (every value in 16 bits) and after, and the bits that a quantized weight really takes."""

    original_bytes: int
    packed_bytes: int
    effective_bits: float


def sizes(model: nn.Module, plan: Plan) -> Sizes:
    """The sizes of a float or quantized model under a plan. Tensors that are not quantized keep the model's dtype."""
    weights = sum(math.prod(layer.shape) for layer in plan.layers.values())
    packed = sum(layer.nbytes for layer in plan.layers.values())
    own = {f"{name}.{tensor}" for name, layer in plan.layers.items() for tensor in layer.tensors}
    rest = {name: tensor for name, tensor in model.state_dict().items() if name not in own}
    values = weights + sum(tensor.numel() for tensor in rest.values())
    rest_bytes = sum(tensor.nbytes for tensor in rest.values())
    return Sizes(2 * values, packed + rest_bytes, 8 * packed / max(weights, 1))


def layer_row(name: str, layer: LayerPlan, weight: Tensor) -> LayerRow:
    """The row of the report for a layer with this float weight."""
    quantized, weight = dequantize(layer), weight.detach().float()
    specs = [
        spec for band in rows_of_parts(layer.shape[0], layer.parts, layer.bands) for spec in band.weights
    ]
    activations = [part.activation for part in layer.parts if part.activation is not None]
    activation_formats = list(dict.fromkeys(spec.format.name for spec in activations))
    relative = float((quantized - weight).square().sum() / weight.square().sum().clamp_min(1e-30))
    return LayerRow(
        name=name,
        kind=layer.kind,
        shape=layer.shape,
        weight_format=weight_formats(layer.shape[0], layer.parts, layer.bands),
        weight_granularity=_per(layer.parts[0].weight),
        activation_format=" + ".join(activation_formats) or None,
        activation_mode=_mode(activations),
        parts=len(layer.parts),
        weight_error_db=10 * math.log10(max(relative, 1e-12)),
        zeros=float((quantized == 0).float().mean()),
        zeros_before=float((weight == 0).float().mean()),
        integer_grid=all(spec.format.uniform for spec in specs),
        bytes=layer.nbytes,
        bytes_before=2 * weight.numel(),
        effective_bits=8 * layer.nbytes / weight.numel(),
        note="; ".join(note for note in (_rotated(layer), _by_timestep(layer)) if note),
    )


def _rotated(layer: LayerPlan) -> str:
    """A phrase about the rotation of the input, or "" without one."""
    return "" if layer.rotation is None else f"{ROTATED} {layer.rotation.block}"


def _by_timestep(layer: LayerPlan) -> str:
    """A phrase about the weights by timestep and adapters that the layer's bytes hold, or "" for one weight."""
    weights = f"{layer.variants} packed weights, one per stretch of timesteps" if layer.schedule else ""
    if layer.side is None:
        return weights
    size_bytes = sum(layer.tensors[name].nbytes for name in SIDE)
    return f"{weights}{'; ' * bool(weights)}{layer.side.pairs} x rank {layer.side.rank} beside, {size_bytes} bytes in float16"


def _per(spec: QuantSpec) -> str:
    return f"group of {spec.group_size}" if spec.group_size else spec.granularity


def _mode(specs: Sequence[QuantSpec]) -> str:
    if not specs:
        return "-"
    return f"{'online' if specs[0].online else 'static'} per {specs[0].granularity}"


def worst_histograms(
    model: nn.Module, plan: Plan, rows: Sequence[LayerRow], count: int = 4
) -> list[Histogram]:
    """The histograms of the float weights with the largest relative error, with the grid of the first scale."""
    worst = sorted(rows, key=lambda row: row.weight_error_db, reverse=True)[:count]
    result = []
    for row in worst:
        layer = plan.layers[row.name]
        part = layer.parts[0]
        weight = weight_of(model, row.name).detach().float()[:, : part.channels]
        if layer.bands:
            weight = weight[layer.tensors["row_band"] == 0]
        if part.weight.granularity != "tensor":
            weight = weight[:1]
        weight = layer.rotated(weight)
        if layer.smoothed:  # the grid is that of the weight as the scaled input sees it
            factor = layer.tensors["input_factor"][: weight.shape[1]]
            weight = weight / factor.reshape(1, -1, *[1] * (weight.dim() - 2))
        scale = float(layer.tensors["weight_scale"][0])
        zero = float(layer.tensors["weight_zero_point"][0]) if part.weight.zero_point else 0.0
        grid = [value * scale + zero for value in part.weight.format.values]
        counts, edges = np.histogram(weight.cpu().numpy().ravel(), bins=_HISTOGRAM_BINS)
        result.append(Histogram(row.name, edges.tolist(), counts.astype(float).tolist(), grid, "weight"))
    return result


def quality_rows(evaluation: Evaluation) -> list[render.Measure]:
    """The rows of the quality table. Metrics that full precision has a value of show it as their reference."""
    full = {
        name: metric for name, metric in evaluation.metrics.items() if name.endswith("_of_full_precision")
    }
    rows = []
    for name, metric, estimate in evaluation.rows():
        if name in full:
            continue
        reference = full.get(f"{name}_of_full_precision")
        rows.append(
            render.Measure(
                name,
                metric.label,
                **vars(estimate),
                unit=metric.unit,
                better=metric.better,
                reference=None if reference is None else reference.value,
            )
        )
    return rows


def build(
    model: nn.Module,
    plan: Plan,
    *,
    name: str,
    timings: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
    rows: Sequence[LayerRow] | None = None,
) -> Record:
    """The record of a quantization run, without pictures, to which `with_pictures` adds what they say.

    Args:
        model: The float denoiser.
        plan: What was decided for it.
        name: The user's name of the model.
        timings: The seconds of steps besides those that the plan measured.
        notes: What the paper leaves open and how it was decided.
        rows: The rows of the layers, where neither the model's nor the plan's values are in memory any more. There are no
            histograms then. None makes the rows here.
    """
    known = rows is not None
    rows = rows or [layer_row(key, layer, weight_of(model, key)) for key, layer in plan.layers.items()]
    size = sizes(model, plan)
    return Record(
        title=f"{name}, {plan.recipe} {plan.bits}",
        recipe=plan.recipe,
        bits=plan.bits,
        model=name,
        model_class=type(model).__name__,
        command=shlex.join(["difloat", *sys.argv[1:]]),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=render.versions(),
        machine=render.machine(),
        options=dict(plan.options),
        recipe_notes=list(notes),
        original_bytes=size.original_bytes,
        packed_bytes=size.packed_bytes,
        effective_bits=size.effective_bits,
        weight_bits_nominal=float(plan.bits[1:].split("a")[0]),
        layers=list(rows),
        skipped=_skipped(model, plan),
        quality=[],
        samples=0,
        histograms=[] if known else worst_histograms(model, plan, rows),
        ranges=[
            render.TokenRanges(layer, list(found), list(found.values()))
            for layer, found in plan.measured.get("ranges", {}).items()
        ],
        inputs=_inputs(plan),
        adapters=_adapters(plan),
        shares=_shares(plan),
        tried=tried(plan),
        attention=_attention(plan),
        timings=[*plan.measured.get("seconds", {}).items(), *(timings or {}).items()],
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    )


def with_pictures(
    made: Record,
    evaluation: Evaluation,
    prompts: Sequence[str],
    seeds: Sequence[int],
    times: Mapping[str, float],
) -> Record:
    """A record with what pictures say, in the place of what earlier ones said.

    Args:
        made: Record of the run that made the checkpoint.
        evaluation: What all pictures say.
        prompts: Prompts of the pictures that are shown.
        seeds: Seeds of the pictures that are shown.
        times: What drawing took, in seconds, by what was drawn.
    """
    others = [(name, seconds) for name, seconds in made.timings if name not in times]
    return replace(
        made,
        quality=quality_rows(evaluation),
        samples=evaluation.samples,
        prompts=list(prompts),
        seeds=list(seeds),
        trajectory=_trajectory(evaluation),
        timings=[*others, *times.items()],
    )


def _inputs(plan: Plan) -> list[render.InputShape]:
    """The shapes of inputs that a recipe which looks for asymmetric inputs measured, part by part."""
    rows = []
    for name, shapes in plan.measured.get("inputs", {}).items():
        for number, shape in enumerate(shapes):
            part = plan.layers[name].parts[number]
            assert part.activation is not None
            label = name if len(shapes) == 1 else f"{name}, part {number + 1}"
            rows.append(render.InputShape(label, **shape, format=part.activation.format.name))
    return rows


def _adapters(plan: Plan) -> render.AdapterTable | None:
    """The router's table where layers have several adapters, in the sampler's order from the first timestep on."""
    table = plan.measured.get("router")
    if not table or not any(map(any, table)):
        return None
    return render.AdapterTable(list(reversed(plan.measured["grid"])), list(plan.layers), table[::-1])


def _shares(plan: Plan) -> list[render.Share]:
    """The shares that the layers got of a budget, or none where a recipe gives all of them the same bits."""
    found = plan.measured.get("widths", {})
    shares = []
    for name, formats_of in found.get("formats", {}).items():
        layer = plan.layers[name]
        weights = math.prod(layer.shape)
        errors = [(8 * nbytes / weights, error) for _, nbytes, error in found["offers"][name]]
        seconds = found.get("seconds", {}).get(name)
        times_ms = None if seconds is None else (1000 * seconds[0], 1000 * seconds[1])
        shares.append(render.Share(name, formats_of, weights, 8 * layer.nbytes / weights, errors, times_ms))
    return shares


def tried(plan: Plan) -> list[render.Tried]:
    """The optional parts that were judged, those that were refused too."""
    return [
        render.Tried(
            one["part"],
            one["kept"],
            (one["gain"]["value"], one["gain"]["low"], one["gain"]["high"]),
            one["trajectories"],
            one["pictures"],
        )
        for one in plan.measured.get("tried", [])
    ]


def _attention(plan: Plan) -> str:
    """A sentence about what is quantized inside attention, or "" if nothing is."""
    if not plan.attention:
        return ""
    entry = next(iter(plan.attention.values()))
    operand = (
        f"query, key and value are {entry.operand.name}, online per token and head" if entry.operand else ""
    )
    softmax = f"the map is {entry.softmax.name}" if entry.softmax else "the map keeps its precision"
    return (
        f"Inside {len(plan.attention)} attention modules " + "; ".join(filter(None, [operand, softmax])) + "."
    )


def _skipped(model: nn.Module, plan: Plan) -> list[tuple[str, str, int]]:
    """The modules that hold parameters and stay in high precision, with their reasons and bytes."""
    # Parameters of the model itself, such as PixArt's table of shifts, have no name of their own.
    skipped = [
        (name or "the model itself", reason, _bytes(model, name)) for name, reason in plan.skipped.items()
    ]
    for name, module in model.named_modules():
        if (
            name not in plan.layers
            and name not in plan.skipped
            and any(True for _ in module.parameters(False))
        ):
            skipped.append((name, f"{type(module).__name__}, {NO_LAYER}", _bytes(model, name)))
    return skipped


def _trajectory(evaluation: Evaluation) -> dict[str, list[float]] | None:
    if evaluation.trajectory is None:
        return None
    columns = {
        key: [getattr(step, key) for step in evaluation.trajectory] for key in ("value", "low", "high")
    }
    return {"timesteps": list(evaluation.timesteps), **columns}


def _bytes(model: nn.Module, name: str) -> int:
    return sum(parameter.nbytes for parameter in model.get_submodule(name).parameters(False))


def write(record: Record, reference: np.ndarray, quantized: np.ndarray, directory: Path) -> Path:
    """Write page, data and pictures into a directory, from which `read` can make the page again. Return the page."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures = io.BytesIO()
    np.savez_compressed(pictures, reference=reference, quantized=quantized)
    replace_file(directory / RECORD, render.record_to_json(record).encode())
    replace_file(directory / PICTURES, pictures.getvalue())
    return render.render(record, reference, quantized, directory / PAGE)


def read(directory: Path) -> tuple[Record, np.ndarray, np.ndarray]:
    """The record and the pictures that `write` stored.

    Raises:
        FileNotFoundError: if there is no report in the directory.
    """
    path, pictures = directory / RECORD, directory / PICTURES
    if not path.is_file() or not pictures.is_file():
        raise FileNotFoundError(
            f"directory must hold {RECORD} and {PICTURES}, got {directory}; run difloat quantize first"
        )
    with np.load(pictures, allow_pickle=False) as arrays:
        return (
            render.record_from_json(path.read_text(encoding="utf-8")),
            arrays["reference"],
            arrays["quantized"],
        )


@dataclass(frozen=True)
class Shown:
    """A picture of a report: the number of its sample, and the caption of its frame, which is "" for a picture."""

    sample: int
    label: str


def shown(drawn: Generated, most: int) -> tuple[np.ndarray, list[Shown]]:
    """Up to `most` pictures, uint8 [n, h, w, 3]: the first samples, and of videos up to `_FRAMES` frames with both ends."""
    frames = sorted({round(place) for place in np.linspace(0, drawn.frames - 1, _FRAMES).tolist()})
    samples = range(min(len(drawn.images) // drawn.frames, most // len(frames)))
    labels = [f", frame {frame + 1} of {drawn.frames}" if drawn.frames > 1 else "" for frame in frames]
    chosen = [Shown(sample, label) for sample in samples for label in labels]
    if not chosen:
        return no_pictures(), []
    return to_uint8(
        drawn.images[[sample * drawn.frames + frame for sample in samples for frame in frames]]
    ), chosen


def to_uint8(images: Tensor) -> np.ndarray:
    """Pictures [n, 3, h, w] in 0..1 as uint8 [n, h, w, 3]."""
    return images.mul(255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def no_pictures() -> np.ndarray:
    """An empty set of pictures, uint8 [0, 1, 1, 3]."""
    return np.zeros((0, 1, 1, 3), np.uint8)
