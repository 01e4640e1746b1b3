"""Low-bit floating-point quantization of diffusion models.

```python
import difloat
pipeline = difloat.reference("emoji-pixart")                    # or any diffusers pipeline
difloat.quantize(pipeline, bits="w4a8")                         # calibrates on its own trajectories
difloat.save(pipeline, "emoji-fp4")                             # packed: 4 bits take 4 bits
pipeline = difloat.load("emoji-fp4")                            # or plain from_pretrained after `import difloat`
```

Importing difloat imports neither diffusers nor any backend.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from difloat import lora
from difloat.api import (  # binds `difloat.plan` to the function, after its folder
    apply,
    plan,
    quantize,
    repair,
    restore,
)
from difloat.checkpoint import CheckpointError, load, save, verify
from difloat.checkpoint.register import register
from difloat.kernels.dispatch import use_backend
from difloat.numbers import formats
from difloat.plan.plan import Plan

if TYPE_CHECKING:
    from difloat import evaluation as evaluate
    from difloat import interchange
    from difloat.checkpoint.config import DifloatConfig
    from difloat.evaluation.diagnosis import diagnose
    from difloat.reference_models import load as reference

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "DifloatConfig",
    "Plan",
    "apply",
    "diagnose",
    "evaluate",
    "formats",
    "interchange",
    "load",
    "lora",
    "plan",
    "quantize",
    "reference",
    "repair",
    "restore",
    "save",
    "use_backend",
    "verify",
]
_LATER = {  # what needs diffusers, or what few programs use, is imported at its first use
    "DifloatConfig": ("difloat.checkpoint.config", "DifloatConfig"),
    "diagnose": ("difloat.evaluation.diagnosis", "diagnose"),
    "evaluate": ("difloat.evaluation", None),
    "interchange": ("difloat.interchange", None),
    "reference": ("difloat.reference_models", "load"),
}

register()


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'difloat' has no attribute {name!r}")
    module, attribute = _LATER[name]
    return getattr(import_module(module), attribute) if attribute else import_module(module)
