"""Modules that read a layer's weight without calling the layer, found by running the model (`code_readers` reads the code)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from difloat.layers import dtype_readers
from difloat.layers.code_readers import HARMLESS, Use
from difloat.layers.dtype_readers import REASONS
from difloat.layers.packed import quantizable

_SAME = {"data", "detach", "to", "float", "contiguous", "cpu", "cuda"}  # a weight, as it is, in other words
_ABOUT = HARMLESS | {
    "is_floating_point",
    "__set__",
    "__hash__",
    "dim",
    "ndim",
    "requires_grad_",
    "_make_subclass",
    "__new__",
}
_FAR = 1e-3  # relative, from the output that the model has when its weights say their dtype


class Watch(TorchFunctionMode):
    """A mode that notes the uses of layers' weights outside of these layers' calls.

    With `packed` the weights answer as they will once they are packed, to see whether the model copes. They are no
    floating-point numbers then, and layers get the inputs that they would get.
    """

    def __init__(self, model: nn.Module, *, packed: bool = False) -> None:
        super().__init__()
        self.layers = quantizable(model)
        self.owners = WeakTensorKeyDictionary()
        self.running: list[str] = []
        self.uses: dict[str, Use] = {}
        self.packed, self.damaged = packed, False
        self.answers = (
            {n: torch.int8 if dtype_readers.use_of(model, n) else torch.uint8 for n in self.layers}
            if packed
            else {}
        )
        for name, layer in self.layers.items():
            self.owners[layer.weight] = name

    @contextmanager
    def around(self) -> Iterator[Watch]:
        """Watch everything that runs inside a ``with`` block."""
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.callback(layer.register_forward_pre_hook(self._enter(name), with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(self._leave, always_call=True).remove)
            stack.enter_context(self)
            yield self

    def _enter(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.running.append(name)
            if not self.packed:
                return None
            x = args[0] if args else kwargs["input"]
            self.damaged |= not x.is_floating_point()
            return ((x.to(module.weight.dtype),), {}) if self.answers[name] == torch.int8 else None

        return hook

    def _leave(self, *_: Any) -> None:
        self.running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        taken = [
            name for leaf in pytree.tree_leaves((args, kwargs)) if (name := self._owner(leaf)) is not None
        ]
        if not taken:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        name = getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
        if name in _SAME and len(taken) == 1 and self._owner(args[0]) is not None:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor):
                self.owners[result] = taken[0]
            return result
        if name not in _ABOUT:
            use: Use = "dtype" if name == "dtype" else "values"
            self.uses |= {one: use for one in taken if self.uses.get(one) != "values"}
        if self.packed and name in ("dtype", "is_floating_point"):
            return self.answers[taken[0]] if name == "dtype" else False
        return func(*args, **kwargs)

    def _owner(self, leaf: Any) -> str | None:
        """The layer whose weight this is, unless it is being called."""
        if not isinstance(leaf, Tensor):
            return None
        name: str | None = self.owners.get(leaf)
        return None if name in self.running else name


def kept(model: nn.Module, run: Callable[[], Any], uses: Mapping[str, Use]) -> dict[str, str]:
    """The reasons, by name, for layers that must stay float because of the model's uses of their weights.

    Args:
        model: The float model.
        run: A function that calls the model. Its output is compared with the model's output when weights are packed.
        uses: The uses that a `Watch` saw during such a call. Where only dtypes were asked for, the model is run twice, since
            many models know what to do with packed weights.
    """
    reasons = {name: REASONS[use] for name, use in uses.items() if use == "values"}
    asked = {name for name, use in uses.items() if use == "dtype"}
    if asked and not _knows_packed(model, run):
        reasons |= dict.fromkeys(asked, REASONS["dtype"])
    return reasons


def _knows_packed(model: nn.Module, run: Callable[[], Any]) -> bool:
    expected = _leaves(run)
    watch = Watch(model, packed=True)
    try:
        with watch.around():
            found = _leaves(run)
    except (RuntimeError, TypeError, ValueError):  # a cast to a dtype in which nothing can be computed
        return False
    return not watch.damaged and len(expected) == len(found) and all(map(_close, found, expected))


def _leaves(run: Callable[[], Any]) -> list[Tensor]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return [leaf for leaf in pytree.tree_leaves(run()) if isinstance(leaf, Tensor)]


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    a, b = found.double().nan_to_num(), expected.double().nan_to_num()
    return bool((a - b).norm() <= _FAR * b.norm())
