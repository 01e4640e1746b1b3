"""Quantized attention, which rounds query, key, value and attention map to low-bit grids, and fast attention, which does not.

Both enter through diffusers' attention processors. A processor calls `scaled_dot_product_attention` once the heads are split,
and while it runs, that call is answered here. So every processor of every model keeps its own projections, norms, position
embeddings and masks, and no module is patched.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from difloat.kernels import attention as kernels
from difloat.kernels import operators
from difloat.plan.specs import AttentionPlan

_MAP_VALUES = 1 << 24  # values of the attention maps held at a time where a map is quantized: 64 MiB


def has_processor(module: nn.Module) -> bool:
    """Whether a module computes its attention by an exchangeable processor, as diffusers' attention modules do."""
    return hasattr(module, "set_processor") and callable(getattr(module, "processor", None))


def plan_of(module: nn.Module) -> AttentionPlan | None:
    """The plan that a module's attention carries out, or None for one that is not quantized."""
    return next((hook.plan for hook in module._forward_pre_hooks.values() if isinstance(hook, _Kept)), None)


class _Kept:
    """A pre-hook that keeps a module's attention quantized, whatever processor the module is given.

    diffusers sets processors freely, as `set_default_attn_processor` and IP-Adapters do. Being quantized is a fact of the
    module, so the processor that is there at a call gets the plan before it runs.
    """

    def __init__(self, plan: AttentionPlan) -> None:
        self.plan = plan

    def __call__(self, module: nn.Module, args: Any) -> None:
        if getattr(module.processor, "difloat_attention", None) is not self.plan:
            module.processor = _answered(module.processor, self.plan, _is_fast(module.processor))


def _answered(processor: Any, plan: AttentionPlan | None, fast: bool) -> Any:
    """A copy of the processor whose attention is quantized, fast, both, or neither."""
    processor = _plain(processor)
    if plan is None and not fast:
        return processor
    kernels.look(plan)  # before a compiler comes, which cannot
    processor = copy.copy(processor)
    processor.__class__ = _answered_class(type(processor))
    processor.difloat_attention, processor.difloat_fast = plan, fast
    return processor


def _is_fast(processor: Any) -> bool:
    return getattr(processor, "difloat_fast", False)


def check(model: nn.Module, plans: Mapping[str, AttentionPlan]) -> None:
    """Refuse plans of another model.

    Raises:
        ValueError: if a planned module does not exist or has no processor.
    """
    modules = dict(model.named_modules())
    for name in plans:
        if name not in modules or not has_processor(modules[name]):
            raise ValueError(
                f"plan must fit the model, but {name!r} is no attention with a processor; "
                "use the model the plan was made for"
            )


def install(model: nn.Module, plans: Mapping[str, AttentionPlan]) -> None:
    """Quantize the attention of the named modules, in place.

    Raises:
        ValueError: if a planned module does not exist or has no processor. Nothing is changed then.
    """
    check(model, plans)
    for name, plan in plans.items():
        module = model.get_submodule(name)
        _forget(module)
        module.processor = _answered(module.processor, plan, _is_fast(module.processor))
        module.register_forward_pre_hook(_Kept(plan))


def restore(model: nn.Module) -> None:
    """Give every attention its own processor back, in place."""
    for module in model.modules():
        if plan_of(module) is not None:
            _forget(module)
            module.processor = _answered(module.processor, None, _is_fast(module.processor))


def accelerate(model: nn.Module) -> int:
    """Let a diffusers model's attention be computed by `kernels.attention` where that can do it, in place.

    Only bfloat16 and float32 on the CPU without gradients change, and anything else is computed as before, as is bfloat16 where
    torch multiplies it in tiles (AMX). Processors that are bare functions, or modules that hold weights, are left alone.
    Checkpoints do not store this.

    Returns:
        How many attention modules changed.
    """
    modules = [module for module in model.modules() if has_processor(module)]
    slow = [
        m
        for m in modules
        if not _is_fast(m.processor) and not isinstance(m.processor, nn.Module | FunctionType)
    ]
    for module in slow:
        module.processor = _answered(module.processor, plan_of(module), fast=True)
    return len(slow)


def undo_acceleration(model: nn.Module) -> None:
    """Undo `accelerate`. Quantized attention stays quantized."""
    for module in model.modules():
        if has_processor(module) and _is_fast(module.processor):
            module.processor = _answered(module.processor, plan_of(module), fast=False)


def _forget(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, _Kept):
            del module._forward_pre_hooks[key]


def _plain(processor: Any) -> Any:
    # By its class: diffusers makes new ones of a class that it has seen, without what `install` gave the old one.
    if type(processor) not in _CLASSES.values():
        return processor
    plain = copy.copy(processor)
    plain.__class__ = type(processor).__mro__[1]
    for name in ("difloat_attention", "difloat_fast"):
        vars(plain).pop(name, None)
    return plain


_CLASSES: dict[type[Any], type[Any]] = {}  # answered subclasses by the class they are made from


