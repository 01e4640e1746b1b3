"""Modules that read the weights of their children besides calling them, as some do to cast the input to the weight's dtype.

With packed bytes as the weight such a cast destroys the input, and a product with such a weight is noise. T5's feed-forward,
Wan's time embedder and their relatives cast unless the dtype is int8, which they take for "quantized". So their layers hold the
packed bytes as int8. Layers whose dtype or weight is used in any other way stay float, and the plan says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from difloat import torch_modes
from difloat.layers import code_readers
from difloat.layers.code_readers import ANY, ENTRY, FIRST, Path, Read, Use

REASONS: dict[Use, str] = {
    "dtype": "the model casts to the dtype of its weight",
    "values": "the model reads its weight without calling it",
}


class HoldsPackedWeight(nn.Module):
    """A layer with a packed weight, which it stores as int8 for a parent that asks for the weight's dtype."""

    weight: Tensor
    stored_dtype: torch.dtype = torch.uint8
    input_dtype: torch.dtype | None = None

    def hold(self, packed: Tensor) -> None:
        """Take over packed uint8 bytes as the weight.

        The weight comes after the bias, since some pipelines of diffusers compute in the dtype of a model's first parameter.
        """
        if (
            next(reversed(self._parameters), None) != "weight"
        ):  # else keys stay, which another thread may go through
            self._parameters.pop("weight", None)
        self.weight = nn.Parameter(torch_modes.normal(packed).view(self.stored_dtype), requires_grad=False)

    @property
    def packed(self) -> Tensor:
        """The packed weight as uint8."""
        return self.weight if self.weight.dtype == torch.uint8 else self.weight.view(torch.uint8)

    def answer_as(self, dtype: torch.dtype | None) -> None:
        """Store the weight as int8, for a parent that casts the input to the weight's dtype unless that is int8.

        This must be called before the layer is quantized.

        Args:
            dtype: What the layer casts its input to itself. None leaves the input as it comes.
        """
        self.stored_dtype, self.input_dtype = torch.int8, dtype

    def _cast(self, x: Tensor) -> Tensor:
        return x if self.input_dtype is None else x.to(self.input_dtype)


def use_of(model: nn.Module, name: str) -> Use | None:
    """How the modules around a layer use its weight besides calling it, as far as their code shows, or None.

    Args:
        model: The model.
        name: The dotted name of the layer in the model.
    """
    *within, _ = parts = tuple(name.split("."))
    modules: list[nn.Module] = [model]
    for part in within:
        modules.append(modules[-1].get_submodule(part))
    uses = set()
    for at, found in enumerate(_reads(tuple(_classes(module) for module in modules))):
        uses |= {read.use for read in found if _names(read.path, parts[at:], modules[at])}
    return next((use for use in ("values", "dtype", "dtype unless int8") if use in uses), None)


def kept(model: nn.Module) -> dict[str, str]:
    """The reasons, by name, for layers that must stay float because their weight is read besides calling them."""
    found = {}
    for name, module in model.named_modules():
        if name and isinstance(module, nn.Linear | nn.Conv2d) and not isinstance(module, HoldsPackedWeight):
            use = use_of(model, name)
            if use in REASONS:
                found[name] = REASONS[use]
    return found


_Classes = tuple[type, tuple[type, ...]]


def _classes(module: nn.Module) -> _Classes:
    """The class of a module, and the classes that it may hand itself to, such as those of attention processors."""
    others: list[Any] = [*vars(module).values(), *module._modules.values()]
    kinds: dict[type, None] = dict.fromkeys(map(type, others))
    return type(module), tuple(kind for kind in kinds if "__call__" in code_readers.functions(kind))


@cache
def _reads(chain: tuple[_Classes, ...]) -> tuple[frozenset[Read], ...]:
    """The reads of each of several modules, every one the child of the one before."""
    owners = [[(own, False), *((other, True) for other in others)] for own, others in chain]
    names = code_readers.reachable([owner for of_one in owners for owner in of_one])
    return tuple(
        frozenset().union(
            *(code_readers.code_of(cls, name, helper).reads for cls, helper in of_one for name in names)
        )
        for of_one in owners
    )


def _names(path: Path, parts: Path, owner: nn.Module) -> bool:
    """Whether a path, seen from `owner`, stands for the weight of its layer `parts`."""
    *steps, last = path
    if last == "weight":
        return _fits(steps, parts)
    assert last in (ANY, FIRST)
    for end in range(len(parts) + 1):
        if _fits(steps, parts[:end]) and (
            last == ANY or _is_first(owner.get_submodule(".".join(parts[:end])), ".".join(parts[end:]))
        ):
            return True
    return False


def _fits(steps: Sequence[str], parts: Sequence[str]) -> bool:
    if not steps:
        return not parts
    if steps[0] == "**":
        return any(_fits(steps[1:], parts[at:]) for at in range(len(parts) + 1))
    return bool(parts) and steps[0] in (ENTRY, parts[0]) and _fits(steps[1:], parts[1:])


def _is_first(module: nn.Module, name: str) -> bool:
    first = next(_parameter_names(module), "")
    return first == (f"{name}.weight" if name else "weight")


def _parameter_names(module: nn.Module) -> Iterator[str]:
    return (name for name, _ in module.named_parameters())
