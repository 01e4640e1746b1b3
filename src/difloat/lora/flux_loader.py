"""Knowledge of packed weights for diffusers' LoRA loader of FLUX.

Before it loads, it compares the shape of every linear layer's weight with the adapter's. A LoRA that is wider belongs to a
control model, and the layer is replaced by a wider float one. A packed weight is narrower than its adapter, so every quantized
layer would be replaced by one of raw bytes. The loader asks two functions of its own, which know bitsandbytes and GGUF, and are
taught difloat's layers here.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from difloat.layers.packed import QuantizedLayer
from difloat.plan.encode import dequantize


def teach_shapes() -> None:
    """Let the loader see float shapes, and float weights where a control LoRA widens a layer. A second call does nothing."""
    from diffusers.loaders import lora_pipeline

    loader: Any = lora_pipeline.FluxLoraLoaderMixin
    module: Any = lora_pipeline
    shape_of = getattr(loader, "_calculate_module_shape", None)
    weight_of = getattr(module, "_maybe_dequantize_weight_for_expanded_lora", None)
    if shape_of is None or weight_of is None or hasattr(shape_of, "difloat"):
        return

    @functools.wraps(shape_of)
    def float_shape_of(
        model: Any, base_module: Any = None, base_weight_param_name: str | None = None
    ) -> torch.Size:
        layer = base_module
        if layer is None and base_weight_param_name is not None:
            layer = model.get_submodule(base_weight_param_name.removesuffix(".weight"))
        if isinstance(layer, QuantizedLayer) and layer.parts:
            return torch.Size(layer.float_shape)
        return shape_of(model, base_module, base_weight_param_name)

    @functools.wraps(weight_of)
    def float_weight_of(model: Any, layer: Any) -> torch.Tensor:
        if isinstance(layer, QuantizedLayer) and layer.parts:
            return dequantize(layer.plan()).to(model.dtype)
        return weight_of(model, layer)

    float_shape_of.difloat = True  # type: ignore[attr-defined]
    loader._calculate_module_shape = staticmethod(float_shape_of)
    module._maybe_dequantize_weight_for_expanded_lora = float_weight_of
