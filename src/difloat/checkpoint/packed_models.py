"""What diffusers' own methods do to a model with packed weights: fusing projections is refused, IP-Adapters load.

Both look at weights or dtypes in ways that packed bytes cannot answer. Fusing fails inside torch with a sentence about
gradients. An IP-Adapter is loaded to the end, and then fails because the model is cast to the dtype that it has already.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

from torch import nn

from difloat.layers.packed import QuantizedLayer

_FUSING = ("fuse_qkv_projections", "fuse_projections")
_UNFUSING = ("unfuse_qkv_projections", "unfuse_projections")


def refuse_fusing(*args: Any, **kwargs: Any) -> NoReturn:
    """Stands in for `fuse_qkv_projections` and its kin on a quantized model, and raises ValueError."""
    raise ValueError(
        "projections must be fused or unfused before a model is quantized, since packed weights have scales of their own, "
        "got a quantized model; leave them as they are, or difloat.restore it first (which keeps the rounded values)"
    )


def guard(model: nn.Module) -> None:
    """Let a quantized model refuse to fuse packed projections, and load IP-Adapters. A second call does nothing."""
    unguard(model)
    modules = [module for module in model.modules() if hasattr(module, "fuse_projections")]
    packed = [m for m in modules if any(isinstance(child, QuantizedLayer) for child in m.children())]
    if packed:
        fused = any(getattr(module, "fused_projections", False) for module in packed)
        for module in [model, *packed]:
            for name in (*_FUSING, *(_UNFUSING if fused else ())):
                if hasattr(module, name):
                    # A plain function: it is copied and pickled with the model, and knows nothing of it.
                    vars(module)[name] = refuse_fusing
    if hasattr(model, "_load_ip_adapter_weights"):
        _teach_adapters()


def unguard(model: nn.Module) -> None:
    """Undo what `guard` did to the model."""
    for module in model.modules():
        for name in (*_FUSING, *_UNFUSING):
            if vars(module).get(name) is refuse_fusing:
                del vars(module)[name]


def _teach_adapters() -> None:
    """Let diffusers load IP-Adapters into quantized U-Nets. A second call does nothing.

    Its loader ends with a cast of the whole model to the model's own dtype, which diffusers refuses wherever a model is
    quantized. Our layers keep their packed weights and float32 vectors through any cast.
    """
    from diffusers.loaders import UNet2DConditionLoadersMixin

    loader: Any = UNet2DConditionLoadersMixin
    plain = loader._load_ip_adapter_weights
    if hasattr(plain, "difloat"):
        return

    @functools.wraps(plain)
    def load_ip_adapter_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "difloat_plan" not in vars(self):
            return plain(self, *args, **kwargs)
        self.is_quantized = False
        try:
            return plain(self, *args, **kwargs)
        finally:
            self.is_quantized = True

    load_ip_adapter_weights.difloat = True  # type: ignore[attr-defined]
    loader._load_ip_adapter_weights = load_ip_adapter_weights
