"""Whether a model of diffusers or transformers is what its config builds, since that is all a loader has to go by."""

from __future__ import annotations

from typing import Any

from torch import nn

from difloat.checkpoint.layout import CheckpointError
from difloat.layers.packed import QuantizedLayer


def check(model: nn.Module, built: nn.Module) -> None:
    """Compare a quantized model with one built from its config, on the meta device or elsewhere.

    Projections that were fused, processors of adapters, modules and parameters that were added or exchanged would be written
    to the files, and no loader could give them a place.

    Raises:
        CheckpointError: if modules, their classes, or names and shapes of tensors differ; it names the first difference.
    """
    if difference := _difference(model, built):
        raise CheckpointError(
            f"{type(model).__name__} must be what its config builds to be loaded again, but {difference}; undo what was "
            "changed after it was made (unfuse_qkv_projections, unload_ip_adapter, ...), then quantize and save it"
        )


def _difference(model: nn.Module, built: nn.Module) -> str:
    modules, expected = (dict(m.named_modules(remove_duplicate=False)) for m in (model, built))
    for name in [*modules, *expected]:
        if name not in expected:
            return f"{name!r:.200} was added"
        if name not in modules:
            return f"{name!r:.200} is gone"
        own, other = _kind(modules[name]), _kind(expected[name])
        if own != other:
            return f"{name!r:.200} is {own} instead of {other}"
    quantized = tuple(f"{name}." for name, module in modules.items() if isinstance(module, QuantizedLayer))
    shapes, wanted = (_shapes(m, set(quantized)) for m in (model, built))
    for name in [*shapes, *wanted]:
        if shapes.get(name) != wanted.get(name):
            return f"tensor {name!r:.200} has the shape {shapes.get(name)} instead of {wanted.get(name)}"
    return ""


def _kind(module: nn.Module) -> str:
    """Class of a module in words, of a layer that may be quantized with the shape of its float weight."""
    shape: Any = module.float_shape if isinstance(module, QuantizedLayer) and module.parts else None
    for plain in (nn.Linear, nn.Conv2d):
        if isinstance(module, plain):
            bias = "" if module.bias is not None else " without bias"
            return f"{plain.__name__} {tuple(shape or module.weight.shape)}{bias}"
    return type(module).__name__


def _shapes(model: nn.Module, quantized: set[str]) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if f"{name.rpartition('.')[0]}." not in quantized
    }
