"""Options of commands made from the fields of records, so that types, limits, defaults and help stand where the field does.

```python
@app.command()
@with_fields
def repair(source: Source, calibration: Annotated[CalibrationSettings, Fields(CalibrationSettings)]) -> None: ...
```
gets ``--samples``, ``--steps`` and so on; the command is called with the record that the user's values make.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import annotated_types
import typer

from difloat.plan.validation import bare, descriptions, read

Words = Mapping[str, Any]  # what a user wrote, by field

_FLAGS = {"guidance_scale": "--guidance", "memory_bytes": "--memory-mb", "prompts_per_batch": "--batch"}
_SHIFTS = {"memory_bytes": 20}  # bits between the field's unit and the option's
_LISTED = (list, tuple)


@dataclasses.dataclass(frozen=True)
class Fields:
    """Marks a parameter of a command that stands for the fields of a record.

    Attributes:
        record: A dataclass. A parameter of this type is given an instance, a parameter of type `Words` the values.
        leave_out: Fields that are no options.
        only: The fields that are options. If it is empty, all that are not left out.
        panel: Heading of the options in the help; "" for the common one.
    """

    record: type[Any]
    leave_out: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    panel: str = ""

    @property
    def names(self) -> list[str]:
        """The fields that are options."""
        names = [one.name for one in dataclasses.fields(self.record)]
        return [name for name in self.only or names if name not in self.leave_out]


def with_fields(command: Callable[..., None]) -> Callable[..., None]:
    """The command with one option for every field of its parameters marked with `Fields`."""
    hints = get_type_hints(command, include_extras=True)
    plain, marked = list[inspect.Parameter](), dict[str, Fields]()
    options: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        mark = next((one for one in get_args(hint)[1:] if isinstance(one, Fields)), None)
        if mark is None:
            kept = parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)
            (plain if parameter.default is parameter.empty else options).append(kept)
        else:
            marked[parameter.name] = mark
            options += _options(mark)
    signature = inspect.Signature([*plain, *options])

    @functools.wraps(command)
    def called(**given: Any) -> None:
        values = signature.bind(**given)
        values.apply_defaults()
        arguments = dict(values.arguments)
        for name, mark in marked.items():
            words = {field: _in_unit(field, arguments.pop(field)) for field in mark.names}
            wants_record = get_args(hints[name])[0] is mark.record
            arguments[name] = read(mark.record, words, words=True) if wants_record else words
        command(**arguments)

    vars(called)["__signature__"] = signature
    called.__annotations__ = {one.name: one.annotation for one in signature.parameters.values()}
    return called


def _options(mark: Fields) -> list[inspect.Parameter]:
    hints, helps = get_type_hints(mark.record, include_extras=True), descriptions(mark.record)
    usual = {one.name: one.default for one in dataclasses.fields(mark.record)}
    return [_option(name, hints[name], usual[name], helps[name], mark.panel) for name in mark.names]


def _option(name: str, hint: Any, usual: Any, text: str, panel: str) -> inspect.Parameter:
    """One option, as typer reads it off a signature: a number keeps its limits, what is neither that nor a path is text."""
    kind, limits = bare(hint)
    shift = _SHIFTS.get(name, 0)
    least: Any = next((one.ge for one in limits if isinstance(one, annotated_types.Ge)), None)
    most: Any = next((one.le for one in limits if isinstance(one, annotated_types.Le)), None)
    flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
    if kind is bool and usual:
        flag = f"{flag}/--no-{flag[2:]}"
    taken: Any = kind if kind in (int, float, bool, Path) else str
    if get_origin(kind) in _LISTED:
        taken, usual, text = list[str], list(usual), f"{text} Repeatable."
    elif usual is not None and taken is str:
        usual = str(usual)
    elif shift:
        usual, least, text = usual >> shift, 1, f"{text} In MB."
    option = typer.Option(flag, help=text, min=least, max=most, rich_help_panel=panel or None)
    annotation: Any = Annotated[taken if usual is not None else taken | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=usual, annotation=annotation)


def _in_unit(name: str, value: Any) -> Any:
    return value << _SHIFTS[name] if name in _SHIFTS else value
