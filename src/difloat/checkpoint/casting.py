"""Changing the dtype of a packed model of diffusers, which diffusers refuses for every quantized model.

Pipelines do it themselves: those of SDXL upcast a float16 autoencoder before it decodes (`force_upcast`) and cast it back.
Packed weights have no float dtype and scales stay float32 (`QuantizedLayer._apply`), so what changes is the dtype of everything
else, as in a float model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from difloat.layers.packed import QuantizedLayer


def teach_casts() -> None:
    """Let `to`, `half` and `float` of diffusers' models cast those that difloat packed. A second call does nothing."""
    from diffusers.models.modeling_utils import ModelMixin

    model_class: Any = ModelMixin
    if hasattr(model_class.to, "difloat"):
        return
    for name, own in (("to", _to), ("half", nn.Module.half), ("float", nn.Module.float)):
        setattr(model_class, name, _taught(getattr(model_class, name), own))


def _taught(original: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """A method of diffusers, and `own` for models with packed layers."""

    @functools.wraps(original)
    def cast(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(module, QuantizedLayer) for module in self.modules()):
            return original(self, *args, **kwargs)
        return own(self, original, *args, **kwargs) if own is _to else own(self, *args, **kwargs)

    cast.difloat = True  # type: ignore[attr-defined]
    return cast


def _to(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Cast, then let diffusers do the rest: it knows what may not be moved."""
    dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
    if not dtypes:
        return original(model, *args, **kwargs)
    nn.Module.to(model, dtype=dtypes[0])
    rest = [value for value in args if not isinstance(value, torch.dtype)]
    named = {name: value for name, value in kwargs.items() if name != "dtype"}
    return original(model, *rest, **named) if rest or named else model
