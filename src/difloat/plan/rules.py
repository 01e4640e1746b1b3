"""The rule that a recipe gives for a tensor, and the draft of a layer that fulfils it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from difloat.numbers import formats, hadamard, rounding
from difloat.numbers.formats import Format
from difloat.numbers.scale_grids import ScaleFormat, Snap, row_units, snapping
from difloat.numbers.search import (
    CLIPS,
    FEW_LEVELS_BITS,
    OFFSETS,
    SHRUNK,
    SHRUNK_FAR,
    ZERO_POINTS,
    Found,
    coarse,
    search,
)
from difloat.plan import encode
from difloat.plan.plan import LayerPlan
from difloat.plan.scales import expand_scale, rows_of
from difloat.plan.specs import Granularity, Part, QuantSpec, Rotation

MIN_MAX: tuple[float, ...] = (1.0,)


_ROUGH_STEP = 2  # of so many candidates a rough search tries one
FEW_BITS = 4  # up to this width inputs need groups
_LEVELS = {2: "t2g", 3: "t3g", 4: "iq4nl"}  # with more levels, integers are as good
LOPSIDED = 0.5  # from here on unsigned formats are tried for an input


@dataclass(frozen=True)
class Rule:
    """A recipe's rule for one tensor. The search decides what the rule leaves open.

    Attributes:
        formats: Candidates; the one with the lowest squared error is taken.
        granularity: What shares a scale.
        group_size: How many values share a scale, with granularity "group".
        clips: Candidate ranges as fractions of the largest magnitude; `MIN_MAX` for no clipping.
        zero_points: Candidate offsets as fractions of the smallest value (online: any, the smallest value is taken), or
            None for grids that start at zero.
        online: Activations only. Scales come from the data at run time, so nothing is searched and the format is the first.
        unsigned_clips: Candidate ranges of unsigned formats, if others than `clips`.
        asymmetry: Unsigned formats are tried beside the signed ones where the values are at least so lopsided
            (`lopsidedness`), at 0 everywhere.
        scales: Grid that the scales are restricted to. With "whole" they are multiples of a number per row, of channels or
            groups. With zero points it is "float16", and they lie on it as well.
        fitted: Whether the levels of a table are fitted to the weight, which starts from those of the format. Parts that know
            inputs do it (`methods.fitted_levels`).
        rough: Whether every tenth clip value, or every second of a few with every second zero point, is enough for a start,
            since scales are fitted anew later.
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
    fitted: bool = False
    rough: bool = False

    def __post_init__(self) -> None:
        if self.scales == "whole" and (
            self.granularity not in ("channel", "group") or self.zero_points is not None
        ):
            raise ValueError(
                "whole multiples of a row's number must be scales of channels or groups without zero points, "
                f"got one per {self.granularity}; write --set weight_granularity=group"
            )
        if self.scales not in ("float32", "float16") and self.zero_points is not None:
            raise ValueError(
                f"scales must be float32 where there are zero points, or float16, got {self.scales!r}"
            )

    def spec(self, format: Format) -> QuantSpec:
        """The specification that results when the search chose `format`."""
        zero_point = self.zero_points is not None and not format.signed
        return QuantSpec(format, self.granularity, self.group_size, self.online, zero_point)

    def search(self, rows: Tensor) -> Found:
        """Search the `formats` for the best one for rows [rows, n] that share a scale each, as `search.search` does.

        Unsigned formats with zero points are left out where the values lie about as far below zero as above (`asymmetry`).
        """
        snap = snapping(rows, self.scales)
        if self.zero_points is None:
            return self._signed(rows, self.formats, snap)
        signed = [f for f in self.formats if f.signed]
        unsigned = [f for f in self.formats if not f.signed]
        if signed and self.asymmetry and lopsidedness(rows) < self.asymmetry:
            unsigned = []
        found = [self._signed(rows, signed, snap)] if signed else []
        if unsigned:
            clips = self.unsigned_clips or self.clips
            offsets = _offsets(rows, self.zero_points) if self.asymmetry else self.zero_points
            if self.rough:
                clips, offsets = clips[::-_ROUGH_STEP], offsets[::-_ROUGH_STEP]  # the widest stays
            asked: dict[str, Any] = {"clips": clips, "zero_points": offsets, "zero_format": self.scales}
            asked |= {"refine": 2 if self.rough else 1, "rough": self.rough}
            found.append(search(rows, unsigned, snap=snap, **asked))
        return min(found, key=lambda one: float(one.error.sum()))

    def _signed(self, rows: Tensor, formats: Sequence[Format], snap: Snap | None) -> Found:
        clips, refine = coarse(self.clips, formats[0])
        if self.rough and refine > 1:
            clips, refine = clips[::-_ROUGH_STEP], 1
        return search(rows, formats, clips=clips, refine=refine, snap=snap, rough=self.rough)


