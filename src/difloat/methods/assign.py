"""From search results to a layer plan: what a recipe asks of a tensor, and the draft of a layer that answers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from difloat import quantizer, rounding
from difloat.formats import Format
from difloat.layers import QuantizedLayer
from difloat.methods.observe import Call, removed
from difloat.methods.search import CLIPS, search
from difloat.quantizer import Granularity, LayerPlan, Part, QuantSpec

MIN_MAX: tuple[float, ...] = (1.0,)
_SAMPLES = 1 << 19  # values of one activation tensor that a search looks at


@dataclass(frozen=True)
class Rule:
    """What a recipe asks of one tensor; the search fills in the rest.

    Attributes:
        formats: Candidates; the one with the lowest squared error is taken.
        granularity: What shares a scale.
        group_size: With granularity "group".
        clips: Candidate ranges as fractions of the largest magnitude; `MIN_MAX` for no clipping.
        zero_points: Candidate offsets as fractions of the smallest value, or None for grids that start at zero.
        online: Activations only: scales from the data at run time, nothing is searched but the format is the first.
    """

    formats: tuple[Format, ...]
    granularity: Granularity = "tensor"
    group_size: int | None = None
    clips: Sequence[float] = CLIPS
    zero_points: Sequence[float] | None = None
    online: bool = False

    def spec(self, format: Format) -> QuantSpec:
        """The specification that results when the search chose `format`."""
        zero_point = self.zero_points is not None and not self.online
        return QuantSpec(format, self.granularity, self.group_size, self.online, zero_point)


@dataclass(frozen=True)
class Draft:
    """A layer on its way to a plan: float weight, chosen specs, scales; `plan` encodes it.

    Attributes:
        weight: Float [o, i, *k], the original values.
        parts: As in `LayerPlan`.
        scales: Per part, of the weight.
        zero_points: Per part, of the weight (zeros where the spec has none).
        error: Sum of squared errors of the weight, all parts.
        input_scales: Per part, None while unknown or not stored.
        input_zero_points: Likewise.
        rounded: Learned values on the grid, in place of nearest rounding.
    """

    weight: Tensor = field(repr=False)
    parts: tuple[Part, ...]
    scales: tuple[Tensor, ...] = field(repr=False)
    zero_points: tuple[Tensor, ...] = field(repr=False)
    error: float
    input_scales: tuple[Tensor | None, ...] = ()
    input_zero_points: tuple[Tensor | None, ...] = ()
    rounded: Tensor | None = field(default=None, repr=False)

    def plan(self) -> LayerPlan:
        """Encode and pack."""
        return quantizer.plan_layer(
            self.weight if self.rounded is None else self.rounded,
            self.parts,
            self.scales,
            weight_zero_points=self.zero_points,
            input_scales=self.input_scales,
            input_zero_points=self.input_zero_points,
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
            factor = quantizer.expand_scale(scale, spec, piece.shape)
            shift = zero if spec.zero_point else torch.zeros_like(scale)
            offset = quantizer.expand_scale(shift, spec, piece.shape)
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
    weight = weight.detach()
    parts, scales, zeros, error = [], [], [], 0.0
    for piece in weight.float().split(list(splits), dim=1):
        rows = quantizer.rows_of(piece, rule.spec(rule.formats[0]))
        found = search(rows, rule.formats, clips=rule.clips, zero_points=rule.zero_points)
        parts.append(Part(piece.shape[1], rule.spec(found.format)))
        scales.append(found.scale)
        zeros.append(found.zero_point)
        error += float(found.error.sum())
    return Draft(weight, tuple(parts), tuple(scales), tuple(zeros), error)


def draft_inputs(draft: Draft, x: Tensor, rule: Rule, generator: torch.Generator) -> Draft:
    """Choose format and scale of a layer's input from a sample of it.

    Args:
        draft: The layer.
        x: Its input, [..., i] for a linear layer, [b, i, h, w] for a convolution.
        rule: What is asked; an online rule takes its first format and looks at nothing.
        generator: Draws the values that are looked at (at most half a million per part, the extremes always).
    """
    axis = -1 if draft.weight.dim() == 2 else 1
    parts: list[Part] = []
    scales: list[Tensor | None] = []
    zeros: list[Tensor | None] = []
    channels = [part.channels for part in draft.parts]
    # A grouped convolution reads more channels than each row of its weight has; it is never cut into parts.
    pieces = [x.detach()] if len(channels) == 1 else x.detach().split(channels, dim=axis)
    for piece, part in zip(pieces, draft.parts, strict=True):
        if rule.online:
            parts.append(replace(part, activation=rule.spec(rule.formats[0])))
            scales.append(None)
            zeros.append(None)
            continue
        found = search(
            _sample(piece, generator), rule.formats, clips=rule.clips, zero_points=rule.zero_points
        )
        parts.append(replace(part, activation=rule.spec(found.format)))
        scales.append(found.scale)
        zeros.append(found.zero_point if rule.zero_points is not None else None)
    return replace(draft, parts=tuple(parts), input_scales=tuple(scales), input_zero_points=tuple(zeros))


def _sample(x: Tensor, generator: torch.Generator) -> Tensor:
    """A row [1, n] of values of `x`, its smallest and largest among them."""
    flat = x.float().reshape(-1).cpu()
    if flat.numel() <= _SAMPLES:
        return flat[None]
    chosen = torch.randint(flat.numel(), (_SAMPLES - 2,), generator=generator)
    return torch.cat([flat[chosen], flat.min()[None], flat.max()[None]])[None]


def search_inputs(
    model: nn.Module,
    call: Call,
    drafts: Mapping[str, Draft],
    rules: Mapping[str, Rule],
    generator: torch.Generator,
) -> dict[str, Draft]:
    """Choose the input quantization of every layer in the order of execution, earlier layers already quantized.

    One forward pass does it all: just before a layer runs, its input (which earlier, quantized layers made) is searched,
    and the layer runs with the result.

    Args:
        model: Its layers are quantized in place: on entry weights only, on return inputs too.
        call: One call with all calibration rows.
        drafts: The layers of `model`.
        rules: What is asked of the inputs; layers without a rule keep their input.
        generator: See `draft_inputs`.

    Returns:
        The drafts with inputs; those of layers that `call` did not reach are unchanged.
    """
    done = dict(drafts)

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if done[name].input_scales:
                return
            if not torch.isfinite(inputs[0]).all():
                raise ValueError(
                    f"inputs of layer {name!r} must be finite, got NaN or Inf; calibrate in float32"
                )
            done[name] = draft_inputs(done[name], inputs[0], rules[name], generator)
            assert isinstance(module, QuantizedLayer)
            module.load(done[name].plan(), inputs[0].device)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in rules]
    with removed(handles), torch.no_grad():
        model(*call[0], **call[1])
    return done
