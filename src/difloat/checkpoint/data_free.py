"""Quantization without data: format and clip of every weight searched on the weight alone, input scales found at run time.

What `from_pretrained(..., quantization_config=difloat.DifloatConfig(...))` does while it loads, and what the components of a
pipeline get that are no denoiser. Nothing runs the model, so concatenations are not split and no edge layer is known: what is
inside of lists of blocks is quantized, what a model has once (embedders, final projections) stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from difloat import torch_modes
from difloat.layers import dtype_readers, packed, quantizable
from difloat.methods.input_search import plan_inputs
from difloat.numbers import formats
from difloat.plan import options
from difloat.plan import target as targets
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.rules import Bits, Rule, block_rotation, draft_layer, every_format, floating_point

RECIPE = "datafree"


@options.recipe_options
class Settings:
    """What is asked for.

    Attributes:
        weights: "search" for the format with the lowest squared error per layer among all floating-point formats of the
            width and the table of levels, or the name of one, like "e2m1".
        bits: The bits of weights and inputs, like "w4a8". "" takes the width of `weights` (4 for "search") and 8-bit inputs.
        activations: Format of the inputs, with one scale per token (convolutions: per picture) from the data at run time;
            "" takes the floating-point format of the width that GPUs compute best.
        group_size: Input channels per weight scale. 0 takes one scale per output channel.
        exclude: Layers that stay as they are: names, parts of names between dots, or patterns with ``*``.
        outside: Layers outside of all lists of blocks: "keep" them as they are, or "8bit".
        rotate: Whether inputs of linear layers within the blocks are rotated.
        target: The machine whose fast formats are taken, as for `difloat.plan`.
    """

    weights: str = "search"
    bits: str = ""
    activations: str = ""
    group_size: options.Whole = 128
    exclude: options.Names = ()
    outside: Literal["keep", "8bit"] = "keep"
    rotate: bool = False
    target: targets.Target = "any"

    @cached_property
    def widths(self) -> Bits:
        """The widths asked for. ValueError if the formats have others."""
        weight = 4 if self.weights == "search" else formats.parse(self.weights).bits
        activation = formats.parse(self.activations).bits if self.activations else 8
        found = Bits.parse(self.bits or f"w{weight}a{activation}")
        if self.weights != "search" and found.weight != weight:
            raise ValueError(
                f"bits must fit weights={self.weights!r}, got {self.bits!r}; leave bits out or name another format"
            )
        if self.activations and found.activation != activation:
            raise ValueError(
                f"bits must fit activations={self.activations!r}, got {self.bits!r}; leave bits out or name another format"
            )
        return found


def settings(values: Mapping[str, Any]) -> Settings:
    """Settings from what a user wrote, where None stands for a default.

    Raises:
        ValueError: on an unknown name or a value that is not allowed.
    """
    found: Settings = options.make_options(Settings, {k: v for k, v in values.items() if v is not None})
    _ = found.widths  # refuses bits that do not fit the formats
    for name in (found.weights, found.activations):
        if name not in ("", "search") and not formats.parse(name).signed:
            raise ValueError(
                f"formats must be signed where no zero point is searched, got {name!r}; write for example 'e2m1'"
            )
    return found


@dataclass(frozen=True)
class Decision:
    """How every layer of a model is quantized, and why some are not.

    Attributes:
        layers: A function for every layer name that makes a plan of the float weight.
        skipped: Reasons by name.
        settings: What was asked for.
    """

    layers: Mapping[str, Callable[[Tensor], LayerPlan]]
    skipped: Mapping[str, str]
    settings: Settings

    def plan(self, found: Mapping[str, LayerPlan]) -> Plan:
        """The plan of the model, once every layer has its own."""
        widths = self.settings.widths
        ordered = {name: found[name] for name in self.layers}
        return Plan(RECIPE, str(replace(widths, wide=16)), ordered, self.skipped, asdict(self.settings))


def decide(model: nn.Module, wanted: Settings, float32: Sequence[str] = ()) -> Decision:
    """Choose the layers of a model, which may be on the meta device: only names and shapes count.

    Args:
        model: Float.
        wanted: What is asked for.
        float32: Parts of names that the model wants in float32 whatever its dtype; such layers stay as they are.

    Raises:
        ValueError: if no layer is left to quantize.
    """
    inside = set(packed.inside_blocks(model)) or set(packed.quantizable(model))
    tied = _tied(model)
    rules: dict[str, Callable[[Tensor], LayerPlan]] = {}
    skipped: dict[str, str] = dtype_readers.kept(model)
    for name in packed.quantizable(model):
        if name in tied:
            skipped[name] = "weight is shared with another module"
        elif any(_names(pattern, name) for pattern in wanted.exclude):
            skipped[name] = "excluded"
        elif set(float32) & set(name.split(".")):
            skipped[name] = "kept in float32 by the model"
        elif name not in inside and wanted.outside == "keep":
            skipped[name] = "outside of the blocks"
        else:
            rules[name] = _planner(name, wanted, name in inside)
    if not rules:
        reason = next(iter(skipped.values()), "it has no linear or convolution layers in float")
        raise ValueError(
            f"{type(model).__name__} must have a layer to quantize, got none: {reason}; exclude fewer layers"
        )
    return Decision(rules, skipped | quantizable.staying_float(model), wanted)


@torch_modes.plain()
def plan(model: nn.Module, wanted: Settings, *, progress: bool = True) -> Plan:
    """The plan of a float model, which stays untouched. ValueError as from `decide`, or if a weight is not finite."""
    decision = decide(model, wanted)
    todo = tqdm(decision.layers.items(), desc=f"search {type(model).__name__}", disable=not progress)
    return decision.plan({name: make(packed.weight_of(model, name).detach()) for name, make in todo})


def _names(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


def _tied(model: nn.Module) -> set[str]:
    """Layers whose weight is the parameter of another module too, or will be once it is loaded."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    names = {name for shared in owners.values() if len(shared) > 1 for name in shared}
    declared: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    return {name.removesuffix(".weight") for name in [*names, *declared, *declared.values()]}


def _planner(name: str, wanted: Settings, inside: bool) -> Callable[[Tensor], LayerPlan]:
    bits, machine = wanted.widths, wanted.target
    width = bits.weight if inside else 8
    searched = wanted.weights == "search" or width != bits.weight
    grid = every_format(width) if searched else (formats.parse(wanted.weights),)
    rule = Rule(grid, "group", wanted.group_size) if wanted.group_size else Rule(grid, "channel")
    activation = None
    if bits.activation is not None:
        named = wanted.activations if inside else ""
        input_width = bits.activation if inside else 8
        input_format = formats.parse(named) if named else floating_point(input_width)
        activation = targets.restrict(Rule((input_format,), "token", online=True), machine)
    rule = targets.restrict(rule, machine)

    def make(weight: Tensor) -> LayerPlan:
        if not bool(weight.isfinite().all()):
            raise ValueError(
                f"weights must be finite, got NaN or Inf in layer {name!r}; repair the checkpoint"
            )
        rotation = block_rotation(weight.shape) if wanted.rotate and inside else None
        turned = weight if rotation is None else rotation.forward(weight)
        found = replace(draft_layer(turned, [weight.shape[1]], rule).plan(), rotation=rotation)
        return found if activation is None else plan_inputs(found, None, activation, torch.Generator())

    return make
