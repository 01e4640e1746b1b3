"""Every pipeline class of diffusers tried from end to end, as far as the tiny components of the families build it.

    python tests/pipeline_sweep.py docs/families.md      # tries all and writes the table

A class gets the components of the family whose denoiser its constructor asks for, and control networks made from that denoiser.
What of pictures and masks its call takes is given. Then: sample, quantize with calibration, save, prove, load, sample again:
the loaded pipeline gives the very same samples.
"""

from __future__ import annotations

import inspect
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

import difloat
import families
from difloat import evaluate
from difloat.pipelines import DENOISER_NAMES
from family_table import FAMILIES
from tiny import PROMPTS, tiny_ddim, tiny_pixart

WORKS = "works"
START, ROW = "| pipeline | result |", "| {} | {} |"
_PICTURES = (
    "image",
    "control_image",
    "ip_adapter_image",
    "conditioning_image",
    "source_image",
    "original_image",
    "init_image",
)
_MASKS = ("mask_image", "mask", "control_mask")
_NEVER = ("DiffusionPipeline",)
_MOST_S = 90  # for tiny pipelines; what takes longer has a size of its own that no argument makes smaller
_SIZES = ("height", "width", "max_sequence_length", "use_resolution_binning", "complex_human_instruction")


class Unbuilt(Exception):
    """There are no tiny components of this pipeline."""


def classes() -> dict[str, type]:
    """The pipeline classes that diffusers exports, by name."""
    found = {}
    for name in dir(diffusers):
        value = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if inspect.isclass(value) and issubclass(value, DiffusionPipeline) and name not in _NEVER:
            found[name] = value
    return found


def _bases(parameters: Mapping[str, inspect.Parameter]) -> Mapping[str, tuple[Callable[[], Any], str]]:
    """The pipeline that lends its components, by the denoiser it has, and its row of the families."""
    two = "text_encoder_2" in parameters
    return {
        "UNet2DConditionModel": (families.sdxl, "sdxl") if two else (families.sd15, "sd15"),
        "SD3Transformer2DModel": (families.sd3, "sd3"),
        "FluxTransformer2DModel": (families.flux, "flux"),
        "PixArtTransformer2DModel": (
            (families.pixart_sigma, "pixart-sigma")
            if "Sigma" in str(parameters)
            else (tiny_pixart, "pixart-alpha")
        ),
        "HunyuanDiT2DModel": (families.hunyuandit, "hunyuandit"),
        "DiTTransformer2DModel": (families.dit, "dit"),
        "SanaTransformer2DModel": (families.sana, "sana"),
        "UNet2DModel": (tiny_ddim, "ldm"),
    }


def built(cls: type) -> tuple[Any, dict[str, Any], str]:
    """A tiny pipeline of a class, arguments of its call, and its family.

    Raises:
        Unbuilt: with the reason in words.
    """
    parameters = {n: p for n, p in inspect.signature(cls.__init__).parameters.items() if n != "self"}
    asked = next((name for name in DENOISER_NAMES if name in parameters), None)
    if asked is None:
        raise Unbuilt(
            f"no component named {', '.join(DENOISER_NAMES)}: it joins other pipelines, or has no denoiser"
        )
    bases = _bases(parameters)
    annotation = str(parameters[asked].annotation)
    wanted = next((name for name in bases if name in annotation), None)
    if cls.__name__ == "ConsistencyModelPipeline":
        pipeline, family = families.consistency(), "consistency"
    elif wanted is None:
        kind = annotation.rpartition(".")[2].strip("'>]")
        raise Unbuilt(f"no tiny pipeline around a {kind}; the class itself: tests/test_class_sweep.py")
    else:
        make, family = bases[wanted]
        pipeline = make()
    pool = dict(pipeline.components)
    if "controlnet" in parameters and "ControlNetModel" in str(parameters["controlnet"].annotation):
        pool["controlnet"] = _control(pool)
    if "scheduler" in pool and "scheduler" in parameters:
        pool["scheduler"] = _scheduler(pool["scheduler"], parameters["scheduler"].annotation)
    given = {}
    for name, parameter in parameters.items():
        if name in pool:
            given[name] = pool[name]
        elif parameter.default is inspect.Parameter.empty:
            if name in ("safety_checker", "feature_extractor", "image_encoder"):
                given[name] = None
            else:
                raise Unbuilt(
                    f"no tiny {name} ({str(parameter.annotation).rpartition('.')[2].strip(chr(39) + '>')})"
                )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = cls(
            **({"requires_safety_checker": False} if "requires_safety_checker" in parameters else {}), **given
        )
    return made, _arguments(cls, family), family


