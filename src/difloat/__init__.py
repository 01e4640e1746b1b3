"""difloat: low-bit floating-point quantization of diffusion models.

```python
import difloat
pipeline = difloat.reference("emoji-pixart")                    # or any diffusers pipeline
difloat.quantize(pipeline, recipe="lbfp", bits="w4a8")          # calibrates on its own trajectories
difloat.save(pipeline, "emoji-fp4")                             # packed: 4 bits take 4 bits
pipeline = difloat.load("emoji-fp4")                            # or plain from_pretrained after `import difloat`
```

Importing difloat imports neither diffusers nor any backend.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from difloat.checkpoint import CheckpointError, load, save, verify
from difloat.checkpoint.register import register
from difloat.kernels.dispatch import set_backend, use_backend
from difloat.layers.fast_attention import accelerate as accelerate_attention
from difloat.lora.adapters import load_lora, merge_lora, save_lora, set_lora, unload_lora, unmerge_lora
from difloat.numbers import formats, rounding
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.specs import Part, QuantSpec

if TYPE_CHECKING:
    from difloat.api import apply, plan, quantize, restore
    from difloat.checkpoint.config import DifloatConfig
    from difloat.evaluation.diagnose import diagnose
    from difloat.reference_models import load as reference

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "DifloatConfig",
    "LayerPlan",
    "Part",
    "Plan",
    "QuantSpec",
    "accelerate_attention",
    "apply",
    "diagnose",
    "formats",
    "load",
    "load_lora",
    "merge_lora",
    "plan",
    "quantize",
    "reference",
    "restore",
    "rounding",
    "save",
    "save_lora",
    "set_backend",
    "set_lora",
    "unload_lora",
    "unmerge_lora",
    "use_backend",
    "verify",
]

register()


def __getattr__(name: str) -> Any:
    if name in ("apply", "plan", "quantize", "restore"):
        return getattr(import_module("difloat.api"), name)
    if name == "diagnose":
        return import_module("difloat.evaluation.diagnose").diagnose
    if name == "DifloatConfig":
        return import_module("difloat.checkpoint.config").DifloatConfig
    if name == "reference":
        return import_module("difloat.reference_models").load
    raise AttributeError(f"module 'difloat' has no attribute {name!r}")