def lopsidedness(values: Tensor) -> float:
    """1 minus the shorter side of the values over the longer one, which is 0 for symmetric values and 1 for one-sided ones.

    >>> lopsidedness(torch.linspace(-1, 1, 101)) < 0.01, lopsidedness(torch.linspace(0, 1, 101))
    (True, 1.0)

    It is taken of the extremes or of the 1 % and 99 % quantiles, whichever is more lopsided, so that a single outlier on the
    shorter side does not make values symmetric. It only says whether both signs are worth trying. The squared error decides.
    """
    low, high = (float(end) for end in values.aminmax())
    _, inner_low, _, inner_high, _ = quantiles(values)
    return max(_lopsided(low, high), _lopsided(inner_low, inner_high) if inner_low < inner_high else 0.0)


def floating_point(bits: int) -> Format:
    """The usual format of a width, which has two exponent bits below 8 bits and four at 8 (E2M1, E2M3, E4M3).

    >>> floating_point(4).name, floating_point(8).name
    ('e2m1', 'e4m3')
    """
    exponent_bits = min(4 if bits == 8 else 2, bits - 1)
    return Format(True, exponent_bits, bits - 1 - exponent_bits)


def more_mantissa(bits: int, wide: bool = False) -> Format:
    """The formats of FP4DiT (arXiv:2503.15465): two exponent bits, three at 8 bits (E2M1, E2M3, E3M4).

    With `wide` one mantissa bit is an exponent bit instead (E3M2 at 6 bits, E4M3 at 8).
    """
    exponent_bits = min((3 if bits == 8 else 2) + wide, bits - 1)
    return Format(True, exponent_bits, bits - 1 - exponent_bits)


def asymmetric_integers(bits: int, granularity: Granularity, group_size: int | None = None) -> Rule:
    """Unsigned integers with a real zero point, both ends of the range searched by squared error."""
    grid = (formats.parse(f"uint{bits}"),)
    far = bits <= FEW_LEVELS_BITS
    clips, zero_points = (SHRUNK_FAR, ZERO_POINTS) if far else (SHRUNK, OFFSETS)
    return Rule(grid, granularity, group_size, clips=clips, zero_points=zero_points)


def levels_or_integers(bits: int, granularity: Granularity, group_size: int | None = None) -> Rule:
    """Up to 4 bits a table of levels made for normal weights, with scales of either sign, and asymmetric integers above."""
    if bits not in _LEVELS:
        return asymmetric_integers(bits, granularity, group_size)
    return Rule((formats.parse(_LEVELS[bits]),), granularity, group_size)


def every_format(bits: int) -> tuple[Format, ...]:
    """All floating-point formats of a width and, up to 4 bits, the table of levels made for normal weights.

    >>> [format.name for format in every_format(4)]
    ['e3m0', 'e2m1', 'e1m2', 'iq4nl']
    """
    table = (formats.parse(_LEVELS[bits]),) if bits in _LEVELS else ()
    return (*formats.candidates(bits), *table)


def online_integers(bits: int | None, group_size: int) -> Rule | None:
    """The rule for inputs with scales from the data.

    Up to 4 bits they have a scale and a zero point per token and group of channels, above a scale per token.

    Args:
        bits: Width of an input. None leaves it as it is.
        group_size: Channels of a group. 0 takes one scale per token at every width.
    """
    if bits is None:
        return None
    if bits > FEW_BITS or not group_size:
        return Rule((formats.parse(f"int{bits}"),), "token", clips=MIN_MAX, online=True)
    grid = (formats.parse(f"uint{bits}"),)
    return Rule(grid, "group", group_size, clips=MIN_MAX, zero_points=MIN_MAX, online=True)


