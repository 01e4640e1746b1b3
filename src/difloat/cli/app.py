"""The application that the commands join, and what becomes of errors."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import torch
import typer
from rich.console import Console
from rich.markup import escape

from difloat import distributed
from difloat.cache_entries import CacheWarning

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
        with distributed.together(), _warnings_in_one_line(errors):
            code = _run(errors)
    except (ValueError, OSError, ImportError) as error:
        if distributed.speaks():
            _say(errors, "[red]error:[/red]", distributed.sentence(error))
        raise SystemExit(2) from None
    except (MemoryError, *_OF_CODE) as error:
        if _is_full_memory(error):
            _say(errors, "[red]error:[/red]", _of_memory(error))
            raise SystemExit(2) from None
        traceback.print_exc()
        raise SystemExit(_UNEXPECTED) from None
    raise SystemExit(code)


def _is_full_memory(error: BaseException) -> bool:
    """Whether there was too little memory, which torch's allocator on the CPU says in words only."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _of_memory(error: BaseException) -> str:
    """What to do where memory is full: the GPU's has settings of its own, and what is in the cache stays there."""
    reason = " ".join(str(error).split())[:200]
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"the run must fit the memory of the accelerator, but does not ({reason}); set a lower --memory-mb, --batch 1, "
            "smaller pictures like --call height=256, or --device cpu: with --cache the next run goes on from what is finished"
        )
    return f"the run must fit the memory of this machine, but does not ({reason}); see --dry-run and ask for less"


def _say(errors: Console, mark: str, text: str) -> None:
    errors.print(mark, escape(text), highlight=False, soft_wrap=True)


@contextmanager
def _warnings_in_one_line(errors: Console) -> Iterator[None]:
    """Show warnings of a damaged cache as a sentence, without the line of code that found it, and others as ever."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, CacheWarning):
                _say(errors, "[yellow]warning:[/yellow]", str(message))
            else:
                others(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        warnings.simplefilter("always", CacheWarning)
        yield


def _run(errors: Console) -> str | int | None:
    """The exit code of the command. It raises SystemExit if it was interrupted."""
    try:
        app()
    except SystemExit as stop:
        if stop.code != _INTERRUPTED:
            return stop.code
        errors.print("interrupted; with --cache the next run goes on from the last finished block")
        raise
    return 0
