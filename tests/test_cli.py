"""The command line: every verb on a tiny pipeline directory, and one sentence with exit code 2 for every bad input."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from difloat import cli, sources
from difloat import run as study
from difloat.cache_entries import CacheWarning
from difloat.checkpoint import CheckpointError, directories
from difloat.evaluation import kept_pictures
from difloat.kernels.dispatch import use_backend
from difloat.recipes import RECIPES
from difloat.report import build
from tiny import PROMPTS, tiny_pixart, tiny_unet

# diffusers' DPM solver hands torch tensors to numpy in a way numpy 2 deprecates; nothing here can change that.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

VERBS = ("inspect", "quantize", "generate", "evaluate", "report", "verify", "demo")
FAST = [
    "--samples",
    "6",
    "--steps",
    "2",
    "--set",
    "iterations=2",
    "--set",
    "rounding_rows=4",
    "--recipe",
    "lbfp",
]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


class Result(NamedTuple):
    """Exit code and what was printed, with all white space made single blanks."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny full-precision pipeline, saved by diffusers."""
    directory = tmp_path_factory.mktemp("cli") / "source"
    tiny_pixart().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def prompts(source: Path) -> Path:
    """A prompt file."""
    path = source.parent / "prompts.txt"
    path.write_text("# two of them\n" + "\n".join(PROMPTS[:2]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Call the command line as a shell does, in this process."""
    return lambda *arguments: call(monkeypatch, capfd, *arguments)


def call(monkeypatch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str], *arguments: object) -> Result:
    monkeypatch.setattr("sys.argv", ["difloat", *map(str, arguments)])
    capture.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capture.readouterr()
    plain = [re.sub(r"\s+", " ", re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯─]", "", text)).strip() for text in (out, err)]
    return Result(int(stopped.value.code or 0), *plain)


@pytest.fixture(scope="module")
def checkpoint(source: Path, prompts: Path) -> Path:
    """The source quantized by the command, with its report; tests must not change it."""
    out = source.parent / "checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["quantize", source, out, "--prompts", prompts, "--images", 3, *FAST]
        patch.setattr("sys.argv", ["difloat", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert not stopped.value.code
    return out


@pytest.fixture
def copy_of(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Make a copy that a test may damage."""
    yield lambda directory: Path(shutil.copytree(directory, tmp_path / "copy"))


def refused(result: Result, *words: str) -> None:
    """Exit code 2, and one sentence that says the words; no traceback."""
    assert result.code == 2, result
    assert result.err.count("error: ") == 1 and "Traceback" not in result.err + result.out
    sentence = result.err.split("error: ")[1]  # progress bars may stand before it
    assert all(word in sentence for word in words), sentence
    assert "[Errno" not in sentence and len(sentence) < 700


# What works


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_explains_every_verb_and_option(run: Run, verb: str) -> None:
    result = run(*([verb] if verb else []), "--help")
    assert result.code == 0 and not result.err
    if not verb:
        assert all(name in result.out for name in VERBS)
        return
    command = next(entry for entry in cli.app.registered_commands if entry.callback.__name__ == verb)
    assert command.callback.__doc__.split(".")[0].split(":")[0] in result.out


def test_no_verb_shows_the_help(run: Run) -> None:
    result = run()
    assert "quantize" in result.out + result.err and "Traceback" not in result.err


def test_inspect_counts_layers_before_and_after(run: Run, source: Path, checkpoint: Path) -> None:
    before = run("inspect", source)
    assert before.code == 0 and "PixArtTransformer2DModel: 0 quantized and 27 float layers" in before.out
    after = run("inspect", checkpoint, "--layers")
    assert after.code == 0 and "27 quantized and 0 float layers" in after.out
    assert "proj_out" in after.out and re.search(r"\be[123]m[012]\b", after.out)


def test_inspect_says_what_computes_a_model(run: Run, checkpoint: Path) -> None:
    with use_backend("torch"):
        after = run("inspect", checkpoint, "--kernels")
    assert after.code == 0 and "kernels: native library" in after.out and "backend torch" in after.out
    assert sum(int(count) for count in re.findall(r"(\d+) x \w+ x \w+:", after.out)) >= 27


def test_unknown_target_is_refused(run: Run, source: Path, tmp_path: Path) -> None:
    result = run("quantize", source, tmp_path / "out", "--target", "tpu", *FAST)
    assert (
        result.code == 2
        and "target must be one of any, cpu, comfy, gguf, openvino, vllm, diffusers, got 'tpu'" in result.err
    )


def test_dry_run_prints_the_plan_and_writes_nothing(run: Run, source: Path, tmp_path: Path) -> None:
    before = sorted(path for path in source.parent.rglob("*"))
    result = run("quantize", source, tmp_path / "out", "--dry-run", *FAST)
    assert result.code == 0
    for expected in (
        "lbfp w4a8",
        "iterations=2",
        "27 layers",
        "kB packed",
        "kB as it is",
        "full-precision pictures of",
        "learned rounding",
        "4 bits per tensor",
        "RAM: about",
        "times need one timed call",
        "s a row",
    ):
        assert expected in result.out
    assert not list(tmp_path.iterdir()) and before == sorted(path for path in source.parent.rglob("*"))


def test_dry_run_counts_learned_rounding_and_fine_tuning(run: Run, source: Path, tmp_path: Path) -> None:
    options = ["rounding=learned", "iterations=4", "rounding_rows=4", "guidance_weight=9", "epochs=10"]
    sets = [word for option in options for word in ("--set", option)]
    result = run(
        "quantize",
        source,
        tmp_path / "out",
        "--dry-run",
        "--recipe",
        "msfp",
        "--bits",
        "w4a4",
        *sets,
        *FAST[:4],
    )
    assert result.code == 0, result.err
    assert re.search(r"learned rounding \d+, fine-tuning [\d,]+\)", result.out), result.out
    assert "guidance_weight=9" in result.out


def test_repair_fine_tunes_a_checkpoint(run: Run, source: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "repaired"
    result = run(
        "repair", source, checkpoint, out, "--epochs", 1, "--samples", 8, "--steps", 2, "--images", 2
    )
    assert result.code == 0, result.err
    assert run("verify", out).code == 0
    old, new = (json.loads((d / "transformer/config.json").read_text()) for d in (checkpoint, out))
    old, new = old["quantization_config"], new["quantization_config"]
    assert new["options"].pop("repair") == {
        "dfa": True,
        "epochs": 1,
        "guidance_weight": 9.0,
        "rank": 32,
        "seed": 0,
    }
    assert old == new  # same formats everywhere; only codes and scales moved
    weights = [d / "transformer/diffusion_pytorch_model.safetensors" for d in (checkpoint, out)]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    wrong = run("repair", source, source, tmp_path / "no")
    assert wrong.code == 2 and "must be quantized by difloat" in wrong.err


def test_repair_says_what_it_takes(run: Run) -> None:
    page = run("repair", "--help").out
    for word in ("any recipe", "import --into", "DifloatConfig", "--set adapters=1", "--set stretches=1"):
        assert word in page
    assert all(name in page for name in ("--rank", "--guidance-weight", "--memory-mb", "--no-dfa"))


def test_quantize_writes_a_checkpoint_and_a_report(source: Path, checkpoint: Path) -> None:
    names = {path.name for path in checkpoint.iterdir()}
    assert {"model_index.json", "difloat.json", "report.html", "report.json", "report-pictures.npz"} <= names
    page = (checkpoint / "report.html").read_text(encoding="utf-8")
    assert "<html" in page and PROMPTS[0] in page and 'http-equiv="refresh"' not in page
    made, left, right = build.read(checkpoint)
    assert made.recipe == "lbfp" and made.samples == 3 and made.command.startswith("difloat quantize")
    assert left.shape == right.shape == (3, 16, 16, 3) and not np.array_equal(left, right)
    assert (checkpoint / WEIGHTS).stat().st_size < (source / WEIGHTS).stat().st_size / 2


def test_quantize_prints_the_table_and_where_things_are(run: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    start = time.perf_counter()
    result = run("quantize", source, out, "--recipe", "rtn", "--bits", "w8a8", "--images", 2, *FAST[:4])
    wall_s = time.perf_counter() - start
    assert result.code == 0, result
    timings = dict(build.read(out)[0].timings)  # no step is counted twice
    assert {"calibration and the rest", "search weights", "search activations"} <= set(timings)
    assert min(timings.values()) > 0 and sum(timings.values()) < wall_s
    for expected in (
        "rtn w8a8",
        "PSNR",
        "bits a weight",
        f"checkpoint {out}",
        f"report {out / 'report.html'}",
    ):
        assert expected in result.out
    assert "nan" not in result.out


def test_bits_are_read_as_people_write_them(run: Run, source: Path, tmp_path: Path) -> None:
    result = run(
        "quantize", source, tmp_path / "out", "--recipe", "rtn", "--bits", " W4A8", "--images", 0, *FAST[:4]
    )
    assert result.code == 0, result
    made, _, _ = build.read(tmp_path / "out")
    assert made.bits == "w4a8" and made.weight_bits_nominal == 4
    assert "kept at more bits: none" in result.out or "proj_out" in result.out


def test_layers_with_two_weights_are_not_kept_at_more_bits(run: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("quantize", source, out, "--recipe", "viditq", "--bits", "w4a8", "--images", 0, *FAST[:4])
    assert result.code == 0, result
    made, _, _ = build.read(out)
    assert {row.weight_format for row in made.layers} == {"uint4"} and "kept at more bits: none" in result.out
    for histogram in made.histograms:  # the grid is that of the weight that is drawn
        assert min(histogram.grid) < 0 < max(histogram.grid)
        assert max(histogram.grid) - min(histogram.grid) < 1.3 * (histogram.edges[-1] - histogram.edges[0])


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("images", [0, 2])
def test_files_keep_the_dtype_they_came_with_whatever_computes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bfloat16: bool, images: int
) -> None:
    """Calibrated on a CPU, which computes float16 in another dtype; the autoencoder is kept in float32."""
    plain, out = tmp_path / "plain", tmp_path / "out"
    pipeline = tiny_pixart()
    pipeline.transformer.half(), pipeline.text_encoder.half()
    pipeline.save_pretrained(plain)
    monkeypatch.setattr(sources, "_computes_bfloat16", lambda: bfloat16)
    result = run("quantize", plain, out, "--images", images, "--dtype", "auto", *FAST)
    assert result.code == 0, result.err
    for file in plain.rglob("*.safetensors"):
        before, after = load_file(file), load_file(out / file.relative_to(plain))
        kept = {
            name for name in before.keys() & after.keys() if after[name].dtype != torch.uint8
        }  # not codes
        assert kept >= before.keys() if "transformer" not in file.parts else len(kept) > 10
        assert all(
            before[name].dtype == after[name].dtype and before[name].equal(after[name]) for name in kept
        )
        if "transformer" not in file.parts:
            assert (out / file.relative_to(plain)).stat().st_size <= file.stat().st_size + 64
    assert run("verify", out).code == 0
    assert len(json.loads((out / "report.json").read_text())["quality"]) > 2 * bool(images) - 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_checkpoints_in_half_precision(run: Run, tmp_path: Path, dtype: torch.dtype) -> None:
    """As fine-tuned models are shipped; transformers and diffusers each load them in another dtype."""
    plain, out = tmp_path / "plain", tmp_path / "out"
    variant = "fp16" if dtype == torch.float16 else None
    tiny_unet().to(dtype).save_pretrained(plain, variant=variant)
    assert run("generate", plain, tmp_path / "pictures", "--count", 2, "--steps", 2).code == 0
    result = run("quantize", plain, out, "--recipe", "rtn", "--bits", "w4a8", "--images", 2, *FAST[:4])
    assert result.code == 0, result
    assert run("generate", out, tmp_path / "quantized", "--count", 2, "--steps", 2).code == 0
    expected = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    pipeline = study.load_pipeline(str(out))
    assert {pipeline.text_encoder.dtype, pipeline.vae.dtype, pipeline.unet.conv_norm_out.weight.dtype} == {
        expected
    }


def test_the_batch_of_calibration_is_an_option(run: Run, source: Path, tmp_path: Path) -> None:
    words = ["quantize", source, tmp_path / "out", "--recipe", "lbfp", "--dry-run", "--samples", 12]
    words += ["--steps", 2, "--batch"]
    assert "12 rows from 6 full-precision pictures of 2 steps" in run(*words, 3).out
    assert "12 rows from 8 full-precision pictures of 2 steps" in run(*words, 8).out


def test_a_full_accelerator_says_what_to_set(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(PixArtTransformer2DModel, "forward", full)
    cache = tmp_path / "cache"
    result = run(
        "quantize", source, tmp_path / "out", "--call", "clean_caption=false", "--cache", cache, *FAST
    )
    refused(result, "memory of the accelerator", "--memory-mb", "--batch 1", "--call height=256", "--cache")
    assert cache.is_dir() and not (tmp_path / "out").exists()


def test_what_nobody_foresaw_is_neither_a_gate_nor_bad_input(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **named: object) -> None:
        raise RuntimeError("a library broke")

    monkeypatch.setattr(study, "load_pipeline", broken)
    result = run("generate", source, tmp_path / "pictures")
    assert result.code == 3 and "Traceback" in result.err and "a library broke" in result.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--call", "output_type=latent"], "must not set output_type, which difloat sets itself"),
        (["--guidance", "nan"], "guidance must be finite, got nan"),
        (
            ["--target", "gpu", "--dry-run"],
            "target must be one of any, cpu, comfy, gguf, openvino, vllm, diffusers, got 'gpu'",
        ),
        (["--components", "vea", "--dry-run"], "components must name the denoiser"),
    ],
)
def test_bad_arguments_are_refused_before_the_forecast(
    run: Run, source: Path, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    result = run("quantize", source, tmp_path / "out", *FAST, *arguments)
    assert result.code == 2 and sentence in result.err and not result.out


def test_the_command_of_a_report_can_be_run_again(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "my prompts.txt"
    file.write_text("a\nb\n", encoding="utf-8")
    out = tmp_path / "out"
    words = ["quantize", source, out, "--recipe", "rtn", "--images", 0, *FAST[:4]]
    words += ["--exclude", "*.to_q", "--prompts", file]
    assert run(*words).code == 0
    command = build.read(out)[0].command
    assert shlex.split(command) == ["difloat", *map(str, words)]


def test_overwrite_is_refused_until_allowed_and_never_hits_foreign_files(
    run: Run, source: Path, checkpoint: Path, copy_of, tmp_path: Path
) -> None:
    there = copy_of(checkpoint)
    before = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    rtn = ["--recipe", "rtn", "--images", "0", *FAST[:4]]
    refused(run("quantize", source, there, *rtn), "--overwrite")
    assert before == {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    assert run("quantize", source, there, "--overwrite", *rtn).code == 0
    made, left, _ = build.read(there)
    assert made.recipe == "rtn" and len(left) == 0 and made.quality == []
    (there / "notes.txt").write_text("mine")
    result = run("quantize", source, there, "--overwrite", *rtn)
    refused(result, "nothing but a difloat checkpoint", "'notes.txt'", "move that away")
    assert "calibrate" not in result.err and (there / "notes.txt").read_text() == "mine"
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("years of work")
    result = run("quantize", source, foreign, "--overwrite", *rtn)
    refused(result, "thesis")
    assert "calibrate" not in result.err, "refuse before the work, not after it"
    assert [path.name for path in foreign.iterdir()] == ["chapter.txt"]


def test_an_output_directory_belongs_to_one_run(run: Run, source: Path, tmp_path: Path) -> None:
    out, fast = tmp_path / "out", ["--recipe", "rtn", "--images", "0", *FAST[:4]]
    refused_by = []

    def second() -> None:
        try:
            with directories.reserved(out):
                started.set()
                done.wait(60)
        except CheckpointError as error:
            refused_by.append(error)

    started, done = threading.Event(), threading.Event()
    other = threading.Thread(target=second)
    other.start()
    started.wait(60)
    for command in (["quantize", source, out, *fast], ["repair", source, source, out]):
        result = run(*command)
        refused(result, "one run at a time", "another one is at work on it")
        assert "calibrate" not in result.err
    assert run("quantize", source, out, *fast, "--dry-run").code == 0, "writes nothing, hinders nobody"
    done.set()
    other.join()
    assert not refused_by and run("quantize", source, out, *fast).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("place", ["out", "out/cache", "link", "out/../out/x"])
@pytest.mark.parametrize("command", ["quantize", "repair"])
def test_a_cache_inside_the_output_is_refused_at_the_start(
    run: Run, source: Path, tmp_path: Path, place: str, command: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out/deep")
    words = (
        [command, source] + [source] * (command == "repair") + [tmp_path / "out", "--cache", tmp_path / place]
    )
    result = run(*words)
    refused(result, "--cache must lie outside of the output directory")
    assert "calibrate" not in result.err and [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--call", "height=-8"], "'height' must be a whole number of at least 1, got -8"),
        (["--call", "width=0"], "'width' must be a whole number of at least 1, got 0"),
        (["--call", "max_sequence_length=1.5"], "must be a whole number of at least 1, got 1.5"),
        (
            ["--call", "negative_prompt=3"],
            "with the call arguments negative_prompt=3, but raised AttributeError",
        ),
        (["--steps", "99999999"], "steps must be at most the 1000 timesteps of DPMSolver"),
        (["--seed", "99999999999999999999"], "Invalid value for '--seed'"),
    ],
)
def test_values_that_break_a_pipeline_are_bad_input(
    run: Run, source: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    steps = [] if "--steps" in arguments else ["--steps", "2"]
    assert words in (result := run("generate", source, tmp_path / "out", *steps, *arguments)).err
    assert result.code == 2 and "Traceback" not in result.err
    result = run("quantize", source, tmp_path / "out", "--samples", "6", *steps, *arguments)
    assert result.code == 2 and words in result.err and not list(tmp_path.iterdir())


def test_paths_that_are_links_to_themselves(run: Run, source: Path, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    fast, saying = ["--samples", "6", "--steps", "2"], "a link to itself"
    refused(run("quantize", source, loop, *fast), saying)
    refused(run("quantize", source, loop / "out", *fast), saying)
    refused(run("quantize", source, tmp_path / "out", *fast, "--cache", loop), "--cache", saying)
    refused(run("generate", source, loop, "--steps", "2"), saying)
    refused(run("evaluate", source, source, "--steps", "2", "--save", loop), "--save", saying)
    refused(run("inspect", loop), "does not exist")


def test_full_memory_is_one_sentence(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 3 TB")):

        def fill(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(study, "load_pipeline", fill)
        result = run("generate", source, tmp_path / "pictures")
        assert result.code == 2 and "must fit the memory" in result.err and "Traceback" not in result.err


def test_a_damaged_cache_is_said_in_one_line(run: Run, source: Path, tmp_path: Path) -> None:
    words = [
        "--recipe",
        "rtn",
        "--set",
        "activation=static",
        "--images",
        "0",
        *FAST[:4],
        "--cache",
        tmp_path / "cache",
    ]
    assert run("quantize", source, tmp_path / "one", *words).code == 0
    (shard,) = (tmp_path / "cache").glob("*/batch-*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-9])
    result = run("quantize", source, tmp_path / "two", *words)
    assert result.code == 0
    assert f"warning: cache entry {shard} must hold what was written to it" in result.err
    assert "CacheWarning" not in result.err and result.err.count("warning:") == 1
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("recipe", ["fp4dit", "mpqdm"])
def test_what_stays_float_is_named_and_times_add_up(
    run: Run, source: Path, tmp_path: Path, recipe: str
) -> None:
    fast = {"iterations": 2, "rounding_rows": 4, "epochs": 1, "relation": "off"}
    known = {field.name for field in dataclasses.fields(RECIPES[recipe].options)}
    chosen = [word for name, value in fast.items() if name in known for word in ("--set", f"{name}={value}")]
    out, start = tmp_path / "out", time.perf_counter()
    words = ["--recipe", recipe, "--exclude", "*.to_q", "--images", 0, *FAST[:4], *chosen]
    result = run("quantize", source, out, *words)
    assert result.code == 0, result
    assert sum(seconds for _, seconds in build.read(out)[0].timings) <= time.perf_counter() - start
    line = result.out[result.out.index("left in float:") :]
    left = [name for name, _, _ in build.read(out)[0].left_float]
    assert {name for name in left if name.endswith(".to_q")} and "left in float: no layer" not in line
    assert all(name in line for name in left) and f"({len(left)} layers, " in line
    rest = len(build.read(out)[0].skipped) - len(left)
    assert (f"; {rest} modules without a layer" in line) == bool(rest)


def test_bytes_that_double_are_said(run: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--recipe", "viditq", "--bits", "w8a8", "--images", 0, *FAST[:4]]
    result = run("quantize", source, out, *words)
    assert result.code == 0, result
    made, page = build.read(out)[0], (out / "report.html").read_text(encoding="utf-8")
    assert (
        made.packed_bytes > made.original_bytes and "x larger" in result.out and "smaller" not in result.out
    )
    assert "times what one weight of 8 bits takes" in result.out and "2 packed weights" in result.out
    assert "--set stretches=1" in result.out and "times what one weight of 8 bits takes" in page


def test_generate_writes_the_pictures_of_the_seeds(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--prompt", "a red cat", "--count", "3", "--seed", "7", "--steps", "2", "--batch", "2"]
    result = run("generate", checkpoint, tmp_path / "pictures", *arguments)
    assert result.code == 0 and "3 pictures in" in result.out
    files = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in files] == ["00007.png", "00008.png", "00009.png"]
    pixels = [np.asarray(Image.open(path)) for path in files]
    assert all(p.shape == (16, 16, 3) for p in pixels) and not np.array_equal(pixels[0], pixels[1])


def test_evaluate_prints_saves_and_gates(
    run: Run, source: Path, checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    arguments = ["evaluate", source, checkpoint, "--prompts", prompts, "--samples", 2, "--steps", 2]
    result = run(*arguments, "--save", tmp_path / "evaluation.json", "--fail-under", "psnr=1")
    assert result.code == 0 and "PSNR" in result.out, result
    saved = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert saved["samples"] == 2 and saved["metrics"]["psnr"]["value"] > 1
    broken = run(*arguments, "--fail-under", "psnr=1", "--fail-under", "psnr>=1000")
    assert broken.code == 1 and "psnr must be at least 1000 dB, got" in broken.out
    refused(run(*arguments, "--fail-under", "beauty=3"), "beauty", "psnr")


def test_report_makes_the_same_page_again(run: Run, checkpoint: Path) -> None:
    page = checkpoint / "report.html"
    before = page.read_bytes()
    page.unlink()
    result = run("report", checkpoint)
    assert result.code == 0 and str(page) in result.out.replace(" ", "") and page.read_bytes() == before


def test_report_draws_pictures_later_in_pieces_and_goes_on_where_it_was_killed(
    run: Run, source: Path, copy_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, cache = tmp_path / "out", tmp_path / "cache"
    rtn = ["--recipe", "rtn", "--bits", "w4a8", "--images", 0, "--steps", 2]
    assert run("quantize", source, checkpoint, *rtn).code == 0
    other, before = copy_of(checkpoint), (checkpoint / "report.json").read_bytes()
    words = [source, "--images", 5, "--steps", 2, "--batch", 2, "--cache", cache]
    draw, drawn = kept_pictures.generate, []

    def breaking(pipeline, *arguments, **options):
        drawn.append(options["seeds"])
        if len(drawn) == 4:  # the first batch of the quantized model; three are of full precision
            raise ValueError("the light must stay on, got darkness")
        return draw(pipeline, *arguments, **options)

    monkeypatch.setattr(kept_pictures, "generate", breaking)
    broken = run("report", words[0], checkpoint, *words[1:])
    assert broken.code == 2 and "the light must stay on" in broken.err
    assert (checkpoint / "report.json").read_bytes() == before and run("verify", checkpoint).code == 0
    assert drawn == [[0, 1], [2, 3], [4], [0, 1]] and len(list(cache.glob("picture-*"))) == 5
    done = run("report", words[0], checkpoint, *words[1:])
    assert done.code == 0 and drawn[4:] == [[0, 1], [2, 3], [4]] and "5 of 5 pictures are kept in" in done.err
    assert [
        path.name for path in cache.iterdir() if path.is_dir()
    ] == []  # the checkpoint's own are in the report now
    assert run("report", words[0], other, *words[1:], "--cache", tmp_path / "empty").code == 0
    kept, anew = (json.loads((out / "report.json").read_text()) for out in (checkpoint, other))
    assert (
        kept["quality"] == anew["quality"]
        and kept["trajectory"] == anew["trajectory"]
        and kept["samples"] == 5
    )
    assert all(
        (left == right).all()
        for left, right in zip(build.read(checkpoint)[1:], build.read(other)[1:], strict=True)
    )
    assert len(build.read(checkpoint)[1]) == 5 and b"PSNR" in (checkpoint / "report.html").read_bytes()


def test_kept_pictures_are_of_one_model_and_one_call_only(tmp_path: Path) -> None:
    pipeline = tiny_pixart()
    call = {"steps": 3, "call_kwargs": {"use_resolution_binning": False}, "progress": False}

    def files() -> int:
        return len(list(tmp_path.iterdir()))

    first = kept_pictures.draw_kept(pipeline, PROMPTS, tmp_path, seeds=[0, 1], **call)
    damaged = next(tmp_path.iterdir())
    assert files() == 2
    again = kept_pictures.draw_kept(pipeline, PROMPTS, tmp_path, seeds=[0, 1], **call)
    assert files() == 2 and again.images.equal(first.images) and again.latents.equal(first.latents)
    assert again.timesteps == first.timesteps and again.seconds == pytest.approx(first.seconds)
    kept_pictures.draw_kept(pipeline, PROMPTS, tmp_path, seeds=[0, 1], **{**call, "steps": 2})
    assert files() == 4
    kept_pictures.draw_kept(pipeline, PROMPTS[1:], tmp_path, seeds=[0, 1], **call)
    assert files() == 6
    kept_pictures.draw_kept(pipeline, PROMPTS, tmp_path, seeds=[0, 1], guidance_scale=3.0, **call)
    assert files() == 8
    with torch.no_grad():
        pipeline.transformer.proj_out.bias[3] += 1e-3  # one value of all
    changed = kept_pictures.draw_kept(pipeline, PROMPTS, tmp_path, seeds=[0, 1], **call)
    assert files() == 10 and not changed.images.equal(first.images)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.warns(CacheWarning, match="damaged"):
        same = kept_pictures.draw_kept(tiny_pixart(), PROMPTS, tmp_path, seeds=[0, 1], **call)
    assert files() == 10 and same.images.equal(first.images)


def test_a_model_is_quantized_from_disk_to_disk(run: Run, source: Path, tmp_path: Path) -> None:
    rtn = ["quantize", source, tmp_path / "out", "--recipe", "rtn", "--offload", "disk"]
    result = run(*rtn)
    assert result.code == 0 and "layers quantized" in result.out, result
    assert run("verify", tmp_path / "out").code == 0
    assert (
        run(
            "report", source, tmp_path / "out", "--images", 2, "--steps", 2, "--cache", tmp_path / "kept"
        ).code
        == 0
    )
    refused(run(*rtn), "--overwrite")
    other = ["quantize", source, tmp_path / "other"]
    refused(run(*other, "--offload", "disk"), "must need no data to be streamed")
    refused(run(*other, "--recipe", "rtn", "--offload", "cpu"), "--offload must be disk or none")
    refused(run(*other, "--recipe", "rtn", "--offload", "disk", "--images", 2), "without --images")
    assert not (tmp_path / "other").exists()


def test_pictures_are_drawn_later_only_with_both_models_of_one_kind(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    refused(run("report", checkpoint, "--images", 2), "drawn with two models")
    other = tmp_path / "other"
    tiny_unet().save_pretrained(other)
    refused(
        run("report", other, checkpoint, "--images", 2), "must be the pipeline", "PixArtTransformer2DModel"
    )
    refused(run("report", other, tmp_path), "report.json")


def test_verify_proves_a_checkpoint_and_names_what_was_tampered_with(
    run: Run, checkpoint: Path, copy_of
) -> None:
    good = run("verify", checkpoint)
    assert good.code == 0 and "FAIL" not in good.out and "re-encode" in good.out
    changed = copy_of(checkpoint)
    content = bytearray((changed / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (changed / WEIGHTS).write_bytes(content)
    bad = run("verify", changed)
    assert bad.code == 1 and "FAIL" in bad.out and WEIGHTS in bad.out and "SHA-256" in bad.out


# What is refused


def test_missing_and_foreign_directories(run: Run, source: Path, tmp_path: Path) -> None:
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    for verb in (["quantize"], ["generate"]):
        refused(run(*verb, missing, tmp_path / "out"), str(missing), "does not exist", "emoji-pixart")
        refused(run(*verb, empty, tmp_path / "out"), "model_index.json", "complete")
        refused(run(*verb, "owner/model", tmp_path / "out"), "hf download owner/model")
        refused(
            run(*verb, source / WEIGHTS, tmp_path / "out"), "base must name the pipeline", "generate --lora"
        )
        refused(run(*verb, source / "transformer", tmp_path / "out"), "it is one component")
    refused(run("inspect", missing), "does not exist")
    refused(run("evaluate", missing, empty), "does not exist")
    refused(run("verify", missing), "does not exist")
    refused(run("verify", empty), "config.json")
    refused(run("report", empty), "report.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["deleted", "truncated", "no text", "no json"])
def test_half_downloaded_pipelines(run: Run, source: Path, copy_of, tmp_path: Path, damage: str) -> None:
    broken = copy_of(source)
    weights = broken / WEIGHTS
    if damage == "deleted":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "no text":
        shutil.rmtree(broken / "text_encoder")
    else:
        (broken / "transformer/config.json").write_text('{"_class_name": "Pix')
    refused(run("quantize", broken, tmp_path / "out"), "complete pipeline", str(broken), "download it again")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "magic"], ["recipe must be one of lbfp", "'magic'"]),
        (["--bits", "w9a8"], ["bits must be 2 to 8", "'w9a8'"]),
        (["--bits", "four"], ["bits must look like 'w4a8'", "'four'"]),
        (["--set", "rounding"], ["--set must be name=value", "'rounding'"]),
        (["--recipe", "lbfp", "--set", "colour=red"], ["options must be among", "rounding", "colour"]),
        (["--recipe", "lbfp", "--set", "rounding=up"], ["rounding must be one of learned, nearest", "'up'"]),
        (["--recipe", "lbfp", "--set", "iterations=many"], ["iterations", "'many'"]),
        (["--images", "1"], ["images must be 0 or at least 2"]),
        (["--size", "9kB"], ["size must be at least", "bytes for this model", "got 9000"]),
        (["--size", "9kB", "--set", "size=9kB"], ["--size must stand without --set size=9kB"]),
        (["--size", "1MB", "--bits", "w3.5a8"], ["size must come with whole weight bits"]),
        (["--size", "much"], ["size", "'much'"]),
        (["--size", "1MB", "--recipe", "lbfp"], ["options must be among", "size"]),
        (["--prompts", "nowhere.txt"], ["nowhere.txt"]),
    ],
)
def test_bad_options_are_refused_before_any_work(
    run: Run, source: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    result = run("quantize", source, tmp_path / "out", *arguments)
    refused(result, *words)
    assert "calibrate" not in result.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--samples", "0"], ["--steps", "0"], ["--images", "x"], ["--nope"]])
def test_options_that_the_parser_refuses(run: Run, tmp_path: Path, arguments: list[str]) -> None:
    result = run("quantize", "emoji-unet", tmp_path / "out", *arguments)
    assert result.code == 2 and arguments[0] in result.err and "Traceback" not in result.err


def test_an_empty_prompt_file(run: Run, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("\n# nothing but a comment\n")
    refused(run("quantize", source, tmp_path / "out", "--prompts", path), "at least one prompt", "empty.txt")
    refused(run("generate", source, tmp_path / "out", "--prompts", path), "at least one prompt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_weights_that_are_nan_name_the_layer(
    run: Run, source: Path, copy_of, tmp_path: Path, dry_run: list[str]
) -> None:
    broken = copy_of(source)
    state = load_file(broken / WEIGHTS)
    state["transformer_blocks.1.ff.net.2.weight"][0, 0] = torch.nan
    save_file(state, broken / WEIGHTS, metadata={"format": "pt"})
    result = run("quantize", broken, tmp_path / "out", *FAST, *dry_run)
    refused(result, "finite", "'transformer_blocks.1.ff.net.2'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_a_pipeline_that_is_quantized_already(
    run: Run, checkpoint: Path, tmp_path: Path, dry_run: list[str]
) -> None:
    result = run("quantize", checkpoint, tmp_path / "out", *FAST, *dry_run)
    refused(result, "quantized already")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_version(run: Run, checkpoint: Path, copy_of, tmp_path: Path) -> None:
    other = copy_of(checkpoint)
    config = other / "transformer/config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    content["quantization_config"]["version"] = 99
    config.write_text(json.dumps(content), encoding="utf-8")
    for arguments in (["inspect", other], ["generate", other, tmp_path / "out"]):
        refused(run(*arguments), "version", "99")
    result = run("verify", other)
    assert result.code == 1 and "99" in result.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "writer", ["difloat.checkpoint.save_load.write_manifest", "difloat.report.build.np.savez_compressed"]
)
def test_a_full_disk(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, fail)
    out = tmp_path / "out"
    result = run("quantize", source, out, "--recipe", "rtn", "--images", "0", *FAST[:4])
    refused(result, "full", "free some space")
    if writer.startswith("difloat.checkpoint"):
        assert not list(tmp_path.iterdir()), "nothing half-written"
    else:
        assert run("verify", out).code == 0, "the checkpoint was whole before its report"


def test_files_in_the_way(run: Run, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("here first")
    refused(run("quantize", source, path, "--overwrite", *FAST[:4]), str(path))
    refused(run("generate", source, path, "--steps", "2", "--count", "1"), str(path))
    assert path.read_text() == "here first"


def test_ctrl_c_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(source: str, **_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "load_pipeline", interrupt)
    result = run("quantize", "emoji-unet", tmp_path / "out")
    assert result.code == 130 and "--cache" in result.err and "Traceback" not in result.err


# Arguments of the call, exclusion, other programs' files, diagnosis, card


def test_arguments_of_the_pipelines_call_reach_it(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--count", "1", "--steps", "2", "--call", "height=32", "--call", "width=16"]
    result = run(
        "generate", checkpoint, tmp_path / "pictures", *arguments, "--call", "use_resolution_binning=false"
    )
    assert result.code == 0, result
    with Image.open(tmp_path / "pictures/00000.png") as picture:
        assert picture.size == (16, 32)
    refused(run("generate", checkpoint, tmp_path / "no", "--call", "colour=red"), "takes, got 'colour'")
    refused(
        run("generate", checkpoint, tmp_path / "no", "--call", "height"),
        "--call must be name=value",
        "'height'",
    )
    refused(run("generate", checkpoint, tmp_path / "no", "--call", "guidance_scale=3"), "use --guidance")
    assert not (tmp_path / "no").exists()


def test_quantize_takes_arguments_of_the_call(run: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--recipe", "rtn", "--bits", "w8a16", "--images", 2, *FAST[:4]]
    result = run(
        "quantize", source, out, *arguments, "--call", "height=32", "--call", "use_resolution_binning=false"
    )
    assert result.code == 0, result
    assert build.read(out)[1].shape == (2, 32, 16, 3)


def test_excluded_layers_stay_as_they_are(run: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rtn = ["--recipe", "rtn", "--images", "0", *FAST[:4]]
    assert (
        run("quantize", source, out, *rtn, "--exclude", "transformer_blocks.0", "--exclude", "*.to_q").code
        == 0
    )
    listed = run("inspect", out, "--layers").out
    assert re.search(r"\d+ quantized and 1\d float layers", listed)
    made, _, _ = build.read(out)
    kept = {name for name, reason, _ in made.skipped if reason == "excluded by the user"}
    assert "transformer_blocks.0.ff.net.2" in kept and "transformer_blocks.1.attn1.to_q" in kept
    assert "transformer_blocks.1.attn1.to_v" not in kept
    for dry in ([], ["--dry-run"]):
        refused(
            run("quantize", source, tmp_path / "no", *rtn, "--exclude", "block.0", *dry),
            "'block.0'",
            "inspect",
        )
    assert (
        "excluded by the user"
        in run("quantize", source, tmp_path / "no", "--dry-run", "--exclude", "proj_out").out
    )


def test_a_misspelled_gate_costs_no_pictures(run: Run, source: Path, checkpoint: Path) -> None:
    result = run("evaluate", source, checkpoint, "--fail-under", "beauty=3")
    refused(result, "beauty", "psnr")
    assert "images" not in result.err
    refused(run("evaluate", source, checkpoint, "--fail-under", "psnr:3"), "name<=number")
    for arguments, word in (
        (["--fail-under", "retrieval=0.5"], "a gate on retrieval must come with captions"),
        (["--save", source / "nowhere" / "x.json"], "--save must name a file in a directory that is there"),
    ):
        result = run("evaluate", source, checkpoint, *arguments)
        refused(result, word)
        assert "images" not in result.err


NVFP4 = ["--recipe", "rtn", "--bits", "w4a16", "--set", "weight_granularity=group", "--set", "group_size=16"]
NVFP4 += ["--set", "scale_format=e4m3", "--set", "keep_8bit=", "--exclude", "pos_embed"]


def test_export_validate_import(run: Run, source: Path, checkpoint: Path, tmp_path: Path) -> None:
    own, file, again = tmp_path / "own", tmp_path / "model.safetensors", tmp_path / "again"
    assert run("quantize", source, own, *NVFP4, "--images", "0", *FAST[:4]).code == 0
    result = run("export", own, file, "--to", "nvfp4")
    assert result.code == 0 and "nvfp4 file" in result.out, result
    good = run("validate", file, "--reference", source)
    assert good.code == 0 and "26 quantized layers as NVFP4 stores them" in good.out, good
    assert run("validate", own).code == 0
    assert run("import", file, again, "--from", "nvfp4", "--into", source).code == 0
    assert run("verify", again).code == 0
    for out, directory in ((tmp_path / "a", own), (tmp_path / "b", again)):
        assert run("generate", directory, out, "--count", "1", "--steps", "2").code == 0
    assert (tmp_path / "a/00000.png").read_bytes() == (tmp_path / "b/00000.png").read_bytes()
    assert run("export", own, tmp_path / "folder", "--to", "nvfp4").code == 0
    assert run("import", tmp_path / "folder", tmp_path / "model", "--from", "nvfp4").code == 0
    state = load_file(file)
    state = {name: tensor for name, tensor in state.items() if not name.endswith("to_q.weight_scale_2")}
    save_file(state, file)
    bad = run("validate", file)
    assert bad.code == 1 and "weight_scale_2 must be beside the weight, but is missing" in bad.out
    refused(run("export", checkpoint, tmp_path / "no", "--to", "nvfp4"), "without loss", "--bits w4a16")
    refused(run("export", own, tmp_path / "no", "--to", "onnx"), "one of nvfp4, fp8, mxfp4, comfy")
    refused(run("import", file, tmp_path / "no", "--from", "nvfp4", "--into", source), "weight_scale_2")
    refused(run("validate", tmp_path / "no"), "does not exist")
    assert not (tmp_path / "no").exists()


def test_diagnose_ends_with_a_command_that_leaves_the_broken_layer_out(
    run: Run, source: Path, tmp_path: Path
) -> None:
    out, name = tmp_path / "out", "transformer_blocks.1.ff.net.2"
    arguments = ["--recipe", "rtn", "--bits", "w8a16", "--set", "scale=minmax", "--images", "0", *FAST[:4]]
    arguments += ["--seed", "3", "--target", "cpu", "--components", "transformer,vae=w8a8"]
    assert run("quantize", source, out, *arguments, "--exclude", "proj_out").code == 0
    state = load_file(out / WEIGHTS)
    state[f"{name}.weight_scale"] *= 12
    save_file(state, out / WEIGHTS, metadata={"format": "pt"})
    result = run("diagnose", source, out, "--samples", 4, "--steps", 2, "--images", 1)
    assert result.code == 0, result
    allowed = int(re.search(r"at most (\d+) sampling runs", result.out)[1])
    assert int(re.search(r"(\d+) sampling runs made", result.out)[1]) <= allowed
    command = f"difloat quantize {source} OUT --recipe rtn --bits w8a16 --set scale=minmax --seed 3"
    command += " --target cpu --components transformer,vae=w8a8"
    assert result.out.endswith(f"{command} --exclude proj_out --exclude {name}"), result.out[-300:]
    refused(run("diagnose", source, source), "must be quantized")


def test_card_stands_beside_the_checkpoint_and_does_not_spoil_it(run: Run, checkpoint: Path, copy_of) -> None:
    there = copy_of(checkpoint)
    result = run("card", there, "--base-model", "someone/tiny")
    assert result.code == 0 and str(there / "README.md") in result.out.replace(" ", "")
    text = (there / "README.md").read_text(encoding="utf-8")
    assert (
        "\nbase_model: someone/tiny\n" in text
        and "\nbase_model_relation: quantized\n" in text
        and "| PSNR" in text
    )
    assert run("verify", there).code == 0
    refused(run("card", there, "--base-model", "no name"), "no name")
