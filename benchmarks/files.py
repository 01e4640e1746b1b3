"""A model in the file of every other program, read back by that program's own code, and pictures drawn with what was read.

    python benchmarks/files.py                                # emoji-pixart, rounded to nearest, weights of 4 bits
    python benchmarks/files.py --recipe auto --bits w5a16     # calibrated, bits by layer, but for vllm

The readers are the package gguf, comfy-kitchen's eager code, functions of diffusers' `bfl` backend, and OpenVINO on the CPU.
vLLM-Omni needs a GPU, so its files, which are made by recipe svdquant, are decoded here as its documentation says. All but
OpenVINO give weights, which are held against ours, and which then take the place of the float ones. OpenVINO gives outputs of
the denoiser. Writes ``benchmarks/results/files.json``, ``docs/files.png`` (full precision, then for every target a
row of ours and a row of the re-read file) and the table in ``docs/files.md``.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import difloat
from difloat import api, evaluate, interchange, reference_models
from difloat.evaluation.picture_metrics import PSNR_CAP_DB, mean_interval, psnr
from difloat.interchange import openvino_ir
from difloat.pipelines import denoiser_of
from difloat.plan.encode import dequantize
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.target import FILES
from difloat.report import build

PROMPTS = ["red apple", "cat face", "sunflower", "soccer ball"]
DIALECTS = {"diffusers": "nvfp4"}
PAGE = harness.ROOT / "docs/files.md"
MARK = re.compile(r"(<!-- files -->\n)(.*?)(<!-- end -->)", re.DOTALL)
READERS = {
    "gguf": "gguf",
    "comfy": "comfy-kitchen",
    "diffusers": "diffusers",
    "openvino": "openvino",
}
DOCUMENTED = {"vllm": "its documented layout"}  # decoded in this file
RECIPES = {"vllm": ("svdquant", "w4a16")}  # where only one makes what the file holds


def of_gguf(file: Path) -> dict[str, Tensor]:
    """All tensors, as the package gguf decodes them."""
    import gguf

    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        found[tensor.name] = values.reshape([int(size) for size in reversed(tensor.shape)])
    return found


def of_comfy(file: Path) -> dict[str, Tensor]:
    """All tensors, quantized ones as comfy-kitchen's eager code decodes them."""
    import comfy_kitchen
    from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

    layouts = {"int8_tensorwise": "TensorWiseINT8Layout", "nvfp4": "TensorCoreNVFP4Layout"}
    tensors = load_file(file)
    names = [key.removesuffix(".comfy_quant") for key in tensors if key.endswith(".comfy_quant")]
    found = {
        key: tensor for key, tensor in tensors.items() if not key.startswith(tuple(f"{n}." for n in names))
    }
    for name in names:
        found |= {key: tensors[key] for key in [f"{name}.bias"] if key in tensors}
        kind = json.loads(bytes(tensors[f"{name}.comfy_quant"].tolist()))["format"]
        scale, weight = tensors[f"{name}.weight_scale"], tensors[f"{name}.weight"]
        columns = weight.shape[1] * (2 if kind == "nvfp4" else 1)
        named: dict[str, Any] = {"orig_dtype": torch.float32, "orig_shape": (weight.shape[0], columns)}
        if kind == "nvfp4":
            named["block_scale"], scale = scale, tensors[f"{name}.weight_scale_2"]
        params = get_layout_class(layouts[kind]).Params(scale=scale, **named)
        with comfy_kitchen.use_backend("eager"):
            found[f"{name}.weight"] = QuantizedTensor(weight, layouts[kind], params).dequantize()
    return found


def of_diffusers(file: Path) -> dict[str, Tensor]:
    """All tensors, quantized ones as the functions of diffusers' `bfl` backend decode them."""
    from diffusers.quantizers.bfl.utils import dequantize_fp8r, dequantize_nvfp4

    tensors = load_file(file)
    found = {}
    for key, tensor in tensors.items():
        name, _, last = key.rpartition(".")
        if last in ("weight_scale", "weight_scale_2", "input_scale"):
            continue
        if last == "weight" and f"{name}.weight_scale" in tensors:
            scale, second = tensors[f"{name}.weight_scale"], tensors.get(f"{name}.weight_scale_2")
            tensor = (
                dequantize_fp8r(tensor, scale) if second is None else dequantize_nvfp4(tensor, scale, second)
            )
        found[key] = tensor
    return found


