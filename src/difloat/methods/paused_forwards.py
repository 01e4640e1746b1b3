"""Forward passes that wait at the boundaries of blocks, where block-wise methods read inputs and targets.

Reaching block k by a fresh forward pass each time costs a number of block evaluations that grows with the square of the depth.
Here every call runs once, in a thread of its own, and is held just before or after a block while that block is worked on.
Meanwhile a pass holds exactly the tensors that the rest of the model still needs, skip connections included, whatever the
architecture. One thread runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from difloat.methods.trace import Call, merge, rows_of_call, tensors_of


class _Stopped(BaseException):
    """Ends a pass that is not wanted any more. It is no `Exception`, so that no model swallows it."""


_current = threading.local()  # .held: the pass that a thread runs


@final
class _Pass:
    """One forward pass, which runs from `resume` until a hook holds it or it ends."""

    def __init__(self, model: nn.Module, call: Call, threads: Executor) -> None:
        self.caught: Any = None
        self._stopped = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._future = threads.submit(self._run, model, call)
        self._future.add_done_callback(lambda _: self._back.release())

    def _run(self, model: nn.Module, call: Call) -> None:
        _current.held = self
        self._wait()
        with torch.no_grad():
            model(*call[0], **call[1])

    def _wait(self) -> None:
        self._go.acquire()
        if self._stopped:
            raise _Stopped

    def hold(self, caught: Any) -> None:
        """Wait in the pass's own thread, where hooks call this."""
        self.caught = caught
        self._back.release()
        self._wait()

    def resume(self) -> bool:
        """Go on until the next hold (True) or the end (False), and raise what the model raised."""
        self.caught = None
        if not self._future.done():
            self._go.release()
            self._back.acquire()
        if not self._future.done():
            return True
        self._future.result()
        return False

    def stop(self) -> None:
        self._stopped = True
        self._go.release()


@final
class Passes:
    """Forward passes of several calls of one model that are moved on together. The ``with`` block ends those that still wait.

    Modules must be visited in the order in which the model calls them. While the passes wait, layers may get other weights in
    place. Replacing a module that a pass is about to call is too late for that pass.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        """Prepare the passes, without running anything yet."""
        self._model = model
        self._threads = ThreadPoolExecutor(len(calls), "pass")
        self._passes = [_Pass(model, call, self._threads) for call in calls]

    def __enter__(self) -> Passes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._passes:
            each.stop()
        self._threads.shutdown()

    def enter(self, name: str) -> Call:
        """Run every pass until it is about to call a module, and return the arguments, merged along the batch axis.

        Raises:
            ValueError: if a pass never gets there, or the arguments have other sizes than those of another pass.
        """
        caught = self.arguments(name)
        return merge(caught, [rows_of_call(call) for call in caught])

    def arguments(self, name: str) -> list[Call]:
        """Run every pass until it is about to call a module, and return the arguments of every pass.

        Raises:
            ValueError: if a pass never gets there.
        """

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _current.held.hold(pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs)))

        module = self._model.get_submodule(name)
        return self._run(name, lambda: module.register_forward_pre_hook(hook, with_kwargs=True))

    def leave(self, name: str) -> list[Tensor]:
        """Run every pass until it has called a module, and return its output tensors, each concatenated over the passes.

        Raises:
            ValueError: if a pass never gets there.
        """

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            _current.held.hold([leaf.detach() for leaf in tensors_of(output)])

        module = self._model.get_submodule(name)
        caught = self._run(name, lambda: module.register_forward_hook(hook))
        return [torch.cat(leaves) for leaves in zip(*caught, strict=True)]

    def past(self, name: str, begin: Callable[[int], object]) -> None:
        """Run every pass until it has called a module; before it goes on, `begin` is told its number.

        Raises:
            ValueError: if a pass never gets there.
        """
        module = self._model.get_submodule(name)
        self._run(name, lambda: module.register_forward_hook(lambda *_: _current.held.hold(None)), begin)

    def _run(
        self, name: str, register: Callable[[], Any], begin: Callable[[int], object] = lambda number: None
    ) -> list[Any]:
        handle = register()
        try:
            for number, each in enumerate(self._passes):
                begin(number)
                if not each.resume():
                    raise ValueError(
                        f"module {name!r} must be called by the model's forward, but a pass did not reach it"
                    )
        finally:
            handle.remove()
        return [each.caught for each in self._passes]
