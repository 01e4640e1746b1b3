"""Several processes on one job, as `accelerate launch` or torchrun start them, which share work, results and failures.

All of them run the same program and meet in the functions below, in the same order. Without a launch, before `join` and inside
`on_main` there is one process: nothing is imported and nothing exchanged. A failure of one reaches the others when they meet
next, so that none waits for it for ever.
"""

from __future__ import annotations

import atexit
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

# Variables by which launchers tell a process how many there are, under the names that accelerate reads.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_PATIENCE = timedelta(days=30)  # the others wait while the main process learns rounding, which may take days


class ProcessError(ValueError):
    """Another process of the launch failed. The message is that of the other process."""


@dataclass
class _Launch:
    """What this process knows of its launch: the group to meet in, the number of processes, its own, and what it is doing."""

    group: Any = None
    size: int = 1
    number: int = 0
    alone: bool = False  # inside `on_main`
    apart: bool = False  # inside `apart`, also after a failure there
    told: BaseException | None = None  # the last failure here that all know of


_launch = _Launch()


def join(device: torch.device | str) -> None:
    """Meet the other processes of a launch, all of which must call this. Without a launch, or again, nothing happens.

    Args:
        device: The device of the models. On GPUs `accelerate` gives every process of a machine its own.
    """
    if _launch.group is not None or _size_of_launch() < 2:
        return
    from torch import distributed

    if not distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=torch.device(device).type == "cpu")
        atexit.register(_part)  # a process that others leave without a word may abort as it ends
    # A group of its own: objects travel in CPU memory, and waiting may take longer than collectives of training should.
    _launch.group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    _launch.size, _launch.number = distributed.get_world_size(), distributed.get_rank()


def _part() -> None:
    """Take leave of the other processes, as far as that is not done yet."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _size_of_launch() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return next((int(os.environ[name]) for name in _SIZES if os.environ.get(name, "").isdigit()), 1)


def count() -> int:
    """How many processes share the work."""
    return 1 if _launch.alone else _launch.size


def number() -> int:
    """Which of them this is, from 0."""
    return 0 if _launch.alone else _launch.number


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return number() == 0


def speaks() -> bool:
    """Whether this process must say why it ends: the main one for all, or one that could not tell the others."""
    return is_main() or _launch.apart


@contextmanager
def together() -> Iterator[None]:
    """At the end of the block all processes meet, and if one failed in it, all do.

    Raises:
        ProcessError: in those that did not fail themselves.
    """
    try:
        yield
    except BaseException as error:
        if count() > 1 and not (_launch.apart or _is_told(error)):
            _tell(error)
        raise
    if count() > 1:
        _tell(None)


@contextmanager
def apart() -> Iterator[None]:
    """Inside, processes meet in other ways (data-parallel training), so a failure cannot wait for the others."""
    _launch.apart = True
    yield
    _launch.apart = False


def on_main(work: Callable[[], T]) -> T:
    """What `work()` gives on the main process, which is on its own while the others wait for it.

    Raises:
        ProcessError: in the others, if it failed.
    """
    if count() == 1:
        return work()
    result: list[Any] = [None]
    with together():
        if is_main():
            _launch.alone = True
            try:
                result[0] = work()
            finally:
                _launch.alone = False
    with _meeting():
        torch.distributed.broadcast_object_list(result, src=0, group=_launch.group)
    value: T = result[0]
    return value


def shared(work: Callable[[], T]) -> list[T]:
    """What `work()` gives on every process, by process, on every process.

    Raises:
        ProcessError: if it failed on another one.
    """
    return _gathered(work, torch.distributed.all_gather_object)


def collected(work: Callable[[], T]) -> list[T]:
    """On the main process what `work()` gives on every process, in their order, and on the others an empty list.

    Raises:
        ProcessError: if it failed on another one.
    """

    def gather(results: list[T], mine: T, group: Any) -> None:
        torch.distributed.gather_object(mine, results if is_main() else None, dst=0, group=group)

    found = _gathered(work, gather)
    return found if is_main() else []


def _gathered(work: Callable[[], T], gather: Callable[..., None]) -> list[T]:
    """What `work()` gives on every process, where `gather` brings it."""
    if count() == 1:
        return [work()]
    with together():
        mine = work()
    results: list[Any] = [None] * count()
    with _meeting():
        gather(results, mine, group=_launch.group)
    return results


def data_parallel(model: nn.Module) -> nn.Module:
    """The model, or with several processes one around it that averages gradients over them in the backward pass."""
    return model if count() == 1 else DistributedDataParallel(model)


def exchange_gradients(model: nn.Module, *, now: bool) -> AbstractContextManager[None]:
    """Let processes exchange the gradients of a pass of what `data_parallel` gave. Unless `now`, they add up where they are."""
    if now or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    kept: AbstractContextManager[None] = model.no_sync()
    return kept


def summed(mine: Tensor) -> Tensor:
    """Sum of a tensor over the processes, on the device where the models compute, without gradients between them.

    The processes meet as those of data-parallel training do, so all must call this, and one that fails is not waited for.
    """
    if count() == 1:
        return mine
    total = mine.clone()
    torch.distributed.all_reduce(total)
    return total


def sentence(error: BaseException) -> str:
    """The message of an error for people, where what the system says of a file becomes a sentence too."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk must have room for the output, but is full; free some space and run again"
    return f"{error.filename or 'file'} must be accessible, got: {error.strerror}; check the path and its permissions"


def _report(error: BaseException) -> str:
    """What the other processes are told."""
    if isinstance(error, (ValueError, OSError, ImportError)):
        return sentence(error)
    reason = str(error).split("\n")[0][:200]
    return f"process {number()} must come to its end, but stopped by {type(error).__name__} {reason!r}; see its messages"


def _is_told(error: BaseException | None) -> bool:
    """Whether an error is the one that all know of, or was raised on the way out from it."""
    while error is not None and error is not _launch.told:
        error = error.__context__
    return error is not None


def _tell(failure: BaseException | None) -> None:
    """Tell the others how this process fared. ProcessError if it fared well and another did not."""
    _launch.told = failure
    said: list[str | None] = [None] * _launch.size
    with _meeting():
        own = None if failure is None else _report(failure)
        torch.distributed.all_gather_object(said, own, group=_launch.group)
    failures = [one for one in said if one is not None]
    if failures and failure is None:
        _launch.told = ProcessError(failures[0])
        raise _launch.told


@contextmanager
def _meeting() -> Iterator[None]:
    """Turns what gloo says when a process is gone into a sentence."""
    try:
        yield
    except RuntimeError as error:
        _launch.told = ProcessError(
            f"all {_launch.size} processes of a launch must stay alive, but one is gone; see its messages and run again"
        )
        raise _launch.told from error
