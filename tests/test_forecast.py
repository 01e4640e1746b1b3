"""What a run will take: counted without calling the denoiser, and held against what real plans store and real runs compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from rich.filesize import decimal
from safetensors.torch import load_file
from torch import nn

import difloat
import families
from difloat import api, estimate, interchange, job, recipes, run
from difloat.calibration import first_call
from difloat.calibration.collect import CalibrationSettings, sampling_of
from difloat.calibration.pace import Pace
from difloat.estimate import Forecast
from difloat.methods import low_rank
from difloat.methods.cost import remaining
from difloat.plan.rules import Bits
from family_table import FAMILIES
from tiny import PROMPTS, tiny_pixart, tiny_unet

# diffusers' DPM solver hands torch tensors to numpy in a way numpy 2 deprecates; nothing here can change that.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SETTINGS = CalibrationSettings(samples=12, steps=2, prompts_per_batch=2)
PIXART_KWARGS = {"clean_caption": False, "max_sequence_length": 8}


def expected(
    recipe: str, pipeline: Any = None, bits: str = "w4a4", call: Any = None, **options: Any
) -> Forecast:
    pipeline = tiny_unet() if pipeline is None else pipeline
    fitted = job.fit(pipeline, job.request(recipe, bits, options, SETTINGS))
    return estimate.forecast(fitted, PROMPTS, call)


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """The rows of every call of the module, as they come."""
    rows: list[int] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append(len(args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


@pytest.mark.parametrize("recipe", recipes.RECIPES)
@pytest.mark.parametrize("bits", ["w4a8", "w8a16"])
def test_no_recipe_calls_the_denoiser_to_be_forecast(recipe: str, bits: str) -> None:
    pipeline = tiny_pixart()
    with counted(pipeline.transformer) as rows:
        said = expected(recipe, pipeline, bits, PIXART_KWARGS)
        assert f"{decimal(round(said.packed_bytes), precision=2)} packed" in run.describe(said, SETTINGS)
    assert rows == [] and 0 < said.packed_bytes < said.float_bytes


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("lbfp", {"rounding": "nearest", "weight_granularity": "channel"}),
        ("fp4dit", {"rounding": "nearest", "group_size": 16}),
        ("fp4dit", {"rounding": "nearest", "outside": "8bit", "group_size": 0}),
        ("viditq", {"stretches": 2}),
        ("qdit", {"group_size": 16}),
        ("qdiffusion", {"rounding": "nearest", "weight_granularity": "group", "group_size": 16}),
        ("rtn", {"weight_granularity": "group", "group_size": 16}),
        ("msfp", {"adapters": 0}),
        ("hsvd", {"rank": 2, "rows": 8}),
        ("msfp", {"carry": "side", "adapters": 2, "rank": 2, "epochs": 1, "rows": 2, "allocation": "halves"}),
        (
            "msfp",
            {"carry": "merged", "adapters": 2, "rank": 2, "epochs": 1, "rows": 2, "allocation": "halves"},
        ),
    ],
)
def test_packed_bytes_are_those_of_a_real_plan(recipe: str, options: dict[str, Any]) -> None:
    pipeline = tiny_pixart()
    kept = {} if recipe in ("fp4dit", "viditq", "qdit") else {"keep_8bit": ("proj_out",)}
    said = expected(recipe, pipeline, call=PIXART_KWARGS, **options, **kept)
    asked = {**vars(SETTINGS), **options, **kept}
    plan = api.plan(
        pipeline, recipe, "w4a4", prompts=PROMPTS, progress=False, call_kwargs=PIXART_KWARGS, **asked
    )
    assert sum(kind.count for kind in said.kinds if kind.packed_bytes) == len(plan.layers)
    stored = sum(layer.nbytes for layer in plan.layers.values())
    if (
        recipe == "hsvd"
    ):  # adds what branches take that were not kept, as they did not lower the error of their layer
        without = [
            layer
            for name, layer in plan.layers.items()
            if layer.side is None and name not in kept["keep_8bit"]
        ]
        stored += sum(low_rank.pair_bytes(layer, options["rank"]) for layer in without)
    assert sum(kind.packed_bytes for kind in said.kinds) == pytest.approx(stored, rel=0.01)
    freed = sum(pipeline.transformer.get_submodule(name).weight.nbytes for name in plan.layers)
    counted_bytes = sum(kind.packed_bytes for kind in said.kinds)
    assert said.packed_bytes == said.float_bytes - freed + counted_bytes


def test_rows_of_a_search_are_those_that_the_denoiser_computes() -> None:
    pipeline = tiny_unet()
    data = api.calibrate(pipeline, prompts=PROMPTS, progress=False, **vars(SETTINGS))
    said = {stretches: expected("viditq", stretches=stretches, rows=4).computed for stretches in (0, 2)}
    task = api.task_of(pipeline, data, Bits.parse("w4a4"))
    found = []
    for stretches in (0, 2):
        with counted(task.model) as rows:
            recipes.plan(task, "viditq", "w4a4", {"stretches": stretches, "rows": 4})
        found.append(sum(rows))
    # Beside these a model is looked at with two rows at a time, the same with and without smoothing.
    assert found[1] - found[0] == said[2]["search"] - said[0]["search"] == 2 * 4


def test_what_each_stage_computes() -> None:
    nearest = expected("lbfp", rounding="nearest").computed
    assert nearest == {"search": 12, "learned rounding": 0, "fine-tuning": 0}
    learned = expected("lbfp", iterations=10, rounding_rows=5).computed
    assert learned["learned rounding"] == 4 * 5 + 3 * 10 * 5  # an update takes all five rows, with gradient
    assert expected("lbfp", bits="w8a8").computed["learned rounding"] == 0, "8 bits are rounded to nearest"
    assert expected("lbfp", bits="w4a16", rounding="nearest").computed["search"] == 0, "no input is searched"
    tuned = expected("efficientdm", epochs=3, rows=4).computed["fine-tuning"]
    assert tuned == 12 + 3 * 3 * 2 * 4  # the teacher's, and two timesteps in three epochs
    more = expected("efficientdm", epochs=3, rows=4, accumulation=3).computed["fine-tuning"]
    assert more - 12 == 3 * (tuned - 12)
    for recipe, options in (("efficientdm", {"epochs": 0}), ("msfp", {"adapters": 0}), ("rtn", {})):
        assert expected(recipe, **options).computed["fine-tuning"] == 0
    off, second = (
        expected("mpqdm", epochs=3, rows=4, relation=kind).computed for kind in ("off", "attached")
    )
    assert second["fine-tuning"] - off["fine-tuning"] == 3 * 2 * 4 / 2, "the step before, every second step"
    assert second["search"] - off["search"] == 12, "the teacher's features"


def test_a_recipe_without_data_needs_no_calibration() -> None:
    said = expected("rtn")
    assert (said.rows, said.pictures, said.steps) == (0, 0, 0)
    assert "the denoiser is not called" in run.describe(said, SETTINGS)
    assert expected("rtn", activation="static").rows == 12


def test_layers_that_stay_say_why() -> None:
    asked = job.request("fp4dit", "w4a4", {}, SETTINGS, exclude=["*.to_q"])
    kinds = estimate.forecast(job.fit(tiny_pixart(), asked), PROMPTS, PIXART_KWARGS).kinds
    reasons = {kind.name: kind.inputs for kind in kinds if not kind.packed_bytes}
    assert reasons["proj_out"] == "outside of the blocks"
    assert reasons["transformer_blocks.0.attn1.to_q"] == "excluded by the user"


def test_calibration_measures_rows_of_a_picture_also_with_guidance_in_two_calls() -> None:
    pipeline = families.flux()
    size = FAMILIES["flux"].call
    guided = {**size, "true_cfg_scale": 2.0, "negative_prompt": ""}
    for call, parts in ((size, 1), (guided, 2)):
        with counted(pipeline.transformer) as rows:
            data = api.calibrate(
                pipeline, prompts=PROMPTS, progress=False, call_kwargs=call, **vars(SETTINGS)
            )
        assert data.pace.picture_rows == SETTINGS.steps * parts
        said = expected("lbfp", pipeline, call=call)
        # Calls for calibration itself, one more for the proof that rows of different timesteps can be merged.
        assert data.pace.computed == parts * said.pictures * said.steps <= sum(rows)
        assert 0 < data.pace.row_seconds < 30


def test_what_remains_is_told_in_one_line_from_what_calibration_measured() -> None:
    pipeline = tiny_unet()
    data = api.calibrate(pipeline, prompts=PROMPTS, progress=False, **vars(SETTINGS))
    data.pace = Pace(seconds=8.0, timed=4, computed=16, pictures=4)  # two seconds a row, four rows a picture
    options = recipes.make_options(recipes.lookup("lbfp"), {"rounding": "nearest"}, "w4a4")
    cost = recipes.lookup("lbfp").cost(options, Bits.parse("w4a4"))
    line = remaining(cost, data)
    assert "\n" not in line and "at most 12 rows" in line and "roughly 24 s" in line
    assert "as 3.0 pictures take" in line
    data.pace = Pace()
    assert "no call was timed" in remaining(cost, data)


def test_a_run_says_the_line_once_and_only_beside_progress_bars(capsys: pytest.CaptureFixture[str]) -> None:
    for progress, times in ((True, 1), (False, 0)):
        api.plan(
            tiny_unet(),
            "lbfp",
            "w4a8",
            prompts=PROMPTS,
            progress=progress,
            rounding="nearest",
            **vars(SETTINGS),
        )
        assert capsys.readouterr().err.count("to go: at most") == times
    api.plan(tiny_unet(), "rtn", "w4a8", prompts=PROMPTS, **vars(SETTINGS))
    assert "to go" not in capsys.readouterr().err, "nothing was calibrated"


def test_a_timed_call_is_one() -> None:
    pipeline = tiny_pixart()
    sampling = sampling_of(pipeline, PROMPTS, SETTINGS, PIXART_KWARGS)
    began: list[int] = []
    handle = pipeline.transformer.register_forward_hook(lambda *_: began.append(1))
    pace = first_call.time_a_call(pipeline, sampling)
    handle.remove()
    assert len(began) == 1 and pace.timed > 0 and 0 < pace.row_seconds < 30
    assert not pipeline.transformer._forward_pre_hooks
    assert "s a row: calibration roughly" in run.in_time(expected("lbfp", pipeline, call=PIXART_KWARGS), pace)


def wide_pixart() -> Any:
    """A pipeline whose weights are large beside what a file says about them."""
    from diffusers import PixArtTransformer2DModel

    pipeline = tiny_pixart()
    config = dict(pipeline.transformer.config)
    config |= {"attention_head_dim": 64, "num_layers": 1, "cross_attention_dim": 128}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline.transformer = PixArtTransformer2DModel.from_config(config).eval()
    return pipeline


def bytes_of_tensors(file: Path) -> int:
    """Of a file of another program: its tensors, without their names, marks and graph."""
    if file.suffix == ".gguf":
        return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors)
    if file.suffix == ".xml":
        return file.with_suffix(".bin").stat().st_size
    return sum(t.nbytes for name, t in load_file(file).items() if not name.endswith(".comfy_quant"))


@pytest.mark.parametrize(
    ("target", "recipe", "bits"),
    [
        *((target, "rtn", bits) for target in ("comfy", "gguf", "openvino", "diffusers") for bits in ("w4a16", "w8a16")),
        ("comfy", "rtn", "w4a8"),
        *(
            pytest.param(target, "auto", bits, marks=pytest.mark.slow)
            for target, bits in (("gguf", "w5a16"), ("comfy", "w5a16"), ("openvino", "w4a16"), ("diffusers", "w6a16"))
        ),
        ("vllm", "svdquant", "w4a16"),
    ],
)  # fmt: skip
def test_the_size_is_that_of_the_file(target: str, recipe: str, bits: str, tmp_path: Path) -> None:
    pipeline = wide_pixart()
    fitted = job.fit(pipeline, job.request(recipe, bits, {}, SETTINGS, target=target))
    said = estimate.forecast(fitted, PROMPTS, PIXART_KWARGS)
    assert f" packed in the {target} file" in run.describe(said, SETTINGS)
    asked = {"prompts": PROMPTS, "progress": False, "call_kwargs": PIXART_KWARGS, **vars(SETTINGS)}
    api.apply(pipeline, api.plan(pipeline, recipe, bits, target=target, **asked))
    kind = {"diffusers": "nvfp4"}.get(target, target)
    file = interchange.export_checkpoint(difloat.save(pipeline, tmp_path / "own"), tmp_path / "out", kind)
    found = bytes_of_tensors(file)
    if (
        recipe == "auto"
    ):  # keeps to what whole layers leave of its bytes, which is little only where there are many
        assert 0.975 * said.packed_bytes <= found <= 1.01 * said.packed_bytes
    else:
        assert said.packed_bytes == pytest.approx(found, rel=0.01)
