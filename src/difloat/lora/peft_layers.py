"""PEFT's LoRA layers around quantized ones: the same side branch, but merging goes through the packed weight.

PEFT adds an adapter by wrapping a layer. Its own wrappers merge by writing floats into `weight`, which is packed here. PEFT's
own table of further layer types belongs to one configuration (`LoraConfig._register_custom_module`), and diffusers makes that
configuration itself. So the wrapper's class is exchanged the moment it takes a quantized layer (`wrapped.on_wrapped`), which
reaches every way in: `pipeline.load_lora_weights`, `model.add_adapter`, `peft.inject_adapter_in_model`, `peft.get_peft_model`.

Importing this module imports PEFT.
"""

from __future__ import annotations

import warnings
from typing import Any, final

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from difloat.layers.packed import QuantizedLayer
from difloat.plan.add_delta import add_to_weight
from difloat.plan.plan import LayerPlan

# Of `init_lora_weights`: those that never look at the float weight.
_PLAIN_STARTS = (True, False, "gaussian", "eva")
_VARIANTS = (
    "use_dora",
    "use_bdlora",
    "arrow_config",
    "alora_invocation_tokens",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
_ENOUGH = 0.5  # share of a change that must survive rounding for merging to go without a warning
# Python lets an object change its class only between classes whose first base is the same; for mypy PEFT's are anything.
_Base: Any = nn.Module


class _OnPackedWeight(_Base):
    """The common part of a linear layer and a convolution, which comes before PEFT's class in the order of resolution."""

    scaling: dict[str, Any]
    _original: tuple[LayerPlan, Tensor | None] | None = None  # the layer and its bias before any merging
    _scaling_merged: dict[str, float] | None = None
    share: float = 1.0  # of what was merged, see `merging.Changed`

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        """Add an adapter. Variants of LoRA that read or replace the float weight are refused."""
        if isinstance(self.get_base_layer(), QuantizedLayer):
            _check_plain(config)
        super().update_layer(adapter_name, *args, config=config, **kwargs)
        for factor in (self.lora_A[adapter_name], self.lora_B[adapter_name]):
            # PEFT makes the factors of a convolution of the class of the layer itself; they are never quantized.
            if isinstance(factor, QuantizedLayer):
                factor.__class__ = nn.Conv2d  # type: ignore[assignment]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the change of adapters (the active ones) to the packed weight and round it again.

        Whatever was merged before is added and rounded together with it, so the order makes no difference.

        Args:
            safe_merge: Has no effect here, since adapters that are not finite are refused in any case.
            adapter_names: The names of the adapters, or None for the active ones.

        Raises:
            ValueError: if the layer cannot take the change. The layer is unchanged then.
        """
        base = self.get_base_layer()
        if not isinstance(base, QuantizedLayer):
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        self._check_mergeable(base, names)
        bias = base._parameters["bias"]
        original = self._original or (base.plan(), None if bias is None else bias.detach().clone())
        scaling = {**(self._scaling_merged or {}), **{n: float(self.scaling[n]) for n in names}}
        changed = add_to_weight(original[0], self._change(scaling))
        if bias is not None and original[1] is not None:
            shifts = [self.lora_B[n].bias * factor for n, factor in scaling.items() if self.lora_bias[n]]
            bias.data = sum(shifts, original[1].to(bias)).to(bias)
        _put(base, changed.layer)
        self._original, self._scaling_merged, self.share = original, scaling, changed.share
        self.merged_adapters.extend(names)
        if changed.share < _ENOUGH:
            warnings.warn(
                "rounding took away more than half of a LoRA's change in at least one layer; difloat.lora.merge returns "
                "what arrived in which layer, and a LoRA that stays unmerged loses nothing",
                stacklevel=2,
            )

    def _change(self, scaling: dict[str, float]) -> Tensor:
        """The float32 change [o, i, *k] of all named adapters together, with these scalings instead of the present ones."""
        present = self.scaling
        self.scaling = {**present, **scaling}
        changes: list[Tensor] = [self.get_delta_weight(name).float() for name in scaling]
        self.scaling = present
        return sum(changes[1:], changes[0])

    def _check_mergeable(self, base: QuantizedLayer, names: list[str]) -> None:
        if base.weight.is_meta:
            raise ValueError(
                "weights must be in memory to merge a LoRA, got an offloaded layer; load it first"
            )
        if gone := sorted(set(self._scaling_merged or ()) - set(self.lora_A)):
            raise ValueError(
                f"merged adapters must be there to merge another, but {gone} was deleted; unmerge first"
            )
        if getattr(base, "groups", 1) > 1:
            raise ValueError(
                "a merged LoRA must fit the weight, but a grouped convolution has no place for it; leave it unmerged"
            )
        if any(self.lora_bias[name] for name in names) and base._parameters["bias"] is None:
            raise ValueError(
                "layer must have a bias to merge an adapter with lora_bias, got none; leave it unmerged"
            )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the layer the very bytes back that it had before anything was merged."""
        base = self.get_base_layer()
        if self._original is None:
            super().unmerge()
            return
        if not isinstance(base, QuantizedLayer):
            raise ValueError(
                "layer must still be quantized to unmerge a LoRA, got a float one; load the model again"
            )
        plan, bias = self._original
        _put(base, plan)
        present = base._parameters["bias"]
        if bias is not None and present is not None:
            present.data = bias.to(present)
        self._original, self._scaling_merged, self.share = None, None, 1.0
        self.merged_adapters.clear()


@final
class PackedLinear(_OnPackedWeight, lora.Linear):
    """A LoRA layer around a `QuantLinear`."""


@final
class PackedConv2d(_OnPackedWeight, lora.Conv2d):
    """A LoRA layer around a `QuantConv2d`."""


def _put(base: QuantizedLayer, plan: LayerPlan) -> None:
    """Give a layer other bytes. Its parameters and buffers stay the same objects, which offloading holds on to."""
    for name, tensor in plan.tensors.items():
        held: Tensor = getattr(base, name)
        held.data = tensor.to(held.device)


_CLASSES = {lora.Linear: PackedLinear, lora.Conv2d: PackedConv2d}


def adopt(wrapper: nn.Module) -> None:
    """Give a wrapper of PEFT the class that knows packed weights.

    Raises:
        ValueError: if it is of another method than LoRA.
    """
    kind = type(wrapper)
    if kind in _CLASSES:
        wrapper.__class__ = _CLASSES[kind]
    elif kind.__module__.startswith("peft."):
        method = kind.__module__.split(".")[2]
        raise ValueError(
            f"adapters on quantized layers must be LoRA, got {method} ({kind.__name__}); "
            "merge it into the float model and quantize that"
        )


def _check_plain(config: Any) -> None:
    """Raise a ValueError unless LoRA is of the kind that only adds a product of two factors."""
    start = config.init_lora_weights
    plain = any(start is known or (isinstance(known, str) and start == known) for known in _PLAIN_STARTS)
    chosen = [name for name in _VARIANTS if getattr(config, name, None)]
    if chosen or not plain:
        got = " and ".join(chosen) if chosen else f"init_lora_weights={start!r}"
        raise ValueError(
            f"LoRA on quantized layers must be the plain one, got {got}, which needs the float weight; "
            "merge it into the float model and quantize that"
        )
