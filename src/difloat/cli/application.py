"""The application that the commands join, and what becomes of errors."""

from __future__ import annotations

import traceback

import typer
from rich.console import Console
from rich.markup import escape

from difloat import processes

app = typer.Typer(
    help="Low-bit floating-point quantization of diffusion models: one command makes a packed checkpoint and shows its cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_INTERRUPTED = 130  # typer's exit code for Ctrl-C
_UNEXPECTED = 3  # an error that no check foresaw: neither a broken gate (1) nor bad input (2)
_OF_CODE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)


def main() -> None:
    """Run the command line; bad input gives one sentence and exit code 2, also where one process of several meets it.

    What nobody foresaw shows its traceback, with an exit code of its own.
    """
    errors = Console(stderr=True)
    try:
        with processes.together():
            code = _run(errors)
    except (ValueError, OSError, ImportError) as error:
        if processes.speaks():
            sentence = escape(processes.sentence(error))
            errors.print(f"[red]error:[/red] {sentence}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except _OF_CODE:
        traceback.print_exc()
        raise SystemExit(_UNEXPECTED) from None
    raise SystemExit(code)


def _run(errors: Console) -> str | int | None:
    """The exit code of the command; SystemExit if it was interrupted."""
    try:
        app()
    except SystemExit as stop:
        if stop.code != _INTERRUPTED:
            return stop.code
        errors.print("interrupted; with --cache the next run goes on from the last finished block")
        raise
    return 0
