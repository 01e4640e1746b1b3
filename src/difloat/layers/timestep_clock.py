"""The timestep of the denoiser's current call, for layers whose state depends on it.

The timestep is read off the denoiser's own arguments and never found by counting calls. So guidance in two calls, profilers and
restarted samplers do not disturb it. It belongs to the call: threads, nested calls, and a backward pass that computes parts of
a call again, each find their own.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import saved_tensors_hooks

TIMESTEP_NAMES = (
    "timestep",
    "timesteps",
    "time_step",
    "t",
    "sigma",
    "sigmas",
    "time",
    "noise_labels",
    "noise_level",
    "c_noise",
    "log_snr",
)


@final
class Clock:
    """Hooks of a denoiser that find the entry of a timestep grid that is nearest to the timestep of the running call.

    A call begins with the forward pre-hook `__call__` and ends with the forward hook `leave`, also where it fails. The entry is
    kept per thread, so one model may be called by several at once. Where activations are checkpointed, the backward pass runs
    parts of a call again, after it ended and perhaps in another thread. Then the tensors that the checkpoint kept bring the
    entry along.
    """

    def __init__(self, module: nn.Module, grid: Sequence[float]) -> None:
        """Find the timestep among the parameters of a module's forward.

        Args:
            module: The denoiser whose calls are observed.
            grid: The timesteps of the grid, in the unit of the denoiser's argument.

        Raises:
            ValueError: if no parameter is a timestep by its name.
        """
        names = list(inspect.signature(module.forward).parameters)
        self.name = next((name for name in TIMESTEP_NAMES if name in names), None)
        if self.name is None:
            raise ValueError(
                f"forward of {type(module).__name__} must have a parameter called {', '.join(TIMESTEP_NAMES[:4])} or the "
                "like, got none; a plan that depends on the timestep cannot be carried out on it"
            )
        self.position = names.index(self.name)
        self.grid = tuple(grid)
        # `.calls` holds the running calls, the innermost last, each with its entry and the hooks of `_carried` once known.
        # `.again` is the entry of the call that the backward pass number `.backward` computes again while it runs.
        # It is a plain `local`, since Dynamo sees through no subclass.
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        """The state of copies and pickles, which are in no call."""
        return {name: value for name, value in vars(self).items() if name != "_local"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `__getstate__` returned."""
        vars(self).update(state)
        self._local = threading.local()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the timestep of a call that begins, with the errors of `nearest`."""
        outer = getattr(self._local, "calls", ())
        self._local.calls = (*outer, None)  # first of all: `leave` follows on a refusal too
        entry = self.nearest(args, kwargs)
        self._local.calls = (*outer, (entry, self._carried(entry)))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forget the call that ends."""
        calls = getattr(self._local, "calls", ())
        if calls:
            self._local.calls = calls[:-1]
            if calls[-1] is not None and calls[-1][1] is not None:
                calls[-1][1].__exit__()

    @contextmanager
    def during(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Let layers compute inside a ``with`` block as in a call with these arguments, with the errors of `nearest`."""
        try:
            self(nn.Module(), args, kwargs)
            yield
        finally:
            self.leave(nn.Module(), args, None)

    def nearest(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The number of the grid's entry that is nearest to the timestep in a call's arguments, int64 [].

        Raises:
            ValueError: if there is no timestep among them, or its rows are nearest to different entries.
        """
        assert self.name is not None
        given = args[self.position] if len(args) > self.position else None
        value = kwargs.get(self.name, given)
        if value is None:
            raise ValueError(
                f"a call must give the timestep as {self.name!r}, got none; the quantized model chooses weights or ranges by it"
            )
        timestep = torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1)  # [b, 1]
        grid = torch.tensor(self.grid, dtype=torch.float32, device=timestep.device)
        nearest = (timestep - grid).abs().argmin(dim=1)  # [b]
        if not torch.compiler.is_compiling() and bool((nearest != nearest[0]).any()):
            raise ValueError(
                f"all rows of a call must have one timestep, got {timestep.flatten().tolist()[:4]}...; "
                "call the quantized model once per timestep"
            )
        return nearest[0]

    def entry(self) -> Tensor:
        """The number of the nearest entry in the call that runs in this thread, or that the backward pass computes again.

        Raises:
            RuntimeError: if there is no such call.
        """
        calls = getattr(self._local, "calls", ())
        if calls and calls[-1] is not None:
            found: Tensor = calls[-1][0]
            return found
        again: Tensor | None = getattr(self._local, "again", None)
        failed = (
            not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1
        )  # a backward pass
        if again is None or failed:
            raise RuntimeError(
                "a layer that depends on the timestep must be called by its denoiser, got a call on its own; "
                "call the whole denoiser"
            )
        return again

    def _carried(self, entry: Tensor) -> saved_tensors_hooks | None:
        """Entered hooks by which tensors that autograd keeps tell the entry in the backward pass, or None without gradients.

        Checkpoints ask for their inputs just before they compute a block again, in the thread that does it. Compiled graphs
        hold the entry as a value. Where a caller has hooks of its own (`save_on_cpu`), these still see every tensor.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
            return None  # transforms of torch.func, under which nothing can be checkpointed
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        pack, unpack = (_same, _same) if outer is None else outer

        def tell(kept: Any) -> Any:
            backward = torch._C._current_graph_task_id()
            if backward != -1:  # else somebody just looks at it
                mine = vars(self._local)
                if mine.get("backward") != backward:
                    mine["backward"] = backward
                    Variable._execution_engine.queue_callback(lambda: mine.pop("again", None))
                mine["again"] = entry
            return unpack(kept)

        carried = saved_tensors_hooks(pack, tell)
        carried.__enter__()
        return carried


def _same(kept: Any) -> Any:
    return kept
