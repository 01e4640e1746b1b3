"""LoRA on packed layers: loading, weighting, merging, saving, and PEFT's wrappers. Users reach it as `difloat.lora`."""

from difloat.lora.adapters import load, merge, save, set_weights, unload, unmerge
from difloat.lora.wrapped import loaded, weights

__all__ = ["load", "loaded", "merge", "save", "set_weights", "unload", "unmerge", "weights"]
