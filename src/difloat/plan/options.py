"""The options of a recipe made of what a user writes, of which none is ignored without a word."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field
from typing_extensions import dataclass_transform

from difloat.numbers import formats
from difloat.plan.rules import Bits
from difloat.plan.validation import NotNegative, Positive, Rule, Whole, read, record

__all__ = [
    "FEW_BITS",
    "FormatOr",
    "Names",
    "NotNegative",
    "Positive",
    "Whole",
    "checked",
    "make_options",
    "recipe_options",
]

FEW_BITS = 4  # up to this width rounding is learned
Options = TypeVar("Options")


def _separate(names: Any) -> Any:
    """The names in a text with commas between them."""
    if isinstance(names, str):
        return tuple(name for name in map(str.strip, names.split(",")) if name)
    return names


Names = Annotated[
    tuple[str, ...],
    BeforeValidator(_separate),
    Field(strict=False),
    Rule("be names with commas between them"),
]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def recipe_options(cls: type[Options]) -> type[Options]:
    """Make a class the options of a recipe: a `validation.record`."""
    return record("options", each="option {}")(cls)


@dataclass(frozen=True)
class FormatOr:
    """Marks an option for the format of weights: a name, of as many bits as weights have, or one of `words`."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class _Need:
    """What options depend on: without it, a value other than the default would change nothing."""

    names: tuple[str, ...]
    what: str
    met: Callable[[Any, Bits], bool]


def _few_bits(options: Any, bits: Bits) -> bool:
    return bits.weight <= FEW_BITS


def _has_inputs(options: Any, bits: Bits) -> bool:
    return bits.activation is not None


_NEEDS = (
    _Need(
        ("iterations", "rounding_rows", "learning_rate", "scale_aware", "inputs"),
        f"weights of at most {FEW_BITS} bits, whose rounding is learned",
        _few_bits,
    ),
    _Need(
        ("precision",),
        f"fine-tuning, or learned rounding of weights of at most {FEW_BITS} bits",
        lambda options, bits: hasattr(options, "epochs") or _few_bits(options, bits),
    ),
    _Need(
        ("rounding",),
        f"weights of at most {FEW_BITS} bits",
        lambda options, bits: options.rounding != "learned" or _few_bits(options, bits),
    ),
    _Need(
        ("activation", "activation_format", "search", "range_rate"),
        "activations of at most 8 bits",
        _has_inputs,
    ),
    _Need(
        ("ranges_by_timestep",),
        "activations of at most 8 bits",
        lambda options, bits: not options.ranges_by_timestep or _has_inputs(options, bits),
    ),
    _Need(
        ("group_size",),
        "weight_granularity=group",
        lambda options, bits: getattr(options, "weight_granularity", "group") == "group",
    ),
    _Need(
        ("updates", "fresh_rows"),
        "fine-tuning (epochs of at least 1)",
        lambda options, bits: options.epochs > 0,
    ),
    _Need(("allocation",), "several adapters", lambda options, bits: options.adapters > 1),
    _Need(
        ("router_rate",),
        "a router (msfp, allocation=learned, at least 2 adapters)",
        lambda options, bits: (
            getattr(options, "adapters", 1) > 1 and getattr(options, "allocation", "learned") == "learned"
        ),
    ),
    _Need(("factor_power",), "dfa=true", lambda options, bits: getattr(options, "dfa", True)),
    _Need(
        ("plus", "criterion", "candidates"),
        "rows of several widths (mixed=true, less than 8 bits)",
        lambda options, bits: options.mixed and bits.weight < 8,
    ),
    _Need(
        ("guidance", "factor_power"),
        "widths=rows or layers, polish or judge",
        lambda options, bits: (
            getattr(options, "widths", "rows") != "same"
            or getattr(options, "polish", 0) > 0
            or getattr(options, "judge", False)
        ),
    ),
    _Need(("size",), "widths=rows or layers", lambda options, bits: options.widths != "same"),
    _Need(
        ("polish_minutes", "polish_rate", "polish_rows"),
        "polish of at least one update",
        lambda options, bits: options.polish > 0,
    ),
    _Need(
        ("judge",),
        "an optional part (polish, rotate or branch)",
        lambda options, bits: options.polish > 0 or options.rotate != "none" or options.branch > 0,
    ),
    _Need(
        ("size",),
        "whole weight bits, which it takes the place of",
        lambda options, bits: bits.average is None,
    ),
    _Need(("smoothing",), "at least one stretch", lambda options, bits: getattr(options, "stretches", 1) > 0),
)


def checked(options: Any, bits: Bits, averages: bool = False) -> Any:
    """`options` themselves, unless one was changed that would change nothing at these widths, or beside the other options.

    Args:
        options: A recipe's options.
        bits: Asked for.
        averages: Whether the recipe can give weights a fraction of bits on average.

    Raises:
        ValueError: names the first such option, and what it must come with; or the format of weights that is none, is not
            signed, or is of another width.
    """
    if bits.average is not None and (not averages or getattr(options, "widths", "") == "same"):
        raise ValueError(
            f"weight bits must be a whole number where layers have them alike, got {bits}; choose recipe auto, not widths=same"
        )
    for field in dataclasses.fields(options):
        value, usual = getattr(options, field.name), field.default
        for mark in type(options).__pydantic_fields__[field.name].metadata:
            if isinstance(mark, FormatOr):
                _check_format(field.name, value, mark.words, bits.weight)
        for need in _NEEDS:
            if field.name in need.names and value != usual and not need.met(options, bits):
                raise ValueError(
                    f"{field.name} must come with {need.what}, got {field.name}={value} at {bits}; leave it out"
                )
    return options


def check_formats_open(options: Any) -> None:
    """Refuse an option that names the format of weights where layers are to have several widths."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        for mark in type(options).__pydantic_fields__[field.name].metadata:
            if isinstance(mark, FormatOr) and value not in mark.words:
                raise ValueError(
                    f"{field.name} must be left open with bits_from, as layers have several widths, got {value!r}; leave it out"
                )


def _check_format(name: str, value: str, words: tuple[str, ...], bits: int) -> None:
    if value in words:
        return
    try:
        format = formats.parse(value)
    except ValueError as error:
        known = " or ".join(filter(None, words))
        raise ValueError(
            f"{name} must be {f'{known}, or ' if known else ''}a format, got {value!r}: {error}"
        ) from error
    if not format.signed:
        raise ValueError(f"{name} must be a signed format, got {format.name}; write for example 'e2m1'")
    if format.bits != bits:
        raise ValueError(
            f"{name} must have the {bits} bits asked for, got {format.name}; change --bits or the format"
        )


def make_options(options: type[Options], values: Mapping[str, Any]) -> Options:
    """Make options of the class `options` from user values, converting strings to the field's type.

    Raises:
        ValueError: on an unknown option, or a value that is not of the option's type or choices.
    """
    fields = {field.name for field in dataclasses.fields(options)}  # type: ignore[arg-type]  # made by `record`
    unknown = sorted(set(values) - fields)
    if unknown:
        raise ValueError(f"options must be among {', '.join(sorted(fields))}, got {', '.join(unknown)}")
    return read(options, values, words=True)
