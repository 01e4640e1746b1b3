"""From what a user writes to the options of a recipe; none of them is ignored without a word."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from difloat.numbers import formats
from difloat.plan.rules import Bits

_AT_LEAST_ONE = ("iterations", "rounding_rows", "rows", "relation_every")
FEW_BITS = 4  # up to this width rounding is learned


def format_field(*words: str) -> Any:
    """A field for the format of weights: a name, of as many bits as weights have, or one of `words`, the first by default."""
    return dataclasses.field(default=words[0], metadata={"words": words})


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
    _Need(("activation", "search", "range_rate"), "activations of at most 8 bits", _has_inputs),
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
        "widths=allocated",
        lambda options, bits: getattr(options, "widths", "allocated") == "allocated",
    ),
    _Need(("smoothing",), "at least one stretch", lambda options, bits: options.stretches > 0),
)


def checked(options: Any, bits: Bits) -> Any:
    """`options` themselves, unless one was changed that would change nothing at these widths, or beside the other options.

    Raises:
        ValueError: names the first such option, and what it must come with; or the format of weights that is none, is not
            signed, or is of another width.
    """
    for field in dataclasses.fields(options):
        value, usual = getattr(options, field.name), field.default
        if "words" in field.metadata:
            _check_format(field.name, value, field.metadata["words"], bits.weight)
        for need in _NEEDS:
            if field.name in need.names and value != usual and not need.met(options, bits):
                raise ValueError(
                    f"{field.name} must come with {need.what}, got {field.name}={value} at {bits}; leave it out"
                )
    return options


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


def make_options(options: type[Any], values: Mapping[str, Any]) -> Any:
    """Options of a recipe, of the class `options`, from user values; strings are converted to the field's type.

    Raises:
        ValueError: on an unknown option, or a value that is not of the option's type or choices.
    """
    fields = {field.name for field in dataclasses.fields(options)}
    unknown = sorted(set(values) - fields)
    if unknown:
        raise ValueError(f"options must be among {', '.join(sorted(fields))}, got {', '.join(unknown)}")
    hints = get_type_hints(options)
    return options(**{name: _converted(name, value, hints[name]) for name, value in values.items()})


def _converted(name: str, value: Any, hint: Any) -> Any:
    choices = getattr(hint, "__args__", ()) if "Literal" in str(hint) else ()
    if choices:
        if value not in choices:
            raise ValueError(f"option {name} must be one of {', '.join(map(str, choices))}, got {value!r}")
        return value
    if str(hint).startswith("tuple"):
        if not isinstance(value, str | list | tuple):
            raise ValueError(f"option {name} must be names with commas between them, got {value!r}")
        items = [item.strip() for item in value.split(",")] if isinstance(value, str) else list(value)
        return tuple(item for item in items if item)
    if hint is bool and isinstance(value, str):
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if value.lower() not in words:
            raise ValueError(f"option {name} must be true or false, got {value!r}")
        return words[value.lower()]
    try:
        converted = hint(value)
        exact = hint is not int or isinstance(value, str) or converted == value
    except (TypeError, ValueError, OverflowError):
        exact = False
    if not exact:
        raise ValueError(f"option {name} must be a {hint.__name__}, got {value!r}")
    if hint is float and not math.isfinite(converted):
        raise ValueError(f"option {name} must be finite, got {value!r}")
    if hint in (int, float) and converted < 0:
        raise ValueError(f"option {name} must not be negative, got {value!r}")
    if name in _AT_LEAST_ONE and converted < 1:
        raise ValueError(f"option {name} must be at least 1, got {value!r}")
    return converted
