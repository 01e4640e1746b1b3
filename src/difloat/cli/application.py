"""The application that the commands join, and what becomes of errors."""

from __future__ import annotations

import errno

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    help="Low-bit floating-point quantization of diffusion models: one command makes a packed checkpoint and shows its cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_INTERRUPTED = 130  # typer's exit code for Ctrl-C


def main() -> None:
    """Run the command line; bad input gives one sentence and exit code 2."""
    errors = Console(stderr=True)
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        errors.print(f"[red]error:[/red] {escape(_sentence(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            errors.print("interrupted; with --cache the next run goes on from the last finished block")
        raise


def _sentence(error: Exception) -> str:
    """The message; what the system says of a file becomes a sentence too."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk must have room for the output, but is full; free some space and run again"
    return f"{error.filename or 'file'} must be accessible, got: {error.strerror}; check the path and its permissions"