def _answered_class(processor_class: type[Any]) -> type[Any]:
    """A subclass under the same name, since diffusers looks at names and signatures of processors."""
    if processor_class in _CLASSES:
        return _CLASSES[processor_class]
    plain_call = processor_class.__call__

    @functools.wraps(plain_call)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.difloat_fast:
            return planned(self, *args, **kwargs)
        with _Answering(None, []):  # around the plan's: what a plan leaves to torch is fast, too
            return planned(self, *args, **kwargs)

    def planned(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.difloat_attention is None:
            return plain_call(self, *args, **kwargs)
        answered: list[AttentionPlan | None] = []
        with _Answering(self.difloat_attention, answered):
            result = plain_call(self, *args, **kwargs)
        if not answered:
            raise RuntimeError(
                "quantized attention must compute by torch's scaled_dot_product_attention, but the processor did not call it; "
                "set the attention backend 'native', or a processor that does, such as AttnProcessor2_0()"
            )
        return result

    methods = {"__call__": call, "__reduce__": _reduce}
    _CLASSES[processor_class] = type(processor_class.__name__, (processor_class,), methods)
    return _CLASSES[processor_class]


def _reduce(processor: Any) -> tuple[Any, ...]:
    """How an answered processor is copied and pickled, since its class is made here and cannot be found by its name."""
    return _made_again, (type(processor).__mro__[1], vars(processor))


def _made_again(processor_class: type[Any], state: dict[str, Any]) -> Any:
    kernels.look(state.get("difloat_attention"))  # in another process than the one that made it, maybe
    processor = object.__new__(_answered_class(processor_class))
    vars(processor).update(state)
    return processor


class _Answering(TorchFunctionMode):
    """A mode that answers calls of `scaled_dot_product_attention` with quantized ones, or without a plan with fast ones."""

    def __init__(self, plan: AttentionPlan | None, answered: list[AttentionPlan | None]) -> None:
        super().__init__()
        # A list of the caller's, since torch.compile keeps no attributes that are written while a mode is active.
        self.plan, self.answered = plan, answered

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.answered.append(self.plan)
        return (_fast if self.plan is None else functools.partial(attend, self.plan))(*args, **(kwargs or {}))


def _fast(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p or is_causal or enable_gqa or not kernels.supports(query, key, value, attn_mask):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.difloat.attention(query, key, value, attn_mask, factor)


def attend(
    plan: AttentionPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` with its operands and attention map rounded as a plan says.

    Args:
        plan: The grids of operands and attention map.
        query: The queries [b, heads, tokens, channels].
        key: The keys, in the same layout.
        value: The values, in the same layout.
        attn_mask: A boolean mask, or one that is added to the scores.
        dropout_p: The probability of dropout, which a quantized attention map excludes.
        is_causal: Whether a query sees no later keys.
        scale: The factor of the scores, or None for ``channels ** -0.5``.
        enable_gqa: Whether groups of query heads share a key head.

    Raises:
        ValueError: if dropout is asked for together with a quantized attention map.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    if not (dropout_p or is_causal) and kernels.carries_out(plan, query, key, value, attn_mask):
        names = ("" if grid is None else grid.name for grid in (plan.operand, plan.softmax))
        return torch.ops.difloat.attention_on_grids(query, key, value, attn_mask, factor, *names)
    if plan.operand is not None:
        query, key, value = (_per_token_and_head(x, plan.operand.name) for x in (query, key, value))
    if plan.softmax is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if dropout_p:
        raise ValueError(
            f"dropout must be 0 where the attention map is quantized, got {dropout_p}; call model.eval()"
        )
    bias = _additive(attn_mask, is_causal, query, key)
    shape = (*query.shape[:-1], value.shape[-1])
    query, key, value = (x.flatten(0, -3) for x in (query, key, value))  # [b * heads, t, d]
    bias = None if bias is None else bias.expand(*shape[:-1], key.shape[-2]).flatten(0, -3)
    heads_at_once = max(1, _MAP_VALUES // (query.shape[-2] * key.shape[-2]))
    pieces = []
    for at in range(0, len(query), heads_at_once):
        piece = slice(at, at + heads_at_once)
        scores = query[piece] @ key[piece].transpose(-2, -1) * factor  # [heads, q, k]
        if bias is not None:
            scores = scores + bias[piece]
        # Probabilities end at 1, so that is the largest value of the grid.
        top = torch.full((1,), 1 / plan.softmax.max, device=query.device)
        weights = operators.fake_quantize_input(scores.softmax(-1), top, None, plan.softmax.name, False)
        pieces.append(weights @ value[piece])
    return torch.cat(pieces).reshape(shape)


def _per_token_and_head(x: Tensor, format_name: str) -> Tensor:
    return operators.fake_quantize_input(x.flatten(0, -2), None, None, format_name, True).reshape(x.shape)


def _additive(mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as a tensor that is added to the scores, or None without one."""
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, -torch.inf)
