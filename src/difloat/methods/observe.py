"""Looking into a model while it runs: layer order, skip concatenations, inputs and outputs of blocks. Leaves no hook behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from difloat.calls import SHARED_NAMES
from difloat.layers import quantizable

Call = tuple[tuple[Any, ...], dict[str, Any]]
# Functions that mix channels: what a tensor was concatenated from is no longer true of their result.
_MIXING = ("conv", "linear", "matmul", "bmm", "einsum", "attention", "softmax", "mm")


@dataclass
class Trace:
    """What one forward pass showed.

    Attributes:
        order: Layers in the order of their first call.
        splits: For layers whose input is a concatenation of features along its channels, the channels of the pieces.
        first: Layers that read the sample itself.
        last: The layer called last.
    """

    order: list[str] = field(default_factory=list)
    splits: dict[str, tuple[int, ...]] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)

    @property
    def last(self) -> str:
        """The layer called last."""
        return self.order[-1]


class _Lineage(TorchFunctionMode):
    """Follows which tensors come from the sample, from a layer, and from a concatenation of layers' results."""

    def __init__(self, sample: Tensor) -> None:
        super().__init__()
        self.from_layer = WeakTensorKeyDictionary()
        self.from_sample = WeakTensorKeyDictionary()
        self.pieces = WeakTensorKeyDictionary()
        self.from_sample[sample] = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sources = [leaf for leaf in pytree.tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        for target in pytree.tree_leaves(result):
            if isinstance(target, Tensor) and sources:
                self._inherit(getattr(func, "__name__", ""), sources, target, args, kwargs or {})
        return result

    def _inherit(self, name: str, sources: list[Tensor], target: Tensor, args: Any, kwargs: Any) -> None:
        if any(source in self.from_layer for source in sources):
            self.from_layer[target] = True
        if any(source in self.from_sample for source in sources):
            self.from_sample[target] = True
        if name in ("cat", "concat") and len(sources) > 1:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else 0) % target.dim()
            if all(source in self.from_layer for source in sources):
                self.pieces[target] = (axis, tuple(source.shape[axis] for source in sources))
        elif not any(word in name for word in _MIXING):
            full = [source for source in sources if source.shape == target.shape]
            kept = [self.pieces[source] for source in full if source in self.pieces]
            # Added to another layer's result it is a concatenation no more (PixArt's size conditions in its time embedding).
            alone = all(source in self.pieces or source not in self.from_layer for source in full)
            if kept and alone:
                self.pieces[target] = kept[0]


def trace(model: nn.Module, call: Call) -> Trace:
    """Run `call` once and see what the layers are fed.

    Concatenations are followed through everything that keeps channels apart (norms, activations, scales), so the
    skip concatenations of any U-Net or long-skip transformer are found without knowing its class.

    Args:
        model: The denoiser.
        call: Its arguments; the first tensor is the sample.
    """
    args, kwargs = call
    sample = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    seen, lineage, handles = Trace(), _Lineage(sample), []

    def before(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if name in seen.order:
                return
            seen.order.append(name)
            x = inputs[0]
            axis, pieces = lineage.pieces.get(x, (None, ()))
            if axis == (1 if isinstance(module, nn.Conv2d) else x.dim() - 1):
                seen.splits[name] = pieces
            if x in lineage.from_sample and x not in lineage.from_layer:
                seen.first.append(name)

        return hook

    def after(module: nn.Module, inputs: Any, output: Tensor) -> None:
        lineage.from_layer[output] = True

    for name, module in quantizable(model).items():
        handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after)]
    with removed(handles), torch.no_grad(), lineage:
        model(*args, **kwargs)
    return seen


@contextmanager
def removed(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Reached(Exception):
    """Stops a forward pass at the module that was waited for."""


def inputs_of(model: nn.Module, name: str, calls: Sequence[Call]) -> Call:
    """What the module `name` is called with during `calls`, merged along the batch axis; the passes stop there.

    Raises:
        ValueError: if a pass never reaches the module.
    """
    caught: list[Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs)))
        raise _Reached

    with (
        removed([model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)]),
        torch.no_grad(),
    ):
        for args, kwargs in calls:
            try:
                model(*args, **kwargs)
            except _Reached:
                continue
            raise ValueError(
                f"module {name!r} must be called by the model's forward, but a pass did not reach it"
            )
    return merge(caught, [_rows(call) for call in calls])


def outputs_of(model: nn.Module, names: Sequence[str], calls: Sequence[Call]) -> dict[str, list[Tensor]]:
    """The tensors each module returns during `calls`, every one concatenated over the calls."""
    caught: dict[str, list[list[Tensor]]] = {name: [] for name in names}

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            caught[name].append([leaf.detach() for leaf in tensors_of(output)])

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in names]
    with removed(handles), torch.no_grad():
        for args, kwargs in calls:
            model(*args, **kwargs)
    return {
        name: [torch.cat(leaves) for leaves in zip(*results, strict=True)] for name, results in caught.items()
    }


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors in a module's output, in order."""
    leaves = pytree.tree_leaves(output if isinstance(output, Tensor | tuple | list | dict) else tuple(output))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _rows(call: Call) -> int:
    return next(leaf.shape[0] for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor))


def merge(calls: Sequence[Call], rows: Sequence[int]) -> Call:
    """Concatenate the arguments of several calls of one module along the batch axis.

    Tensors whose first axis is the batch (`rows` of the denoiser's call) are concatenated; anything else is shared.
    """
    flat = [pytree.tree_flatten(call) for call in calls]
    flags = [_per_row(call, count) for call, count in zip(calls, rows, strict=True)]
    merged = [
        torch.cat(leaves) if all(batched) else leaves[0]
        for leaves, batched in zip(
            zip(*(leaves for leaves, _ in flat), strict=True), zip(*flags, strict=True), strict=True
        )
    ]
    return pytree.tree_unflatten(merged, flat[0][1])


def select(call: Call, rows: int, index: Tensor) -> Call:
    """The entries `index` of every argument of a merged call that has `rows` entries along its batch axis."""
    leaves, structure = pytree.tree_flatten(call)
    picked = [
        leaf[index] if batched else leaf for leaf, batched in zip(leaves, _per_row(call, rows), strict=True)
    ]
    return pytree.tree_unflatten(picked, structure)


def _per_row(call: Call, rows: int) -> list[bool]:
    """For every leaf of a call whether its first axis is the batch: position tables may be as long by chance."""
    return [
        isinstance(leaf, Tensor)
        and leaf.dim() > 0
        and leaf.shape[0] == rows
        and not any(getattr(key, "key", None) in SHARED_NAMES for key in path)
        for path, leaf in pytree.tree_flatten_with_path(call)[0]
    ]
