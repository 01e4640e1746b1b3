"""Traces of a running model: layer order, skip concatenations, inputs and outputs of blocks. No hook stays behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from difloat.calibration.batch_axis import SHARED_NAMES, prediction, rows_in_lists, rows_of, samples_of
from difloat.layers.attention import has_processor
from difloat.layers.code_readers import Use
from difloat.layers.packed import quantizable
from difloat.methods.readers import Watch

Call = tuple[tuple[Any, ...], dict[str, Any]]
# Functions that mix channels: what a tensor was concatenated from is no longer true of their result.
_RANGE_TOKENS = 1 << 16  # of one input that quantiles are taken over
_MIXING = (
    "conv",
    "linear",
    "matmul",
    "bmm",
    "einsum",
    "attention",
    "softmax",
    "mm",
    "fft",
    "lstm",
    "gru",
    "transformer",
)
# Functions whose result has the shape or the dtype of an argument and not its values.
_FILLS = ("zeros", "ones", "empty", "full", "rand", "randn", "randint", "tensor")
_NO_VALUES = frozenset({*(f"{fill}_like" for fill in _FILLS), *(f"new_{fill}" for fill in _FILLS)})
_FIRST_VALUE = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})


@dataclass
class Trace:
    """The record of one forward pass.

    Attributes:
        order: The layers in the order of their first call.
        splits: The channels of the pieces, for layers whose input is a concatenation of features along its channels.
        first: The layers that read the sample itself. Their input is the sample, reshaped or scaled, or concatenated with or
            added to a tensor that does not depend on it, such as the timestep's embedding.
        before_gelu: The layers whose output, or a piece of it, goes into a GELU with at most element-wise steps in between.
        attention: The modules with an exchangeable processor that computes `scaled_dot_product_attention`.
        uses: The uses of weights besides calling their layers, by layer.
        row_bytes: The bytes of input and output of the layer where they are largest, per row of the call.
        last: The last called layer whose output reaches the model's prediction. One that depends on the sample goes before any
            that does not, such as a gate computed from the timestep.
    """

    order: list[str] = field(default_factory=list)
    splits: dict[str, tuple[int, ...]] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)
    before_gelu: list[str] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)
    uses: dict[str, Use] = field(default_factory=dict)
    row_bytes: int = 1
    last: str = ""


class _Lineage(TorchFunctionMode):
    """A mode that follows which tensors come from the sample, from a layer, and from a concatenation of layers' results."""

    def __init__(self, samples: Sequence[Tensor], seen: Trace) -> None:
        super().__init__()
        self.seen = seen
        self.attending: list[str] = []  # modules with a processor that run now, the innermost last
        self.made_by = WeakTensorKeyDictionary()  # the layer whose output, element by element, a tensor is
        # A weak reference to that output, or to the piece of it that a tensor is a function of.
        self.before = WeakTensorKeyDictionary()
        self.from_layer = WeakTensorKeyDictionary()
        self.from_sample = WeakTensorKeyDictionary()  # whether channels of the sample were mixed on the way
        self.pieces = WeakTensorKeyDictionary()
        # The last layer before a tensor: whether its output depends on the sample, and the number of its call.
        self.reached_by = WeakTensorKeyDictionary()
        self.calls: list[str] = []
        for sample in samples:
            self.from_sample[sample] = False

    def called(self, name: str, output: Tensor) -> None:
        """Note that a layer made `output`."""
        self.from_layer[output] = True
        self.made_by[output] = name
        self.calls.append(name)
        self.reached_by[output] = (output in self.from_sample, len(self.calls) - 1)

    def last(self, tensors: Sequence[Tensor]) -> str:
        """The last layer before some tensors, or the one called last where none is known."""
        found = [self.reached_by[tensor] for tensor in tensors if tensor in self.reached_by]
        return self.calls[max(found)[1] if found else -1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention and self.attending:
            self.seen.attention += [n for n in self.attending[-1:] if n not in self.seen.attention]
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        sources = [leaf for leaf in pytree.tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        changed = args[:1] if name == "__setitem__" else result
        for target in pytree.tree_leaves(changed):
            if isinstance(target, Tensor) and sources:
                self._inherit(name, sources, target, args, kwargs or {})
        return result

    def _inherit(self, name: str, sources: list[Tensor], target: Tensor, args: Any, kwargs: Any) -> None:
        mixing = any(word in name for word in _MIXING)
        values = [] if name in _NO_VALUES else sources[:1] if name in _FIRST_VALUE else sources
        if any(source in self.from_layer for source in values):
            self.from_layer[target] = True
        if mixed := [self.from_sample[source] for source in values if source in self.from_sample]:
            self.from_sample[target] = mixing or any(mixed)
        if reached := [self.reached_by[source] for source in values if source in self.reached_by]:
            self.reached_by[target] = max(reached)
        makers = [self.made_by[source] for source in sources if source in self.made_by]
        if name == "gelu" or (len(set(makers)) == 1 and self._written_out(name, sources, target)):
            new = [maker for maker in dict.fromkeys(makers) if maker not in self.seen.before_gelu]
            self.seen.before_gelu += new
        elif makers and not mixing:
            self.made_by[target] = makers[0]
            before = next((self.before[source] for source in sources if source in self.before), lambda: None)
            alike = getattr(before(), "shape", None) == target.shape
            self.before[target] = before if alike else weakref.ref(target)
        if name in ("cat", "concat") and len(sources) > 1:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else 0) % target.dim()
            if all(source in self.from_layer for source in sources):
                self.pieces[target] = (axis, tuple(source.shape[axis] for source in sources))
        elif not mixing:
            full = [source for source in sources if source.shape == target.shape]
            kept = [self.pieces[source] for source in full if source in self.pieces]
            # Added to another layer's result it is a concatenation no more (PixArt's size conditions in its time embedding).
            alone = all(source in self.pieces or source not in self.from_layer for source in full)
            if kept and alone:
                self.pieces[target] = kept[0]

    def _written_out(self, name: str, sources: list[Tensor], target: Tensor) -> bool:
        """Whether a product is the last step of a GELU that is written out, exactly or in one of its approximations."""
        found = {self.before[source]() if source in self.before else None for source in sources}
        x = found.pop()
        if (
            "mul" not in name
            or "mat" in name
            or len(sources) < 2
            or found
            or x is None
            or x.shape != target.shape
        ):
            return False
        x, y = x.detach().float(), target.detach().float()
        gelu, silu = nn.functional.gelu(x), nn.functional.silu(x)
        off = (y - gelu).norm()
        return bool(off < 0.05 * gelu.norm() and off < 0.5 * (y - silu).norm())


def trace(model: nn.Module, call: Call) -> Trace:
    """Run one call of a model and record the inputs of its layers.

    Concatenations are followed through everything that keeps channels apart (norms, activations, scales). So the skip
    concatenations of any U-Net or long-skip transformer are found without knowing its class.

    Args:
        model: The denoiser.
        call: The arguments of the denoiser, among them the sample (`batch_axis.sample_of`).
    """
    args, kwargs = call
    seen, handles, rows = Trace(), [], rows_of(args, kwargs)
    lineage = _Lineage(samples_of(args, kwargs), seen)

    def before(name: str) -> Callable[[nn.Module, Tensor], None]:
        def hook(module: nn.Module, x: Tensor) -> None:
            if name in seen.order:
                return
            seen.order.append(name)
            axis, pieces = lineage.pieces.get(x, (None, ()))
            if axis == (1 if isinstance(module, nn.Conv2d) else x.dim() - 1):
                seen.splits[name] = pieces
            if not lineage.from_sample.get(x, True):
                seen.first.append(name)

        return hook

    def after(name: str) -> Callable[[nn.Module, Any, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, kwargs: Any, output: Tensor) -> None:
            x = input_of(inputs, kwargs)
            lineage.called(name, output)
            lineage.before[output] = weakref.ref(output)
            seen.row_bytes = max(seen.row_bytes, (x.nbytes + output.nbytes) // rows)

        return hook

    for name, module in quantizable(model).items():
        handles += [
            before_call(module, before(name)),
            module.register_forward_hook(after(name), with_kwargs=True),
        ]
    for name, module in model.named_modules():
        if has_processor(module):
            enter = _calling(lineage.attending.append, name)
            handles += [module.register_forward_pre_hook(enter)]
            handles += [module.register_forward_hook(_calling(lambda _: lineage.attending.pop(), name))]
    watch = Watch(model)
    with removed(handles), torch.no_grad(), watch.around(), lineage:
        output = prediction(model(*args, **kwargs), rows_in_lists(args, kwargs))
    seen.uses = watch.uses
    if seen.order:
        seen.last = lineage.last([output] if isinstance(output, Tensor) else output)
    return seen


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input that a layer is called with, by position or, as in the motion modules of AnimateDiff, by its name."""
    found: Tensor = args[0] if args else kwargs["input"]
    return found


def before_call(layer: nn.Module, hook: Callable[[nn.Module, Tensor], None]) -> RemovableHandle:
    """Show the input of a layer to a function just before every call."""
    return layer.register_forward_pre_hook(
        lambda module, args, kwargs: hook(module, input_of(args, kwargs)), with_kwargs=True
    )


def _calling(act: Callable[[str], object], name: str) -> Callable[..., None]:
    """A forward hook that calls `act(name)`."""

    def hook(*_: Any) -> None:
        act(name)

    return hook


def channel_maxima(model: nn.Module, names: Sequence[str], calls: Sequence[Call]) -> dict[str, Tensor]:
    """The largest magnitude of every input channel over all calls, float32 [i], for each named layer."""
    found: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[[nn.Module, Tensor], None]:
        def hook(module: nn.Module, x: Tensor) -> None:
            axis = 1 if isinstance(module, nn.Conv2d) else -1
            largest = x.detach().abs().movedim(axis, -1).flatten(0, -2).amax(0).float()
            found[name] = torch.maximum(found[name], largest) if name in found else largest

        return hook

    handles = [before_call(model.get_submodule(name), hook_for(name)) for name in names]
    with removed(handles), torch.no_grad():
        for args, kwargs in calls:
            model(*args, **kwargs)
    return found


SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)  # of the tokens, whose ranges `token_ranges` gives


def token_ranges(
    model: nn.Module, names: Sequence[str], calls: Mapping[float, Call]
) -> dict[str, dict[float, list[float]]]:
    """The reach of the tokens of layers' inputs by timestep, which shows why one stored scale may not fit them all.

    Args:
        model: The float denoiser.
        names: The names of the layers.
        calls: One call for every timestep.

    Returns:
        By layer and timestep the `SHARES` quantiles, over tokens (pixels), of the largest magnitude in a token.
    """
    found: dict[str, dict[float, list[float]]] = {name: {} for name in names}
    now = 0.0

    def hook_for(name: str) -> Callable[[nn.Module, Tensor], None]:
        def hook(module: nn.Module, x: Tensor) -> None:
            largest = x.abs().amax(1 if isinstance(module, nn.Conv2d) else -1).float().flatten()
            some = largest[:: len(largest) // _RANGE_TOKENS + 1]
            found[name][now] = some.quantile(torch.tensor(SHARES, device=some.device)).tolist()

        return hook

    handles = [before_call(model.get_submodule(name), hook_for(name)) for name in names]
    with removed(handles), torch.no_grad():
        for timestep, (args, kwargs) in calls.items():
            now = timestep
            model(*args, **kwargs)
    return found


@contextmanager
def removed(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of a ``with`` block, also after an error."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors in a module's output, in order."""
    leaves = pytree.tree_leaves(output if isinstance(output, Tensor | tuple | list | dict) else tuple(output))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def rows_of_call(call: Call) -> int:
    """The number of entries along the first axis of the first tensor that a module is called with."""
    return next(leaf.shape[0] for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor))


def merge(calls: Sequence[Call], rows: Sequence[int]) -> Call:
    """Concatenate the arguments of several calls of one module along the batch axis.

    Tensors whose first axis is the batch (`rows` of the denoiser's call) are concatenated, and anything else is shared.

    Raises:
        ValueError: if tensors to concatenate differ in another axis, as captions or pictures of several sizes make them.
    """
    flat = [pytree.tree_flatten(call) for call in calls]
    flags = [_per_row(call, count) for call, count in zip(calls, rows, strict=True)]
    merged = [
        _joined(leaves) if all(batched) else leaves[0]
        for leaves, batched in zip(
            zip(*(leaves for leaves, _ in flat), strict=True), zip(*flags, strict=True), strict=True
        )
    ]
    return pytree.tree_unflatten(merged, flat[0][1])


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    if len(sizes := {tuple(tensor.shape[1:]) for tensor in tensors}) > 1:
        raise ValueError(
            f"blocks must be given tensors of one size in all calls to learn their rounding, got rows of {sorted(sizes)}; "
            "calibrate with captions of one length and pictures of one size, or say rounding=nearest"
        )
    return torch.cat(list(tensors))


def select(call: Call, rows: int, index: Tensor) -> Call:
    """The chosen entries of every argument of a merged call that has `rows` entries along its batch axis."""
    leaves, structure = pytree.tree_flatten(call)
    picked = [
        leaf[index] if batched else leaf for leaf, batched in zip(leaves, _per_row(call, rows), strict=True)
    ]
    return pytree.tree_unflatten(picked, structure)


def _per_row(call: Call, rows: int) -> list[bool]:
    """Whether the first axis of every leaf of a call is the batch. Position tables may be as long by chance."""
    return [
        isinstance(leaf, Tensor)
        and leaf.dim() > 0
        and leaf.shape[0] == rows
        and not any(getattr(key, "key", None) in SHARED_NAMES for key in path)
        for path, leaf in pytree.tree_flatten_with_path(call)[0]
    ]