def of_vllm(file: Path) -> dict[str, Tensor]:
    """All tensors, quantized ones with their branches added, as the page of vLLM-Omni about SVDQuant describes them."""
    tensors = load_file(file)
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    inside = ("qweight", "wscales", "wcscales", "wtscale", "proj_down", "proj_up", "smooth_factor")
    taken = {f"{name}.{key}" for name in names for key in inside}
    found = {key: tensor for key, tensor in tensors.items() if key not in taken}
    for name in names:
        packed, scales, by_row, shared, down, up, smooth = (tensors[f"{name}.{key}"] for key in inside)
        bytes_ = packed.view(torch.uint8).int()
        codes = torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten(1)
        by_group = (scales.float().t() * shared.float()).repeat_interleave(16, 1) * by_row.float()[:, None]
        weight = magnitudes[codes & 7] * (1 - 2 * (codes >> 3)) * by_group / smooth.float()
        found[f"{name}.weight"] = weight + up.float() @ down.float().t()
    return found


WEIGHTS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "gguf": of_gguf,
    "comfy": of_comfy,
    "diffusers": of_diffusers,
    "vllm": of_vllm,
}


def in_openvino(module: nn.Module, file: Path) -> None:
    """Let OpenVINO's CPU runtime compute a denoiser in place of its own code."""
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = ov.Core().compile_model(file, "CPU", settings)

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        given = openvino_ir.by_name(original, (args, kwargs))
        leaves = torch.utils._pytree.tree_flatten_with_path(given)[0]
        inputs = {openvino_ir._name(path): leaf.numpy() for path, leaf in leaves if isinstance(leaf, Tensor)}
        return (torch.from_numpy(compiled(inputs)[0].copy()),)

    original = reference_of(module)
    module.forward = forward


def reference_of(module: nn.Module) -> nn.Module:
    """An object whose `forward` has the signature of a module's, without its weights."""
    bare = object.__new__(type(module))
    nn.Module.__init__(bare)
    return bare


def drawn(pipeline: Any, name: str) -> Tensor:
    """A picture of every prompt, seeds 0, 1, ..."""
    call = reference_models.call_arguments(name)
    guidance = call.pop("guidance_scale")
    shared = {"steps": 20, "guidance_scale": guidance, "call_kwargs": call, "progress": False}
    return evaluate.generate(pipeline, PROMPTS, seeds=range(len(PROMPTS)), **shared).images