def floating_grids(bits: int, granularity: Granularity, group_size: int | None = None) -> Rule:
    """The rule that tries every floating-point format of the width, unsigned ones with a zero point.

    For whole tensors the unsigned ones are tried only where one side of the values is short.

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


_SMALLEST_BLOCK = 16  # below it a rotation spreads little


def block_rotation(shape: Sequence[int], most: int = 256, permuted: bool = False) -> Rotation | None:
    """The rotation of the inputs of a weight [o, i, *k] in the largest blocks of up to `most` channels.

    >>> block_rotation((64, 1152))
    Rotation(block=128, seed=0, permuted=False, regular=False)
    >>> block_rotation((64, 72)), block_rotation((64, 64, 3, 3))
    (None, None)

    Returns:
        None for convolutions, and where no block of 16 channels or more divides the channels.
    """
    block = hadamard.largest_block(shape[1], most)
    return Rotation(block, permuted=permuted) if len(shape) == 2 and block >= _SMALLEST_BLOCK else None


@dataclass(frozen=True)
class Draft:
    """A layer on its way to a plan, which `plan` encodes without inputs.

    Attributes:
        weight: Float [o, i, *k], the original values.
        parts: Pieces of the input channels, as in `LayerPlan`.
        scales: The weight's scales, one tensor per part.
        zero_points: The weight's zero points, one tensor per part, which is zero where the spec has none.
        error: Sum of squared errors of the weight, all parts.
        scale_format: The grid that the scales lie on, and the zero points where it is float16.
    """

    weight: Tensor = field(repr=False)
    parts: tuple[Part, ...]
    scales: tuple[Tensor, ...] = field(repr=False)
    zero_points: tuple[Tensor, ...] = field(repr=False)
    error: float
    scale_format: ScaleFormat = "float32"

    def plan(self, rounded: Tensor | None = None) -> LayerPlan:
        """Encode and pack the weight, or values on the grid that were learned in place of nearest rounding."""
        return encode.plan_layer(
            self.weight if rounded is None else rounded,
            self.parts,
            self.scales,
            weight_zero_points=self.zero_points,
        )

    def grid_neighbours(self) -> tuple[Tensor, Tensor, Tensor]:
        """Find the grid value below every weight, the one above it, and where the weight lies between them (0 to 1).

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
        units = row_units(piece.flatten(1)) if rule.scales == "whole" else None  # [o, 1]
        scaled = piece if units is None else piece / units.reshape(-1, *[1] * (piece.dim() - 1))
        found = rule.search(rows_of(scaled, rule.spec(rule.formats[0])))
        parts.append(Part(piece.shape[1], rule.spec(found.format)))
        scales.append(
            found.scale if units is None else (found.scale.reshape(len(units), -1) * units).flatten()
        )
        zeros.append(found.zero_point)
        error += float(found.error.sum())
    return Draft(weight, tuple(parts), tuple(scales), tuple(zeros), error, rule.scales)


@dataclass(frozen=True)
class Bits:
    """Widths of weights and activations.

    Attributes:
        weight: The bits of weights. For a fractional average it is the whole number above.
        activation: The bits of activations, or None to leave them as they are.
        average: What weights have on average, where that is no whole number; only recipes that choose widths by layer can.
        wide: How it was written that activations stay: a16 and a32 mean the same.
    """

    weight: int
    activation: int | None
    average: float | None = None
    wide: Literal[16, 32] = field(default=16, compare=False, repr=False)

    @property
    def mean(self) -> float:
        """Bits of a weight on average."""
        return self.weight if self.average is None else self.average

    @staticmethod
    def parse(text: str) -> Bits:
        """Read "w4a8" or "w3.5a8", where 16 or 32 activation bits mean unquantized. ValueError on anything else."""
        match = re.fullmatch(r"w([0-9]{1,2}(?:\.[0-9]{1,3})?)a([0-9]{1,2})", text.strip().lower())
        if not match:
            raise ValueError(
                f"bits must look like 'w4a8' or 'w3.5a8', got {text!r}; write weight bits and activation bits"
            )
        mean, activation = float(match.group(1)), int(match.group(2))
        if not 2 <= mean <= 8 or not (2 <= activation <= 8 or activation in (16, 32)):
            raise ValueError(
                f"bits must be 2 to 8 for weights and 2 to 8, 16 or 32 for activations, got {text!r}"
            )
        weight = math.ceil(mean)
        average = None if mean == weight else mean
        if activation > 8:
            return Bits(weight, None, average, 32 if activation == 32 else 16)
        return Bits(weight, activation, average)

    def __str__(self) -> str:
        """Write the bits as `parse` reads them, like "w4a8", or "w4a16" and "w4a32" as given where activations stay."""
        return f"w{self.mean:g}a{self.activation or self.wide}"


QUANTILES = (0.0, 0.01, 0.5, 0.99, 1.0)  # of an input, by which its shape is reported


def _offsets(values: Tensor, fractions: Sequence[float]) -> list[float]:
    """Fractions of the smallest value to try as zero points.

    Where outliers lie far below the 1 % quantile, the fractions of the quantile are tried as well.
    """
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
