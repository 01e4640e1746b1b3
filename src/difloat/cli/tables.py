"""What the command line prints at length: what a run will take, and what it gave."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table

from difloat.numbers import formats
from difloat.report.record import zeros_note
from difloat.report.text import size_text

if TYPE_CHECKING:
    from pathlib import Path

    from difloat.job import Job
    from difloat.report.render import Record

console = Console()
_NAMES = 20  # of layers in one line


def announce(
    fitted: Job, texts: list[str] | None, words: Mapping[str, str], call: dict[str, Any], *, dry: bool
) -> None:
    """Print what a run will take; for a dry run the plan by kinds of layers too, and times from one call of the denoiser.

    Args:
        fitted: What is asked for, and of which pipeline.
        texts: The prompts to calibrate with, or None for a pipeline without text.
        words: The recipe's options as the user wrote them.
        call: Further arguments of the pipeline's call.
        dry: Whether that is all that is done.
    """
    from difloat import estimate, run
    from difloat.calibration import collect, first_call

    asked, settings = fitted.request, fitted.request.calibration
    expected = estimate.forecast(fitted, texts, call)
    heading = f"{asked.recipe} {asked.bits}{''.join(f', {key}={value}' for key, value in words.items())}: "
    console.print(heading + run.describe(expected, settings), highlight=False, soft_wrap=True)
    if not dry:
        return
    kinds = Table(
        Column("first layer of its kind", overflow="fold"), "layers", "weights", "inputs, or why it stays"
    )
    for kind in expected.kinds:
        kinds.add_row(kind.name, str(kind.count), kind.weight, kind.inputs)
    console.print(kinds)
    if expected.rows:
        console.print("times need one timed call of the denoiser: it is made now", highlight=False)
        sampling = collect.sampling_of(fitted.model, texts, settings, call)
        pace = first_call.time_a_call(fitted.model, sampling)
        console.print(run.in_time(expected, pace), highlight=False, soft_wrap=True)


def interval(low: float | None, high: float | None) -> str:
    """Both ends of an interval, or that there is none yet."""
    if low is None or high is None or not math.isfinite(low + high):
        return "needs more pictures"
    return f"{low:.4g} to {high:.4g}"


def print_made(made: Record, out: Path) -> None:
    """Print what a run gave, and where it is."""
    print_summary(made)
    console.print(f"checkpoint {out}\nreport     {out / 'report.html'}", highlight=False, soft_wrap=True)


def _code_bits(weight_format: str) -> int:
    """Bits of the widest format that a layer's weight is in."""
    return max(formats.parse(name).bits for name in re.split(r" \+ |/", weight_format))


def print_summary(made: Record) -> None:
    """Print quality, size, zeros and what was kept at more bits."""
    table = Table("measure", "value", "95 % interval", "full precision", title=made.title)
    for row in made.quality:
        reference = "" if row.reference is None else f"{row.reference:.4g}"
        value = f"{row.value:.4g} {row.unit}".strip()
        table.add_row(row.label, value, interval(row.low, row.high), reference)
    change = size_text(made.original_bytes, made.packed_bytes, 2)
    table.add_row(
        "denoiser on disk",
        decimal(made.packed_bytes, precision=2),
        f"{change}, {made.effective_bits:.2f} bits a weight",
        decimal(made.original_bytes, precision=2),
    )
    console.print(table)
    zeros = sum(row.zeros * row.bytes_before for row in made.layers) / sum(
        row.bytes_before for row in made.layers
    )
    integers = sum(row.integer_grid for row in made.layers)
    console.print(
        f"{len(made.layers)} layers quantized, {integers} of them on integer grids; {zeros:.1%} of the weights are 0\n"
        f"{_widths(made)}\n{_left(made)}",
        highlight=False,
        soft_wrap=True,
    )
    if made.size_remark:
        console.print(f"note       {made.size_remark}", highlight=False, soft_wrap=True)
    if note := zeros_note(made.layers):
        console.print(note, highlight=False)


def _widths(made: Record) -> str:
    """Which layers have more bits than were asked for, or what a recipe that chooses bits by layer gave them."""
    if made.shares:
        bits = [share.bits for share in made.shares]
        return f"bits chosen by layer: {min(bits):.2f} to {max(bits):.2f} a weight with scales (report: What bytes bought)"
    wider = [row.name for row in made.layers if _code_bits(row.weight_format) > made.weight_bits_nominal + 1]
    count = f" ({len(wider)} layers)" if len(wider) > _NAMES else ""
    return f"kept at more bits: {_named(wider) or 'none'}{count}"


def _named(names: list[str]) -> str:
    """Names, as far as a console holds them."""
    return ", ".join(names[:_NAMES]) + ", ..." * (len(names) > _NAMES)


def _left(made: Record) -> str:
    """What stays in float: layers by name, as far as a console holds them, and how much else there is."""
    layers = made.left_float
    rest = len(made.skipped) - len(layers)
    told = f"left in float: {_named([name for name, _, _ in layers]) or 'no layer'}"
    size = decimal(sum(size for _, _, size in layers), precision=2)
    return (
        told
        + f" ({len(layers)} layers, {size})" * bool(layers)
        + f"; {rest} modules without a layer" * bool(rest)
    )
