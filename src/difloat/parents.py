"""What modules do with the weights of their children besides calling them: some ask for the dtype and cast the input to it.

With packed bytes as the weight such a cast destroys the input. T5's feed-forward and its relatives cast unless the dtype is
int8, which they take for "quantized"; so their layers hold the packed bytes as int8. Layers of parents that always cast stay
float.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Hashable, Iterator
from functools import cache
from types import FunctionType
from typing import Literal, cast

import torch
from torch import Tensor, nn

from difloat import modes


class PackedWeight(nn.Module):
    """A layer's packed weight, and what it tells a parent that asks for its dtype."""

    weight: Tensor
    stored_dtype: torch.dtype = torch.uint8
    input_dtype: torch.dtype | None = None

    def hold(self, packed: Tensor) -> None:
        """Take over packed bytes as the weight."""
        self.weight = nn.Parameter(modes.normal(packed).view(self.stored_dtype), requires_grad=False)

    @property
    def packed(self) -> Tensor:
        """The packed weight as uint8."""
        return self.weight if self.weight.dtype == torch.uint8 else self.weight.view(torch.uint8)

    def answer_as(self, dtype: torch.dtype | None) -> None:
        """For a parent that casts the input to the weight's dtype unless that is int8: be int8, and cast to `dtype` here.

        To be called before the layer is quantized; None leaves the input as it comes.
        """
        self.stored_dtype, self.input_dtype = torch.int8, dtype

    def _cast(self, x: Tensor) -> Tensor:
        return x if self.input_dtype is None else x.to(self.input_dtype)


Asking = Literal["", "unless int8", "always"]
_READS = re.compile(r"self\.(\w+)\.weight\.dtype(?!\.is_floating_point)")


@cache
def _asked(forward: Hashable) -> dict[str, Asking]:
    """Children whose weight's dtype a forward pass reads, given its function."""
    try:
        source = inspect.getsource(cast(FunctionType, forward))
    except (OSError, TypeError):  # no source: built in, or typed into an interpreter
        return {}
    how: Asking = "unless int8" if "torch.int8" in source else "always"
    return dict.fromkeys(_READS.findall(source), how)


def asks(parent: nn.Module, child: str) -> Asking:
    """Whether `parent` casts the input of its layer `child` to the dtype of that layer's weight."""
    return _asked(type(parent).forward).get(child, "")


def casts(model: nn.Module) -> Iterator[str]:
    """Names of the layers of `model` whose input is always cast to the dtype of their weight."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        yield from (prefix + child for child, how in _asked(type(module).forward).items() if how == "always")
