"""What an installed wheel must do on a bare machine: find its native library, compute a layer in integers, know its version."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys

import torch
from torch import nn

import difloat
from difloat.kernels import dispatch, native_library
from difloat.layers import install
from difloat.numbers.formats import parse
from difloat.plan.encode import plan_layer
from difloat.plan.specs import Part, QuantSpec


def main() -> None:
    """Exit with a message at the first thing that is not so."""
    if importlib.metadata.version("difloat") != difloat.__version__:
        sys.exit(f"version {importlib.metadata.version('difloat')} is not {difloat.__version__}")
    print(
        "difloat", difloat.__version__, "from", difloat.__file__, "| compiler:", shutil.which("c++") or "none"
    )
    unit = native_library.unit()
    print("unit of the native library:", unit, "| backends:", ", ".join(dispatch.available()))
    if platform.system() == "Linux" and unit is None:
        sys.exit("the wheel has no unit of the native library for this machine")
    model = nn.Sequential(nn.Linear(256, 64))
    weight, x = model[0].weight.detach(), torch.randn(70, 256)
    spec = QuantSpec(parse("e2m1"), "channel")
    part = Part(256, spec, QuantSpec(parse("int8"), "token", online=True))
    install.install(model, "0", plan_layer(weight, [part], [weight.abs().amax(1) / 6]))
    results = {}
    for name in dispatch.available():
        with torch.no_grad(), difloat.use_backend(name):
            results[name] = model(x)
    for name, result in results.items():
        far = (result - results["reference"]).abs().max().item()
        print(f"{name}: at most {far:.1e} from the reference")
        if far > 1e-4:
            sys.exit(f"backend {name} is wrong")


if __name__ == "__main__":
    main()
