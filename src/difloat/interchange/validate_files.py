"""Checks of files that are no safetensors: GGUF and OpenVINO's intermediate representation, by their own packages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from difloat.interchange import gguf_files, openvino_ir
from difloat.interchange.remarks import WRONG, Remark

_COMPRESSED = ("u4", "i4", "u8", "i8", "f4e2m1", "f8e4m3", "nf4")


def validate_gguf(path: Path, reference: Mapping[str, Tensor] | None) -> Iterator[Remark]:
    """What is wrong with a GGUF file: values that are not finite, weights far from the float ones, no quantized tensor.

    Raises:
        CheckpointError: if it is no whole GGUF file.
    """
    tensors, counts = gguf_files.read(path)
    wrong = False
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            wrong = True
            yield Remark("error", name, "values must be finite, got NaN or infinity")
            continue
        weight = None if reference is None else reference.get(name)
        if weight is not None and tuple(weight.shape) != tuple(tensor.shape):
            wrong = True
            yield Remark("error", name, f"shape must be {list(weight.shape)}, got {list(tensor.shape)}")
        elif weight is not None:
            error = float((tensor - weight.float()).norm() / weight.float().norm().clamp_min(1e-30))
            if error > WRONG:
                wrong = True
                yield Remark(
                    "error", name, f"weight must be near the float one, got a relative error of {error:.3f}"
                )
    quantized = sorted(kind for kind in counts if kind not in ("F32", "F16", "BF16"))
    if not quantized:
        yield Remark("error", "", "file must hold quantized tensors, but all are float")
    elif not wrong:
        total = sum(counts[kind] for kind in quantized)
        yield Remark("ok", "", f"{len(tensors)} tensors, {total:,} values as {', '.join(quantized)}")
    if (family := gguf_files.architecture_in(path)) not in gguf_files.COMFY_ARCHITECTURES:
        yield Remark(
            "suspicion",
            "",
            f"general.architecture is {family!r}, which ComfyUI-GGUF refuses",
        )


def validate_openvino(path: Path) -> Iterator[Remark]:
    """What is wrong with OpenVINO's representation: it does not read, holds no compressed constant, or rounds its inputs."""
    ov = openvino_ir.package()
    if not path.with_suffix(".bin").is_file():
        yield Remark(
            "error", "", f"{path.with_suffix('.bin').name} must be beside the file, but is missing; copy both"
        )
        return
    try:
        model = ov.Core().read_model(path)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[-1][:200]
        yield Remark("error", "", f"file must be read by OpenVINO, but is not ({reason})")
        return
    kinds = [
        node.get_element_type().get_type_name()
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and len(node.get_output_shape(0)) > 1
    ]
    found = [kind for kind in kinds if kind in _COMPRESSED]
    if not found:
        yield Remark("error", "", "file must hold compressed constants, but all are float")
        return
    yield Remark("ok", "", f"{len(found)} compressed constants of {', '.join(sorted(set(found)))}")
    key = ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]
    if not model.has_rt_info(key) or model.get_rt_info(key).value != "0":
        yield Remark(
            "suspicion",
            "",
            "inputs may be rounded to 8 bits on CPUs: DYNAMIC_QUANTIZATION_GROUP_SIZE is not 0",
        )