def output_of(pipeline: Any, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """What a pipeline's denoiser gives for a call."""
    args, kwargs = call
    with torch.no_grad():
        found: Tensor = denoiser_of(pipeline)[1](*args, **{**kwargs, "return_dict": False})[0]
    return found


def compare(
    target: str, model: str, recipe: str, bits: str, exact: Tensor, folder: Path
) -> tuple[dict[str, Any], list[Tensor]]:
    """One target: its numbers, and the pictures of our checkpoint and of the re-read file."""
    ours, theirs = reference_models.load(model), reference_models.load(model)
    call = reference_models.call_arguments(model)
    guidance = call.pop("guidance_scale")
    plan = api.plan(
        ours,
        recipe,
        bits,
        target=target,
        prompts=reference_models.captions(),
        guidance_scale=guidance,
        steps=20,
        call_kwargs=call,
        progress=False,
    )
    api.apply(ours, plan)
    difloat.save(ours, folder / "own")
    file = interchange.export_checkpoint(folder / "own", folder / "out", DIALECTS.get(target, target))
    name, module = denoiser_of(theirs)
    reader = {DOCUMENTED[target]: ""} if target in DOCUMENTED else harness.versions((READERS[target],))
    row: dict[str, Any] = {"recipe": f"{recipe}, {bits}", "layers": formats_of(plan), "reader": reader}
    if target == "openvino":
        in_openvino(module, file)
    else:
        read = WEIGHTS[target](file)
        row["largest_weight_difference"] = weight_difference(plan, read)
        read = {key: tensor.reshape(module.state_dict()[key].shape).float() for key, tensor in read.items()}
        module.load_state_dict(read)
    example = openvino_ir.example_call(ours, name, api.prompts_for(ours, None))
    one, other = output_of(ours, example), output_of(theirs, example)
    row["largest_output_difference"] = float((one - other).abs().max() / one.abs().max())
    pictures = [drawn(ours, model), drawn(theirs, model)]
    sizes = [path.stat().st_size for path in (file, file.with_suffix(".bin")) if path.exists()]
    row |= {
        "file_bytes": sum(sizes),
        "psnr_between_db": mean_interval(psnr(pictures[0], pictures[1])).value,
        "psnr_ours_db": mean_interval(psnr(exact, pictures[0])).value,
        "psnr_read_db": mean_interval(psnr(exact, pictures[1])).value,
    }
    return row, pictures


def formats_of(plan: Plan) -> dict[str, int]:
    """How many layers have which format."""
    return dict(Counter(layer.parts[0].weight.format.name for layer in plan.layers.values()))


def with_branch(layer: LayerPlan) -> Tensor:
    """The float32 weight of a layer, its low-rank branch added where it has one."""
    weight = dequantize(layer)
    if layer.side is None:
        return weight
    return weight + layer.tensors["side_up"].float() @ layer.tensors["side_down"].float()


def weight_difference(plan: Plan, read: dict[str, Tensor]) -> float:
    """The largest difference of any weight of a quantized layer to ours."""
    pairs = ((with_branch(layer), read[f"{name}.weight"]) for name, layer in plan.layers.items())
    return max(float((ours - other.reshape(ours.shape).float()).abs().max()) for ours, other in pairs)


def table(found: dict[str, Any]) -> str:
    """The table for the page."""
    lines = [
        "| `--for` | recipe, bits | read by | layers | file | largest difference of a weight | of an output | pictures |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for target, row in found["targets"].items():
        layers = ", ".join(f"{count} `{name}`" for name, count in row["layers"].items())
        weight = f"{row['largest_weight_difference']:g}" if "largest_weight_difference" in row else "not read"
        reader = ", ".join(f"{name} {version}".strip() for name, version in row["reader"].items())
        size, output = f"{row['file_bytes'] / 1e6:.2f} MB", f"{row['largest_output_difference']:.1e}"
        between = row["psnr_between_db"]
        pictures = "the same" if between >= PSNR_CAP_DB else f"{between:.1f} dB apart"
        lines.append(
            f"| `{target}` | {row['recipe']} | {reader} | {layers} | {size} | {weight} | {output} | {pictures} |"
        )
    machine = found["machine"]
    source = f"Commit {found['commit']}; {machine['cpu']}; `{found['command']}`."
    return "\n".join(["", *lines, "", f"{found['model']}. {source}", ""])


def main() -> None:
    """Compare every target, and write numbers, pictures and the table."""
    parser = harness.parser(__doc__, threads=harness.all_threads(), out=harness.RESULTS / "files.json")
    parser.add_argument("--model", default="emoji-pixart", choices=reference_models.NAMES)
    parser.add_argument("--recipe", default="rtn")
    parser.add_argument("--bits", default="w4a16")
    parser.add_argument("--targets", nargs="+", default=list(FILES), choices=FILES)
    parser.add_argument("--pictures", type=Path, default=harness.ROOT / "docs/files.png")
    options = harness.arguments(parser)
    exact = drawn(reference_models.load(options.model), options.model)
    rows = [exact]
    told = {"model": options.model, "recipe": options.recipe, "bits": options.bits}
    before = harness.stored(options.out)
    same = all(before.get(key) == value for key, value in told.items())
    targets = dict(before["targets"]) if same else {}
    for target in options.targets:
        with tempfile.TemporaryDirectory() as folder:
            asked = RECIPES.get(target, (options.recipe, options.bits))
            targets[target], pictures = compare(target, options.model, *asked, exact, Path(folder))
        rows += pictures
        print(f"{target}: {targets[target]}", flush=True)
        harness.write(options.out, {**told, "targets": targets})  # as soon as it is there
    strips = [np.concatenate(list(build.to_uint8(images)), axis=1) for images in rows]
    Image.fromarray(np.concatenate(strips, axis=0)).save(options.pictures, optimize=True)
    text = MARK.sub(
        lambda match: f"{match[1]}{table(harness.stored(options.out))}{match[3]}", PAGE.read_text("utf-8")
    )
    PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
