"""Plain data that is checked: pydantic dataclasses whose errors are one sentence.

```python
@record("band of rows")
class Band:
    rows: Annotated[int, Field(ge=1, le=LARGEST, title="rows of a band")]
```
Nothing is converted: JSON that was damaged or written by hand holds ``true`` where a number belongs, ``1e400`` (which Python
reads as infinity) or integers of a thousand digits. Only `read` with ``words=True`` takes what a user wrote, such as "7" for 7.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
import pydantic.dataclasses
from pydantic import ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import dataclass_transform

# No size in a plan is larger: no layer has more values, and products of two still fit 64 bits twice over.
LARGEST = 2**40
MOST_ENTRIES = 1 << 20  # of a list
OPTIONAL = Field(
    exclude_if=lambda value: not value
)  # of what JSON leaves out at its default: empty, false or None
LISTED = Field(strict=False, max_length=MOST_ENTRIES)  # of a tuple, which JSON holds as a list
TUPLE = Field(strict=False)  # of a tuple of so many entries
_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_FIELDS = ("missing", "unexpected_keyword_argument", "unexpected_positional_argument", "dataclass_type")
Record = TypeVar("Record")
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How an error says what a field must do, where its type does not say it well: "be names with commas between them"."""

    text: str


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def record(noun: str, each: str = "{}", *, finite: bool = True) -> Callable[[type[Record]], type[Record]]:
    """Make a class a frozen pydantic dataclass that takes no unknown field, converts nothing, and says errors in one sentence.

    Args:
        noun: The noun for an instance in errors, like "band of rows".
        each: The noun for its fields, like "option {}". A field with a title is called by it.
        finite: Whether Inf and NaN are refused, which only measurements may be.
    """

    def made(plain: type[Record]) -> type[Record]:
        plain.__get_pydantic_core_schema__ = classmethod(_schema)  # type: ignore[attr-defined]
        config = ConfigDict(**{**_CONFIG, "allow_inf_nan": not finite})
        cls: Any = pydantic.dataclasses.dataclass(frozen=True, config=config)(plain)
        validating = cls.__init__

        @functools.wraps(validating)
        def init(self: Any, *values: Any, **named: Any) -> None:
            try:
                validating(self, *values, **named)
            except ValidationError as error:
                raise ValueError(sentence(error, cls)) from error

        cls.__init__, cls.__noun__, cls.__each__ = init, noun, each
        return cls

    return made


def _schema(cls: type[Any], source: Any, handler: Any) -> Any:
    """The class's own schema, which is strict in its fields, but takes a JSON object in place of an instance."""
    schema = handler(source)
    handler.resolve_ref_schema(schema)["strict"] = False
    return schema


def read(cls: type[Record], data: Any, *, words: bool = False) -> Record:
    """An instance from plain data, such as a JSON object.

    Args:
        cls: A class that `record` made.
        data: The names and values of its fields.
        words: Whether the values come from a user, who writes "7" for 7 and "yes" for true.

    Raises:
        ValueError: one sentence about the first field that is missing, unknown, of another type or out of range.
    """
    try:
        found: Record = cls.__pydantic_validator__.validate_python(  # type: ignore[attr-defined]
            data, strict=False if words else None
        )
        return found
    except ValidationError as error:
        raise ValueError(sentence(error, cls, words=words)) from error


def read_texts(cls: type[Record], texts: Mapping[str, str]) -> Record:
    """An instance from the JSON text of every field, as files of tensors carry them. ValueError as from `read`."""
    return read(cls, {name: json.loads(text) for name, text in texts.items()})


def plain(instance: Any) -> dict[str, Any]:
    """The JSON object that `read` makes an equal instance of; `OPTIONAL` fields are left out at their defaults.

    Raises:
        ValueError: if a field of any type holds what JSON does not.
    """
    found: dict[str, Any] = type(instance).__pydantic_serializer__.to_python(instance, mode="json")
    return found


def sentence(error: ValidationError, cls: type[Any], *, words: bool = False) -> str:
    """One sentence about the first error: *what* must be *which rule*, got *value*. It is shorter about a user's `words`."""
    first = error.errors(include_url=False)[0]
    kind, found = first["type"], first["input"]
    if kind == "value_error":
        return str(first["ctx"]["error"])
    *outer, last = first["loc"] or ("",)
    if kind in _FIELDS:
        inner = [*outer, last] if kind == "dataclass_type" and first["loc"] else outer
        owner = _record_in(_described(cls, inner)[1]) or cls
        got = found if kind == "dataclass_type" else last if kind != "missing" else _names(found)
        return f"{owner.__noun__} must have the fields {_fields(owner)} and no others, got {shown(got)}"
    called, hint, limits = _described(cls, first["loc"])
    if words and kind == "greater_than_equal" and first["ctx"]["ge"] == 0:
        return f"{called} must not be negative, got {shown(found)}"
    return f"{called} must {_rule(hint, limits)}, got {shown(found)}"


