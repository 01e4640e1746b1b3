"""OrbitQuant (arXiv:2607.02461), for comparison: permuted block-Hadamard rotations and one table of levels, no data.

Taken from -> here:
  inputs of linear layers permuted, rotated in blocks, the rotation undone by the weight   `numbers.hadamard`
  Lloyd-Max levels of a normal variable for weights, as rotated weights are near normal    `numbers.tables.of_normal`
Not stated there, chosen here:
  blocks of up to 256 channels; scales of rows searched; 8 bits for first and last layer, convolutions not rotated
Differs from the paper: inputs are integers scaled by the largest of their token in place of Lloyd-Max levels and norms, because
tables are for weights here; from 5 bits on weights are integers with a zero point, as tables end at 16 levels.
"""

from __future__ import annotations

from difloat.layers import packed
from difloat.methods import post_training
from difloat.methods.cost import Cost
from difloat.methods.post_training import Bits, LayerRules, Outcome, Sequencing, Task
from difloat.methods.trace import Trace
from difloat.numbers import formats, tables
from difloat.plan.options import Names, Positive, recipe_options
from difloat.plan.rules import FEW_BITS, Rule, asymmetric_integers, block_rotation, online_integers

SUMMARY = "inputs rotated by permuted block Hadamard matrices, levels of a normal variable, no data (arXiv:2607.02461)"


@recipe_options
class Options:
    """Options of OrbitQuant.

    Attributes:
        block: The most channels that a rotation mixes; the largest power of two up to it that divides the input is taken.
        permuted: Permute channels before they are cut into blocks.
        keep_8bit: The layers that keep 8 bits, as "first", "last", or names of layers.
    """

    block: Positive = 256
    permuted: bool = True
    keep_8bit: Names = ("first", "last")


def needs_data(options: Options, bits: Bits) -> bool:
    """Whether the recipe needs data, which it never does."""
    return False


def plan(task: Task, options: Options) -> Outcome:
    """Quantize the task's model by OrbitQuant."""

    def rules(name: str, seen: Trace) -> LayerRules:
        kept = post_training.keeps_8bit(name, seen, options.keep_8bit)
        inputs = task.bits.activation and (8 if kept else task.bits.activation)
        shape = packed.weight_of(task.model, name).shape
        rotation = block_rotation(shape, options.block, options.permuted)
        weight = _weight(8 if kept else task.bits_of(name))
        return LayerRules(weight, online_integers(inputs, 0), rotation=rotation)

    return post_training.run(task, rules, Sequencing())


def cost(options: Options, bits: Bits) -> Cost:
    """What OrbitQuant asks of the denoiser, which is nothing, and stores."""
    return Cost(_weight(bits.weight), online_integers(bits.activation, 0), options.keep_8bit, rotated=True)


def _weight(bits: int) -> Rule:
    if bits > FEW_BITS:
        return asymmetric_integers(bits, "channel")
    return Rule((formats.parse(tables.name_of(tables.of_normal(2**bits))),), "channel")
