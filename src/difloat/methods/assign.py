"""From search results to a layer plan: what a recipe asks of a tensor, and the draft of a layer that answers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from difloat import quantizer
from difloat.layers import QuantizedLayer
from difloat.methods.observe import Call, input_of
from difloat.methods.passes import Passes
from difloat.numbers import formats, rounding
from difloat.numbers.formats import Format
from difloat.numbers.scale_grids import ScaleFormat, snapping
from difloat.numbers.search import (
    CLIPS,
    FEW_LEVELS_BITS,
    OFFSETS,
    SHRUNK,
    SHRUNK_FAR,
    ZERO_POINTS,
    Found,
    search,
)
from difloat.quantizer import LayerPlan
from difloat.scales import expand_scale, rows_of
from difloat.specs import Granularity, Part, QuantSpec

MIN_MAX: tuple[float, ...] = (1.0,)
QUANTILES = (0.0, 0.01, 0.5, 0.99, 1.0)  # of an input, by which its shape is reported
LOPSIDED = 0.5  # from here on unsigned formats are tried for an input
_SAMPLES = 1 << 19  # values of one activation tensor that a search looks at


@dataclass(frozen=True)
class Rule:
    """What a recipe asks of one tensor; the search fills in the rest.

    Attributes:
        formats: Candidates; the one with the lowest squared error is taken.
        granularity: What shares a scale.
        group_size: With granularity "group".
        clips: Candidate ranges as fractions of the largest magnitude; `MIN_MAX` for no clipping.
        zero_points: Candidate offsets as fractions of the smallest value (online: any, the smallest value is taken), or
            None for grids that start at zero.
        online: Activations only: scales from the data at run time, nothing is searched but the format is the first.
        unsigned_clips: Candidate ranges of unsigned formats, if others than `clips`.
        asymmetry: Unsigned formats are tried beside the signed ones where the values are at least so lopsided
            (`lopsidedness`); 0: everywhere.
        scales: Grid that the scales are restricted to; only without zero points.
    """

    formats: tuple[Format, ...]
    granularity: Granularity = "tensor"
    group_size: int | None = None
    clips: Sequence[float] = CLIPS
    zero_points: Sequence[float] | None = None
    online: bool = False
    unsigned_clips: Sequence[float] | None = None
    asymmetry: float = 0.0
    scales: ScaleFormat = "float32"

    def __post_init__(self) -> None:
        if self.scales != "float32" and self.zero_points is not None:
            raise ValueError(f"scales must be float32 where there are zero points, got {self.scales!r}")

    def spec(self, format: Format) -> QuantSpec:
        """The specification that results when the search chose `format`."""
        zero_point = self.zero_points is not None and not format.signed
        return QuantSpec(format, self.granularity, self.group_size, self.online, zero_point)

    def search(self, rows: Tensor) -> Found:
        """The best of `formats` for rows that share scales each; see `search.search`.

        Unsigned formats with zero points are left out where the values lie about as far below zero as above (`asymmetry`).
        """
        if self.zero_points is None:
            return search(rows, self.formats, clips=self.clips, snap=snapping(rows, self.scales))
        signed = [f for f in self.formats if f.signed]
        unsigned = [f for f in self.formats if not f.signed]
        if signed and self.asymmetry and lopsidedness(rows) < self.asymmetry:
            unsigned = []
        found = [search(rows, signed, clips=self.clips)] if signed else []
        if unsigned:
            clips = self.unsigned_clips or self.clips
            offsets = _offsets(rows, self.zero_points) if self.asymmetry else self.zero_points
            found.append(search(rows, unsigned, clips=clips, zero_points=offsets))
        return min(found, key=lambda one: float(one.error.sum()))


def lopsidedness(values: Tensor) -> float:
    """1 minus the shorter side of the values over the longer one: 0 symmetric around zero, 1 on one side of it.

    Of the extremes or of the 1 % and 99 % quantiles, whichever is more lopsided: a single outlier on the shorter side does not
    make values symmetric. It only says whether both signs are worth trying; the squared error decides.
    """
    low, high = (float(end) for end in values.aminmax())
    _, inner_low, _, inner_high, _ = quantiles(values)
    return max(_lopsided(low, high), _lopsided(inner_low, inner_high) if inner_low < inner_high else 0.0)


def _offsets(values: Tensor, fractions: Sequence[float]) -> list[float]:
    """Fractions of the smallest value to try as zero points; also those of the 1 % quantile where outliers lie far below it."""
    low, inner, *_ = quantiles(values)
    if low > 2 * inner or inner >= 0:
        return list(fractions)
    return sorted({*fractions, *(fraction * inner / low for fraction in fractions)})


def _lopsided(low: float, high: float) -> float:
    if low >= 0 or high <= 0:
        return 1.0
    return 1 - min(-low, high) / max(-low, high)


def quantiles(values: Tensor) -> list[float]:
    """The `QUANTILES` of the values: the ends of all of them, the inner ones of evenly thinned values."""
    flat = values.detach().float().flatten()
    thinned = flat[:: max(1, flat.numel() >> 16)].sort().values
    inner = [float(thinned[round(share * (len(thinned) - 1))]) for share in QUANTILES[1:-1]]
    return [float(flat.min()), *inner, float(flat.max())]


def floating_point(bits: int) -> Format:
    """The usual format of a width: two exponent bits below 8 bits, four at 8 (E2M1, E2M3, E4M3)."""
    exponent_bits = min(4 if bits == 8 else 2, bits - 1)
    return Format(True, exponent_bits, bits - 1 - exponent_bits)


def asymmetric_integers(bits: int, granularity: Granularity, group_size: int | None = None) -> Rule:
    """Unsigned integers with a real zero point, both ends of the range searched by squared error."""
    grid = (formats.parse(f"uint{bits}"),)
    far = bits <= FEW_LEVELS_BITS
    clips, zero_points = (SHRUNK_FAR, ZERO_POINTS) if far else (SHRUNK, OFFSETS)
    return Rule(grid, granularity, group_size, clips=clips, zero_points=zero_points)


def floating_grids(bits: int, granularity: Granularity, group_size: int | None = None) -> Rule:
    """Every floating-point format of the width; unsigned ones with a zero point, of whole tensors only where one side is short.

    A tensor counts as lopsided from `LOPSIDED` on; of rows that share a format every one has its own shape.
    """
    signed = formats.candidates(bits) if bits > 1 else ()
    grids = (*signed, *formats.candidates(bits, signed=False))
    asymmetry = LOPSIDED if granularity == "tensor" else 0.0
    return Rule(
        grids,
        granularity,
        group_size,
        zero_points=ZERO_POINTS,
        unsigned_clips=SHRUNK_FAR,  # with 11 zero points each, refined by the search
        asymmetry=asymmetry,
    )


@dataclass(frozen=True)
class Draft:
    """A layer on its way to a plan: float weight, chosen specs, scales; `plan` encodes it, without inputs.

    Attributes:
        weight: Float [o, i, *k], the original values.
        parts: As in `LayerPlan`.
        scales: Per part, of the weight.
        zero_points: Per part, of the weight (zeros where the spec has none).
        error: Sum of squared errors of the weight, all parts.
    """

    weight: Tensor = field(repr=False)
    parts: tuple[Part, ...]
    scales: tuple[Tensor, ...] = field(repr=False)
    zero_points: tuple[Tensor, ...] = field(repr=False)
    error: float

    def plan(self, rounded: Tensor | None = None) -> LayerPlan:
        """Encode and pack the weight, or values on the grid that were learned in place of nearest rounding."""
        return quantizer.plan_layer(
            self.weight if rounded is None else rounded,
            self.parts,
            self.scales,
            weight_zero_points=self.zero_points,
        )

    def grid_neighbours(self) -> tuple[Tensor, Tensor, Tensor]:
        """For every weight the grid value below, the one above, and where it lies between them (0 to 1).

        Beyond the ends of the grid both neighbours are the end. The distance of the neighbours is the interval s of
        AdaRound, on a floating-point grid the local step.
        """
        lows, highs, positions = [], [], []
        pieces = self.weight.float().split([part.channels for part in self.parts], dim=1)
        for piece, part, scale, zero in zip(pieces, self.parts, self.scales, self.zero_points, strict=True):
            spec = part.weight
            factor = expand_scale(scale, spec, piece.shape)
            shift = zero if spec.zero_point else torch.zeros_like(scale)
            offset = expand_scale(shift, spec, piece.shape)
            grid = ((piece - offset) / factor).clamp(spec.format.min, spec.format.max)
            step = rounding.step_at(grid, spec.format)
            low = torch.floor(grid / step) * step
            high = (low + step).clamp(max=spec.format.max)
            positions.append((grid - low) / step)
            lows.append(low.clamp(min=spec.format.min) * factor + offset)
            highs.append(high * factor + offset)
        return torch.cat(lows, 1), torch.cat(highs, 1), torch.cat(positions, 1)


def draft_layer(weight: Tensor, splits: Sequence[int], rule: Rule) -> Draft:
    """Choose format and scales of a weight.

    Args:
        weight: Float [o, i, *k].
        splits: Channels of every part, adding up to i; parts are searched on their own.
        rule: What is asked.
    """
    weight = weight.detach().contiguous()  # of a channels_last model it is not
    parts, scales, zeros, error = [], [], [], 0.0
    for piece in weight.float().split(list(splits), dim=1):
        rows = rows_of(piece, rule.spec(rule.formats[0]))
        found = rule.search(rows)
        parts.append(Part(piece.shape[1], rule.spec(found.format)))
        scales.append(found.scale)
        zeros.append(found.zero_point)
        error += float(found.error.sum())
    return Draft(weight, tuple(parts), tuple(scales), tuple(zeros), error)


def plan_inputs(plan: LayerPlan, x: Tensor | None, rule: Rule, generator: torch.Generator) -> LayerPlan:
    """Choose format and scale of a layer's input from a sample of it.

    Args:
        plan: The layer, without inputs.
        x: Its input, [..., i] for a linear layer, [b, i, h, w] for a convolution; None with an online rule.
        rule: What is asked; an online rule takes its first format and looks at nothing.
        generator: Draws the values that are looked at (at most half a million per part, the extremes always).
    """
    if rule.online or x is None:
        spec = rule.spec(rule.formats[0])
        return replace(plan, parts=tuple(replace(part, activation=spec) for part in plan.parts))
    parts: list[Part] = []
    found: list[Found] = []
    for piece, part in zip(_pieces(plan, x.detach()), plan.parts, strict=True):
        found.append(rule.search(_sample(piece, generator)))
        parts.append(replace(part, activation=rule.spec(found[-1].format)))
    vectors = {"input_scale": torch.cat([each.scale.reshape(-1).float() for each in found])}
    if shifted := [each.zero_point for each in found if rule.spec(each.format).zero_point]:
        vectors["input_zero_point"] = torch.cat([zero.reshape(-1).float() for zero in shifted])
    return replace(plan, parts=tuple(parts), tensors={**plan.tensors, **vectors})


def _pieces(plan: LayerPlan, x: Tensor) -> Sequence[Tensor]:
    """The input of every part."""
    if len(plan.parts) == 1:  # a grouped convolution reads more channels than each row of its weight has
        return [x]
    return x.split([part.channels for part in plan.parts], dim=-1 if plan.kind == "linear" else 1)


def _sample(x: Tensor, generator: torch.Generator) -> Tensor:
    """A row [1, n] of values of `x`, its smallest and largest among them."""
    flat = x.float().reshape(-1).cpu()
    if flat.numel() <= _SAMPLES:
        return flat[None]
    chosen = torch.randint(flat.numel(), (_SAMPLES - 2,), generator=generator)
    return torch.cat([flat[chosen], flat.min()[None], flat.max()[None]])[None]


def search_inputs(
    model: nn.Module,
    calls: Sequence[Call],
    plans: Mapping[str, LayerPlan],
    rules: Mapping[str, Rule],
    generator: torch.Generator,
) -> tuple[dict[str, LayerPlan], dict[str, list[dict[str, Any]]]]:
    """Choose the input quantization of every layer in the order of execution, earlier layers already quantized.

    One forward pass does it all: just before a layer runs, its input (which earlier, quantized layers made) is searched,
    and the layer runs with the result. Layers whose scales are all online need no pass.

    Args:
        model: Its layers are quantized in place: on entry weights only, on return inputs too.
        calls: Calls with the calibration rows.
        plans: The layers of `model`.
        rules: What is asked of the inputs, in the order of execution; layers without a rule keep their input.
        generator: See `plan_inputs`.

    Returns:
        The layers with inputs; and the shapes of those inputs whose rule looks for asymmetry, by layer and part: `quantiles`
        (see `QUANTILES`), `lopsided` (`lopsidedness`), and whether that is `asymmetric` by the rule.

    Raises:
        ValueError: if an input is not finite.
    """
    done = dict(plans)
    shapes: dict[str, list[dict[str, Any]]] = {}

    def take(name: str, x: Tensor | None) -> None:
        done[name] = plan_inputs(done[name], x, rules[name], generator)
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        layer.load(done[name], layer.weight.device)

    for name, rule in rules.items():
        if rule.online:
            take(name, None)
    with Passes(model, calls) as passes:
        for name in (name for name, rule in rules.items() if not rule.online):
            x = _smoothed(_inputs(passes.arguments(name), done[name]), done[name])
            if not torch.isfinite(x).all():
                raise ValueError(
                    f"inputs of layer {name!r} must be finite, got NaN or Inf; calibrate in float32"
                )
            take(name, x)
            if rule.asymmetry:
                shapes[name] = [_shape(piece, rule) for piece in _pieces(done[name], x)]
    return done, shapes


def _inputs(calls: Sequence[Call], plan: LayerPlan) -> Tensor:
    """The layer's input in all calls; where pictures or captions differ in size, positions one after the other."""
    inputs = [input_of(*call) for call in calls]
    if len({x.shape[1:] for x in inputs}) == 1:
        return torch.cat(inputs)
    if plan.kind == "linear":
        return torch.cat([x.flatten(0, -2) for x in inputs])
    return torch.cat([x.transpose(0, 1).flatten(1) for x in inputs], dim=1)[None, :, :, None]


def _shape(x: Tensor, rule: Rule) -> dict[str, Any]:
    lopsided = lopsidedness(x)
    return {"quantiles": quantiles(x), "lopsided": lopsided, "asymmetric": lopsided >= rule.asymmetry}


def _smoothed(x: Tensor, plan: LayerPlan) -> Tensor:
    if not plan.smoothed:
        return x
    factor = plan.tensors["input_factor"].to(x.device)
    return x * (factor if plan.kind == "linear" else factor.reshape(-1, 1, 1))
