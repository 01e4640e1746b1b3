"""What ``--target`` and ``--for`` leave of a recipe's candidates: what a machine computes fast, what a kind of file holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from difloat.numbers import formats
from difloat.numbers.formats import Format, candidates
from difloat.numbers.integer_grids import grid_of
from difloat.plan.rules import Rule
from difloat.plan.specs import Rotation

Target = Literal["any", "cpu", "comfy", "gguf", "openvino", "vllm", "diffusers"]
FILES: tuple[Target, ...] = ("comfy", "gguf", "openvino", "vllm", "diffusers")
BRANCH_FILES: tuple[Target, ...] = ("vllm",)  # which have a low-rank branch beside every weight
_BLOCK = 32  # weights of a block of GGUF
COMFY_ROTATION = Rotation(256, regular=True)  # of layers with `_WHOLE_LEVELS`
# Lloyd-Max levels of a group of normal numbers in units of a fifteenth: whole multiples of up to 8 stay within int8.
_WHOLE_LEVELS = (-15, -12, -10, -8, -6, -4, -2, -1, 1, 2, 4, 6, 8, 10, 12, 15)
_OPENVINO = ("e2m1", "e4m3fn")  # formats beside the uniform ones that OpenVINO has a type for


def check_file(name: str, machine: str) -> Target:
    """The target that a kind of file is.

    Raises:
        ValueError: if there is no such kind of file, or a machine is named beside it.
    """
    if machine != "any":
        raise ValueError(
            f"target must be left out where --for says what the file is, got {machine!r}; leave one of them out"
        )
    for known in FILES:
        if name == known:
            return known
    raise ValueError(f"for must be one of {', '.join(FILES)}, got {name!r}")


def fits(format: Format, target: Target) -> bool:
    """Whether the target computes products of this format in integers: on a CPU if its values become int8."""
    return target != "cpu" or grid_of(format) is not None


def restrict(rule: Rule, target: Target) -> Rule:
    """The rule with the formats that fit.

    Where none of them does, all floating-point formats of the same width that do take their place: `e4m3` gives way to
    `e1m6`, at the same 8 bits.
    """
    kept = tuple(format for format in rule.formats if fits(format, target))
    if not kept:
        first = rule.formats[0]
        kept = tuple(f for f in candidates(first.bits, first.signed) if fits(f, target))
    return rule if kept == rule.formats else replace(rule, formats=kept)


def fit(
    rule: Rule, learn: bool, linear: bool, channels: int, target: Target, inputs: int | None = None
) -> Rule | str:
    """What is asked of a weight so that a kind of file holds it exactly, or why it must stay float there.

    Args:
        rule: What the recipe asks.
        learn: Whether rounding is learned, which tables are no grid for.
        linear: Whether the layer is linear, or else a convolution.
        channels: The channels of the layer's input.
        target: One of `FILES`.
        inputs: Bits of the layer's inputs, or None where they stay. At 4 bits ComfyUI's files then have 16 levels for
            rotated inputs, `COMFY_ROTATION`, and 8 bits where its blocks do not divide the channels.

    Raises:
        ValueError: if rounding is learned where the file has a table.
    """
    if target == "openvino":
        kept = tuple(f for f in rule.formats if (f.uniform or f.name in _OPENVINO) and f.specials != "ieee")
        return (
            replace(rule, formats=kept) if kept else replace(rule, formats=_integers(rule), zero_points=None)
        )
    if not linear:
        return f"convolution, which {target} files hold in float"
    wide = rule.formats[0].bits > 4
    if target == "gguf":
        if channels % _BLOCK:
            return f"{channels} input channels, no multiple of {_BLOCK}, which gguf files hold in float"
        asked = replace(rule, granularity="group", group_size=_BLOCK, scales="float16")
        if rule.zero_points is not None and not wide:
            return replace(asked, formats=(formats.parse("uint4"),))
        tables = () if learn else (formats.parse("iq4nl"),)
        names = (formats.parse("int8"),) if wide else (*tables, formats.parse("int4"))
        return replace(asked, formats=names, zero_points=None)
    if target == "vllm" and wide:
        return f"{rule.formats[0].bits} bits, which vllm files hold in float"
    rounded = (
        target == "comfy" and inputs == 8
    )  # such files have the layout with a rotation for inputs of 8 bits
    if not wide and rounded and not channels % COMFY_ROTATION.block:
        if learn:
            raise ValueError(
                "rounding must be nearest for comfy files at w4a8, whose weights are rotated and in tables, got learned; add "
                "--set rounding=nearest, or take rtn"
            )
        grid = (formats.parse(f"table({','.join(map(str, _WHOLE_LEVELS))})"),)
        return replace(
            rule, formats=grid, zero_points=None, granularity="group", group_size=16, scales="whole"
        )
    if not wide and not rounded:
        if target != "comfy" and channels % 16:
            return f"{channels} input channels, no multiple of 16, which {target} files hold in float"
        asked = replace(rule, formats=(formats.parse("e2m1"),), zero_points=None)
        return replace(asked, granularity="group", group_size=16, scales="e4m3")
    name = "int8" if target == "comfy" else "e4m3fn"
    asked = replace(rule, formats=(formats.parse(name),), zero_points=None, scales="float32")
    return replace(asked, granularity="channel", group_size=None)


def fit_inputs(bits: int | None, weight_bits: int, target: Target) -> Rule | None:
    """What is asked of inputs so that a kind of file says it.

    Raises:
        ValueError: if such files leave inputs of this width to their reader.
    """
    if target not in FILES or bits is None:
        return None
    own = {"comfy": "int8", "diffusers": "e4m3fn"}.get(target)
    if own is None or bits != 8 or (weight_bits <= 4 and (target, weight_bits) != ("comfy", 4)):
        usual = f"w{weight_bits}a16" + " or w8a8" * bool(own) + ", w4a8" * (target == "comfy")
        raise ValueError(
            f"bits must leave inputs as they are for {target} files, such as {usual}, got w{weight_bits}a{bits}"
        )
    return Rule((formats.parse(own),), "token", online=True)


def _integers(rule: Rule) -> tuple[Format, ...]:
    return (formats.parse(f"int{max(rule.formats[0].bits, 2)}"),)
