"""From what a user writes to the options of a recipe."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_type_hints


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
    return converted
