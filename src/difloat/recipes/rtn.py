"""Rounding to nearest: any format, min-max or searched clips, no learning. It is the baseline of all other recipes.

With groups and scales on the e4m3 grid or on powers of two it makes plans that NVFP4 and MXFP4 files hold without loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from difloat.methods import post_training
from difloat.methods.cost import Cost
from difloat.methods.post_training import Bits, LayerRules, Outcome, Sequencing, Task
from difloat.methods.trace import Trace
from difloat.numbers import formats
from difloat.numbers.scale_grids import ScaleFormat
from difloat.numbers.search import CLIPS
from difloat.plan.options import FormatOr, Names, Whole, recipe_options
from difloat.plan.rules import MIN_MAX, Rule, floating_point
from difloat.plan.specs import Granularity

SUMMARY = "rounding to nearest, floating point or integer, no learning; without data unless activation=static"


@recipe_options
class NearestOptions:
    """Options of round-to-nearest.

    Attributes:
        grid: "fp" (E2M1, E2M3, E4M3: two exponent bits below 8 bits, four at 8) or "int" (two's complement).
        scale: "mse" searches clip values by squared error, "minmax" takes the largest magnitude.
        keep_8bit: The layers that keep 8 bits, as "first", "last", or names of layers.
        split: Whether the two inputs of a skip concatenation are quantized apart.
        weight_granularity: What shares a weight scale.
        group_size: Input channels per weight scale, with granularity "group".
        weight_format: Name of the format of weights at the width asked for; "" takes the one of `grid`.
        scale_format: Grid of weight scales: "float32", "e4m3" (times one float32 number per tensor, as NVFP4 stores them),
            "e8m0" (powers of two, as MX formats do), "float16" (as GGUF does) or "whole" (multiples of a number per row).
        activation: "online" per token, which needs no data, or "static" per tensor from calibration.
    """

    grid: Literal["fp", "int"] = "fp"
    scale: Literal["mse", "minmax"] = "mse"
    keep_8bit: Names = ("first", "last")
    split: bool = True
    weight_granularity: Granularity = "channel"
    group_size: Whole = 128
    weight_format: Annotated[str, FormatOr(("",))] = ""
    scale_format: ScaleFormat = "float32"
    activation: Literal["online", "static"] = "online"


def needs_data(options: NearestOptions, bits: Bits) -> bool:
    """Whether the recipe needs data, which only stored input ranges do."""
    return bits.activation is not None and options.activation == "static"


def rtn(task: Task, options: NearestOptions) -> Outcome:
    """Quantize the task's model by rounding to nearest."""

    def rules(name: str, seen: Trace) -> LayerRules:
        kept = post_training.keeps_8bit(name, seen, options.keep_8bit)
        weight = _weight(task.bits_of(name), options, kept)
        if task.bits.activation is None:
            return LayerRules(weight, None)
        return LayerRules(weight, _input(8 if kept else task.bits.activation, options))

    return post_training.run(task, rules, Sequencing(split=options.split))


def cost(options: NearestOptions, bits: Bits) -> Cost:
    """The work that rounding to nearest asks of the denoiser, and its storage."""
    inputs = None if bits.activation is None else _input(bits.activation, options)
    return Cost(_weight(bits.weight, options, False), inputs, options.keep_8bit)


def _weight(bits: int, options: NearestOptions, kept: bool) -> Rule:
    wanted = formats.parse(options.weight_format) if options.weight_format else _grid(bits, options)
    grid = _grid(8, options) if kept and wanted.bits != 8 else wanted
    size = options.group_size if options.weight_granularity == "group" else None
    return Rule((grid,), options.weight_granularity, size, _clips(options), scales=options.scale_format)


def _input(bits: int, options: NearestOptions) -> Rule:
    if options.activation == "online":
        return Rule((_grid(bits, options),), "token", online=True)
    return Rule((_grid(bits, options),), clips=_clips(options))


def _grid(bits: int, options: NearestOptions) -> formats.Format:
    return formats.parse(f"int{bits}") if options.grid == "int" else floating_point(bits)


def _clips(options: NearestOptions) -> Sequence[float]:
    return CLIPS if options.scale == "mse" else MIN_MAX
