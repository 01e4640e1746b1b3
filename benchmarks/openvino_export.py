"""An exported denoiser on OpenVINO's CPU runtime beside difloat's own kernels and OpenVINO's own compression, in one run.

All hold the same model. "difloat" is the packed checkpoint, "difloat in OpenVINO" its export, "OpenVINO float32" the export
of the float model, and "OpenVINO's compression" is that with the weights compressed by `nncf.compress_weights` to the same
width, where nncf is installed. Calls are interleaved. The error is that of the outputs to the float model's.

    python benchmarks/openvino_export.py emoji-unet --bits w4a16 w8a16

Writes ``benchmarks/results/openvino-export.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

import difloat
from difloat import api, interchange, reference_models
from difloat.interchange import openvino_ir
from difloat.pipelines import denoiser_of

OUT = harness.RESULTS / "openvino-export.json"
GROUP = 16  # divides the channels of both embedded models, which nncf asks for


def compiled(model: Any, inputs: dict[str, Any]) -> Callable[[], Tensor]:
    """A call of a model, a file or one in memory, on as many threads as torch has."""
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = (
        ov.Core()
        .compile_model(model, "CPU", {**settings, "PERFORMANCE_HINT": "LATENCY"})
        .create_infer_request()
    )
    return lambda: torch.from_numpy(request.infer(inputs)[0].copy())


def in_torch(module: torch.nn.Module, arguments: dict[str, Any]) -> Callable[[], Tensor]:
    """A call of a module of diffusers."""

    def call() -> Tensor:
        with torch.inference_mode():
            return module(**{**arguments, "return_dict": False})[0]

    return call


def compressed(file: Path, bits: int) -> Any:
    """A float export with OpenVINO's own weight compression; None without nncf."""
    try:
        import nncf
    except ImportError:
        return None
    import openvino as ov

    model = ov.Core().read_model(file)
    if bits == 8:
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    mode = nncf.CompressWeightsMode.INT4_SYM
    return nncf.compress_weights(model, mode=mode, group_size=GROUP, all_layers=True)


def race(calls: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Median milliseconds of every call, called in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(times) for name, times in seconds.items()}


def compare(model: str, bits: str, batch: int, repeats: int, folder: Path) -> dict[str, Any]:
    """One width: times, errors and sizes."""
    floats, packed = reference_models.load(model), reference_models.load(model)
    name, module = denoiser_of(floats)
    args, kwargs = openvino_ir.example_call(floats, name, api.prompts_for(floats, None))
    arguments = _repeated(openvino_ir.by_name(module, (args, kwargs)), batch)
    inputs = {key: value.numpy() for key, value in arguments.items() if isinstance(value, Tensor)}
    options = {
        "grid": "int",
        "weight_granularity": "group",
        "group_size": GROUP,
        "keep_8bit": (),
        "split": False,
    }
    api.quantize(packed, "rtn", bits, progress=False, **options)
    difloat.save(packed, folder / bits)
    file = interchange.export_checkpoint(folder / bits, folder / f"{bits}.xml", "openvino")
    plain = folder / "float.xml"
    if not plain.exists():
        openvino_ir.write(module, {}, (args, kwargs), plain)
    calls = {
        "torch float32": in_torch(module, arguments),
        "difloat": in_torch(denoiser_of(packed)[1], arguments),
        "difloat in OpenVINO": compiled(file, inputs),
        "OpenVINO float32": compiled(plain, inputs),
    }
    own = compressed(plain, int(bits[1]))
    if own is not None:
        calls["OpenVINO's compression"] = compiled(own, inputs)
    exact, ours = calls["torch float32"](), calls["difloat"]()
    times = race(calls, repeats)
    rows = {}
    for title, call in calls.items():
        result = call()
        rows[title] = {
            "median_ms": times[title],
            "error": float((result - exact).norm() / exact.norm()),
            "largest_difference_to_difloat": float((result - ours).abs().max()),
        }
        sys.stdout.write(f"{model} {bits} batch {batch}, {title}: {json.dumps(rows[title])}\n")
    sizes = {"difloat in OpenVINO": file, "OpenVINO float32": plain}
    bytes_ = {title: path.with_suffix(".bin").stat().st_size for title, path in sizes.items()}
    own_files = (folder / bits / name).glob("*.safetensors")
    return {"rows": rows, "bytes": {**bytes_, "difloat": sum(path.stat().st_size for path in own_files)}}


def _repeated(arguments: dict[str, Any], batch: int) -> dict[str, Any]:
    """A call with so many rows."""
    rows = next(
        value.shape[0] for value in arguments.values() if isinstance(value, Tensor) and value.dim() > 1
    )

    def more(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != rows:
            return value
        return value[:1].expand(batch, *value.shape[1:]).contiguous()

    return {key: more(value) for key, value in arguments.items()}


def main() -> None:
    """Run the comparison and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="emoji-unet", choices=reference_models.NAMES)
    parser.add_argument("--bits", nargs="+", default=["w4a16", "w8a16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for bits in options.bits:
            for batch in options.batch:
                place = Path(folder) / f"{batch}"
                place.mkdir(exist_ok=True)
                found[f"{bits} batch {batch}"] = compare(options.model, bits, batch, options.repeats, place)
    facts = {
        "model": options.model,
        "threads": options.threads,
        "versions": harness.versions(("openvino", "nncf", "torch", "diffusers")),
    }
    OUT.write_text(
        json.dumps(
            {**facts, "commit": harness.commit(), "machine": harness.machine(), "found": found}, indent=1
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