def _scheduler(own: Any, wanted: Any) -> Any:
    """The family's scheduler, or one of the class that the constructor asks for."""
    one = inspect.isclass(wanted) and issubclass(wanted, diffusers.SchedulerMixin)
    return wanted.from_config(own.config) if one and not isinstance(own, wanted) else own


def _control(pool: Mapping[str, Any]) -> Any:
    """A control network like the denoiser."""
    from diffusers import ControlNetModel

    if "unet" not in pool:
        raise Unbuilt("no tiny controlnet of a transformer")
    return families.seeded(
        lambda: ControlNetModel.from_unet(pool["unet"], conditioning_embedding_out_channels=(8, 16))
    ).eval()


def _arguments(cls: type, family: str) -> dict[str, Any]:
    """Pictures, masks and sizes that the call takes."""
    from PIL import Image

    known = inspect.signature(cls.__call__).parameters
    call = {name: value for name, value in FAMILIES[family].call.items() if name in known and name in _SIZES}
    picture = Image.new("RGB", (16, 16), (200, 80, 20))
    picture.paste((20, 60, 220), (4, 4, 12, 12))
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    for names, value in ((_PICTURES, picture), (_MASKS, mask)):
        call |= {
            n: value
            for n in names
            if n in known and known[n].default is not False and n != "ip_adapter_image"
        }
    if "strength" in known:
        call["strength"] = 1.0
    if "max_area" in known:
        call["max_area"] = 16 * 16
    if "_auto_resize" in known:
        call["_auto_resize"] = False
    return call


def outcome(cls: type) -> str:
    """`WORKS`, or why not."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {_MOST_S} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(_MOST_S)
    try:
        return _outcome(cls)
    finally:
        signal.alarm(0)


def _outcome(cls: type) -> str:
    torch.manual_seed(0)
    try:
        pipeline, call, family = built(cls)
    except Unbuilt as reason:
        return str(reason)
    except Exception as error:  # noqa: BLE001 - whatever a library raises is the result
        return f"its tiny instance is not built: {_short(error)}"
    if cls.__name__ == "ConsistencyModelPipeline" or family in ("dit",):
        conditions: list[Any] | None = FAMILIES[family].conditions
    else:
        conditions = PROMPTS[:4] if "prompt" in inspect.signature(cls.__call__).parameters else None
    texts = conditions if conditions and isinstance(conditions[0], str) else None
    guidance = FAMILIES[family].guidance
    options = {"prompts": texts, "samples": 8, "steps": 4, "progress": False, "guidance_scale": guidance}
    options |= {"prompts_per_batch": 2, "call_kwargs": call}
    drawing: dict[str, Any] = {"seeds": [4, 5], "steps": 4, "progress": False, "call_kwargs": call}

    def draw(drawn: Any) -> Any:
        return evaluate.generate(drawn, conditions, guidance_scale=guidance, **drawing).images

    try:
        before = draw(pipeline)
    except Exception as error:  # noqa: BLE001 - whatever a library raises is the result
        return f"its tiny instance does not sample: {_short(error)}"
    try:
        difloat.quantize(pipeline, "lbfp", "w4a8", rounding="nearest", **options)
        after = draw(pipeline)
        with tempfile.TemporaryDirectory() as folder:
            difloat.save(pipeline, Path(folder) / "saved")
            wrong = [one.message for one in difloat.verify(Path(folder) / "saved") if not one.passed]
            loaded = draw(difloat.load(Path(folder) / "saved"))
    except Exception as error:  # noqa: BLE001
        return f"stops: {_short(error)}"
    if wrong:
        return f"does not verify: {wrong[0]}"
    if not torch.equal(after, loaded):
        return "the loaded pipeline samples otherwise"
    return WORKS if not torch.equal(before, after) else "nothing changed by quantizing"


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160].replace("|", "/")


def rows(page: Path) -> dict[str, str]:
    """Results of the page, by class."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found = [line.strip("|").split("|") for line in lines if line.startswith("| ") and line != START]
    return {name.strip(): result.strip() for name, result in found}


def main(page: Path) -> None:
    """Try every class and write the table."""
    found = {}
    for name, cls in sorted(classes().items()):
        found[name] = outcome(cls)
        print(f"{name}: {found[name]}", flush=True)
    count = sum(result == WORKS for result in found.values())
    text = [
        "# Families",
        "",
        f"Every pipeline class of diffusers {diffusers.__version__}, tiny, with random weights, from end to end: sample,",
        "quantize with calibration, save, prove, load, and sample the very same again. Made by `tests/pipeline_sweep.py`,",
        f"held by `pytest -m slow tests/test_pipeline_sweep.py`: {count} of {len(found)} work; every other says why not.",
        "Whether its denoiser alone goes through is tried for every class by `tests/test_class_sweep.py`.",
        "",
        START,
        "|---|---|",
        *(ROW.format(name, result) for name, result in found.items()),
    ]
    page.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
