"""What our checkpoint or a kind of file will store of a layer, said before the layer is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from difloat.layers import packed
from difloat.methods.cost import Cost
from difloat.numbers import formats
from difloat.plan import vllm_models
from difloat.plan.file_offers import LEAST_BITS, MOST_BITS, file_bytes, float_bytes, offers
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import Bits, Rule
from difloat.plan.specs import Part, layer_tensor_shapes
from difloat.plan.target import FILES, Target, fit


@dataclass(frozen=True)
class Ahead:
    """A checkpoint or a file that will be made.

    Attributes:
        target: The kind of file. Anything else is our checkpoint.
        model: The name of the model's class.
        bits: What the user asks for. A recipe that chooses formats by layer meets it on average.
        rank: That of all branches of the file, 0 without.
    """

    target: Target
    model: str
    bits: Bits
    rank: int = 0

    def rule(self, name: str, asked: Cost, weight: Rule, shape: Sequence[int], wide: bool) -> Rule | str:
        """The rule by which it holds a weight, or why that must stay float there.

        Args:
            name: The layer's name.
            asked: What the recipe states of itself.
            weight: What it asks of this weight.
            shape: The shape [o, i, *k] of the weight.
            wide: Whether the layer keeps 8 bits. Of the formats among which a recipe chooses, others give the smallest.
        """
        if self.target not in FILES:
            return weight
        if self.target == "vllm" and (reason := vllm_models.left_float(self.model, name)):
            return reason
        if asked.for_files:  # the layer is laid out at 8 bits, and gets one of the file's formats later
            weight = replace(weight, formats=(formats.parse("int8"),))
        learn = asked.iterations > 0 and weight.formats[0].bits <= LEAST_BITS
        found = fit(weight, learn, len(shape) == 2, shape[1], self.target, self.bits.activation)
        made = self._offers(asked, shape)
        return found if isinstance(found, str) or not made else made[-1 if wide else 0]

    def layer_bytes(
        self, asked: Cost, rule: Rule, inputs: Rule | None, shape: Sequence[int], wide: bool
    ) -> int:
        """The bytes of a layer.

        Args:
            asked: What the recipe states of itself.
            rule: What `rule` says of the weight.
            inputs: What the recipe asks of the layer's input, or None to leave it.
            shape: The shape [o, i, *k] of the weight.
            wide: Whether the layer keeps 8 bits.
        """
        if self.target not in FILES:
            return _in_checkpoint(asked, rule, inputs, shape, wide)
        made = self._offers(asked, shape)
        if not made:
            return file_bytes(shape, rule, self.target, self.rank)
        sizes = [file_bytes(shape, one, self.target) for one in made]
        share = 1.0 if wide else (self.bits.mean - LEAST_BITS) / (MOST_BITS - LEAST_BITS)
        return round((1 - share) * min(sizes) + share * max(sizes))

    def _offers(self, asked: Cost, shape: Sequence[int]) -> tuple[Rule, ...]:
        return offers(shape, self.bits.activation is not None, self.target) if asked.for_files else ()

    def others_bytes(self, module: nn.Module, quantized: Sequence[str]) -> int:
        """The bytes of what a model has beside its quantized layers, less what those store together."""
        weights = {f"{name}.weight" for name in quantized}
        tensors = module.state_dict()
        if self.target == "openvino":  # a traced model holds what its class computes when it is made, too
            tensors |= dict(module.named_buffers())
        others = {name: tensor for name, tensor in tensors.items() if name not in weights}
        total = sum(float_bytes(tensor, self.target) for tensor in others.values())
        for names in vllm_models.joined(self.model, quantized).values() if self.target == "vllm" else ():
            columns = packed.weight_of(module, names[0]).shape[1]
            total -= (len(names) - 1) * 2 * (1 + columns * (1 + self.rank))  # bfloat16
        return total


def rank_of(asked: Cost, shapes: Iterable[Sequence[int]]) -> int:
    """The rank of all branches of a file, which is that of the largest, of weights of these shapes."""
    sides = [asked.pairs_of(shape) for shape in shapes if len(shape) == 2]
    return max((side.rank for side in sides if side is not None), default=0)


def _in_checkpoint(asked: Cost, rule: Rule, inputs: Rule | None, shape: Sequence[int], wide: bool) -> int:
    spec = inputs.spec(inputs.formats[0]) if inputs else None
    part = Part(shape[1], rule.spec(rule.formats[0]), spec)
    side = None if wide else asked.pairs_of(shape)
    variants = 1 if wide and asked.epochs else asked.variants
    shapes = layer_tensor_shapes(shape, [part], variants, asked.smoothed, side=side)
    return sum(LayerPlan.dtype_of(name).itemsize * math.prod(own) for name, own in shapes.items())
