"""Fast attention for a model's existing attention processors, through diffusers' own interface for replacing them.

diffusers' processors differ from family to family, but all end in `torch.nn.functional.scaled_dot_product_attention`.
`accelerate` wraps every processor of a model in one that runs the original and computes that one call by `kernels.attention`
where it can: projections, norms, rotary embeddings and masks stay what the family does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from difloat.kernels import attention


class FastAttention:
    """An attention processor that runs another one; `original` is that one."""

    def __init__(self, original: Any) -> None:
        self.original = original

        @functools.wraps(original.__call__)
        def run(*args: Any, **kwargs: Any) -> Any:
            with _Redirected():
                return original(*args, **kwargs)

        # diffusers passes only arguments that the signature of `processor.__call__` names.
        self.__dict__["__call__"] = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the original processor returns."""
        return self.__dict__["__call__"](*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> FastAttention:
        """Processors hold no tensors; the copy runs the same original."""
        return FastAttention(self.original)


class _Redirected(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` is computed by `kernels.attention` wherever that supports the call."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p or is_causal or enable_gqa or not attention.supports(query, key, value, attn_mask):
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.difloat.attention(query, key, value, attn_mask, factor)


def accelerate(model: nn.Module) -> int:
    """Wrap the attention processors of a diffusers model, in place; returns how many.

    Only bfloat16 on the CPU without gradients changes; anything else is computed as before. Processors that are modules
    themselves (they hold weights) are left alone. Not stored in checkpoints.
    """
    wrapped = 0
    for module in model.modules():
        processor = getattr(module, "processor", None)
        setter: Any = getattr(module, "set_processor", None)
        if not callable(processor) or not callable(setter):
            continue
        if isinstance(processor, nn.Module | FastAttention):
            continue
        setter(FastAttention(processor))
        wrapped += 1
    return wrapped


def restore(model: nn.Module) -> None:
    """Undo `accelerate`."""
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, FastAttention):
            setter: Any = module.set_processor
            setter(processor.original)