def _fields(cls: type[Any]) -> str:
    """The names of the fields that a record must have, and of those that it may have."""
    names: dict[bool, list[str]] = {True: [], False: []}
    for name, info in sorted(cls.__pydantic_fields__.items()):
        names[info.is_required()].append(name)
    needed, optional = (", ".join(names[one]) for one in (True, False))
    return " and ".join(filter(None, [needed, optional and f"perhaps {optional}"]))


def _names(found: Any) -> Any:
    return (
        sorted(map(str, found))
        if isinstance(found, Mapping)
        else sorted(getattr(found, "kwargs", None) or {})
    )


def _described(cls: type[Any], place: Any) -> tuple[str, Any, list[Any]]:
    """The noun for the value at a place, its type, and its limits."""
    called, hint, limits = cls.__noun__, cls, list[Any]()
    for step in place:
        if step == "[key]":
            return f"name in {called}", str, []
        owner = _record_in(hint)
        if owner is not None:
            name = step if isinstance(step, str) else [*owner.__pydantic_fields__][step]
            info = owner.__pydantic_fields__[name]
            called, hint, limits = (
                info.title or owner.__each__.format(name),
                info.annotation,
                [*info.metadata],
            )
        else:
            inner = get_args(hint)
            hint, limits = inner[-1 if len(inner) == 2 and inner[1] is not ... else 0], []
            called = f"entry of {called}"
        hint, more = bare(hint)
        limits += more
        titles = [one.title for one in more if isinstance(one, FieldInfo) and one.title]
        called = titles[0] if titles else called
    return called, hint, limits


def bare(hint: Any) -> tuple[Any, list[Any]]:
    """A type without None and annotations, and the annotations with what is in their fields."""
    found: list[Any] = []
    while get_origin(hint) in (Annotated, Union, UnionType):
        if get_origin(hint) is Annotated:
            hint, *more = get_args(hint)
            for one in more:
                found += [one, *(one.metadata if isinstance(one, FieldInfo) else ())]
        else:
            hint = next(one for one in get_args(hint) if one is not NoneType)
    return hint, found


def descriptions(cls: type[Any]) -> dict[str, str]:
    """What the docstring of a class says of each of its fields, under "Attributes:"."""
    _, _, attributes = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    for line in attributes.splitlines():
        if match := re.match(r"    (\w+): (.*)", line):
            name = match[1]
            found[name] = match[2]
        elif line.strip():
            found[name] += f" {line.strip()}"
    return found


def _record_in(hint: Any) -> Any:
    return hint if get_origin(hint) is None and hasattr(hint, "__noun__") else None


def _rule(hint: Any, limits: list[Any]) -> str:
    for one in limits:
        if isinstance(one, Rule):
            return one.text
    origin = get_origin(hint) or hint
    if origin is Literal:
        return f"be one of {', '.join(map(str, get_args(hint)))}"
    if origin in (int, float):
        return _range(hint, limits)
    if isinstance(origin, type) and issubclass(origin, list | tuple):
        return f"be a list of at most {MOST_ENTRIES} entries"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "be an object"
    return {bool: "be true or false", str: "be text"}.get(origin, f"be a {getattr(hint, '__name__', hint)}")


def _range(hint: type[float], limits: list[Any]) -> str:
    number = "a whole number" if hint is int else "a finite number"
    least = next((one.ge for one in limits if isinstance(one, annotated_types.Ge)), None)
    most = next((one.le for one in limits if isinstance(one, annotated_types.Le)), None)
    if least is not None and most is not None:
        return f"be {number} from {least} to {most}"
    return f"be {number}" + (f" of at least {least}" if least is not None else "")


def shown(value: Any) -> str:
    """A value as an error shows it, in at most 80 characters. A long number, which Python does not write out, is its length."""
    if type(value) is int and value.bit_length() > 200:
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, Mapping | list | tuple) and len(value) > 16:
        return f"{type(value).__name__} of {len(value)} entries"
    try:
        return f"{value!r:.80}"
    except ValueError:  # a long number somewhere inside
        return f"{type(value).__name__} with a number of thousands of digits"
