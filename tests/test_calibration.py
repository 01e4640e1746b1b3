"""Calibration on tiny real pipelines: rows, merging, spread, cache, resume, budget and refusals."""

from __future__ import annotations

import errno
import functools
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import difloat
from difloat.cache_entries import CacheWarning
from difloat.calibration.clean_latents import LastCall, clean_calls
from difloat.calibration.collect import (
    CalibrationSettings,
    collect,
    collect_from_loop,
    denoiser_of,
    load_prompts,
    sampling_of,
)
from difloat.calibration.loop_identity import fingerprint
from difloat.calibration.rows import first_tensor, merge
from tiny import PROMPTS, tiny_ddim, tiny_pixart, tiny_unet

# diffusers hands torch tensors to numpy 2 in its schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SMALL = CalibrationSettings(samples=24, steps=4, prompts_per_batch=4, seed=3)
PIXART_KWARGS = {"clean_caption": False, "max_sequence_length": 8}


@pytest.fixture(scope="module")
def pixart():
    return tiny_pixart()


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


def contents(calibration):
    """Everything about the rows, tensors by content."""
    return [(row.timestep, row.part, row.template, row.leaves) for row in calibration._rows]


def collect_pixart(pipeline, settings=SMALL, **kwargs):
    return collect(pipeline, PROMPTS, settings, progress=False, call_kwargs=PIXART_KWARGS, **kwargs)


def test_merged_rows_give_the_output_of_the_captured_calls(unet):
    calls = []

    def watch(module, args, kwargs, output):
        if args[1].ndim == 0:  # the sampler's calls, not the merge check's
            text = kwargs["encoder_hidden_states"]
            calls.append((args[0].clone(), float(args[1]), text.clone(), output[0].clone()))

    handle = unet.unet.register_forward_hook(watch, with_kwargs=True)
    calibration = collect(
        unet, PROMPTS, CalibrationSettings(samples=16, steps=4, prompts_per_batch=4), progress=False
    )
    handle.remove()
    assert [len(samples) for samples, *_ in calls] == [8] * 4
    captured = {
        (timestep, sample.numpy().tobytes(), text.numpy().tobytes()): output
        for samples, timestep, texts, outputs in calls
        for sample, text, output in zip(samples, texts, outputs, strict=True)
    }
    rows = calibration.stratified(12, torch.Generator().manual_seed(0))
    args, kwargs = calibration.batch(rows)
    assert args[1].tolist() == [calibration.timesteps[row] for row in rows]
    assert len(set(args[1].tolist())) == 4
    merged = first_tensor(unet.unet(*args, **kwargs))
    assert merged.requires_grad  # captured tensors enter autograd
    for i in range(12):
        key = (
            float(args[1][i]),
            args[0][i].numpy().tobytes(),
            kwargs["encoder_hidden_states"][i].numpy().tobytes(),
        )
        torch.testing.assert_close(merged[i].detach(), captured[key], rtol=1e-4, atol=1e-5)


def test_rows_are_even_over_timesteps_and_guidance_halves(pixart):
    calibration = collect_pixart(pixart)
    described = calibration.describe()
    assert len(calibration) == described["rows"] == 24
    assert list(described["timesteps"].values()) == [6, 6, 6, 6]
    assert described["parts"] == {0: 12, 1: 12}
    few = calibration.stratified(6, torch.Generator().manual_seed(1))
    assert len(set(few)) == 6
    assert set(Counter(calibration.timesteps[row] for row in few).values()) == {1, 2}
    assert Counter(calibration._rows[row].part for row in few) == {0: 3, 1: 3}
    assert sorted(calibration.stratified(24, torch.Generator())) == list(range(24))
    # Steps more than rows: rows lie at even distances, not all at the start.
    sparse = collect_pixart(pixart, CalibrationSettings(samples=3, steps=12, prompts_per_batch=2))
    timesteps = sorted(sparse.timesteps)
    assert (
        len(set(timesteps)) == 3 and min(b - a for a, b in zip(timesteps, timesteps[1:], strict=False)) > 200
    )


def test_shared_tensors_are_stored_once(pixart):
    calibration = collect_pixart(pixart)
    separate_bytes = sum(
        value.nbytes
        for row in range(len(calibration))
        for value in (*calibration.batch([row])[0], *calibration.batch([row])[1].values())
        if isinstance(value, torch.Tensor)
    )
    assert calibration.nbytes < 0.8 * separate_bytes


def test_same_seed_same_rows_and_global_state_untouched(pixart):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    pixart.set_progress_bar_config(desc="mine")
    first = collect_pixart(pixart)
    assert torch.equal(before, torch.get_rng_state())
    assert pixart._progress_bar_config == {"desc": "mine"}
    assert not pixart.transformer._forward_pre_hooks
    assert contents(first) == contents(collect_pixart(pixart))
    other = CalibrationSettings(samples=24, steps=4, prompts_per_batch=4, seed=4)
    assert contents(first) != contents(collect_pixart(pixart, other))


def test_clean_timesteps_are_conditional_rows_near_the_end_of_the_trajectory(pixart):
    settings = CalibrationSettings(samples=20, steps=3, prompts_per_batch=2, timesteps="clean")
    data = collect(pixart, ["a red cat", "a blue house"], settings, progress=False)
    assert sorted(data.timesteps) == [float(number) for number in range(20)]
    assert data.describe()["parts"] == {0: 20}
    followed = collect(
        pixart, ["a red cat", "a blue house"], replace(settings, timesteps="sampler"), progress=False
    )
    kwargs = data.batch(range(20))[1]
    assert len(kwargs["encoder_hidden_states"]) == 20
    texts = followed.batch(range(len(followed)))[1]["encoder_hidden_states"]
    assert len(texts.unique(dim=0)) == 3  # two prompts and the empty one
    assert len(kwargs["encoder_hidden_states"].unique(dim=0)) == 2
    with pytest.raises(ValueError, match="must be 'sampler' for object"):
        list(clean_calls(object(), LastCall(pixart.transformer), 1, torch.Generator()))
    with pytest.raises(ValueError, match="must be sampler or clean, got 'raw'"):
        CalibrationSettings(timesteps="raw")


def test_unconditional_pipeline_and_its_default_steps():
    pipeline = tiny_ddim()
    calibration = collect(
        pipeline, None, CalibrationSettings(samples=60, prompts_per_batch=2), progress=False
    )
    assert Counter(calibration.timesteps).keys() == {float(timestep) for timestep in range(0, 1000, 20)}
    assert len(calibration) == 60
    with pytest.raises(ValueError, match="no prompts"):
        collect(pipeline, ["a cat"], SMALL, progress=False)


def test_budget_on_disk_gives_the_same_rows(pixart, tmp_path):
    in_memory = collect_pixart(pixart)
    tight = CalibrationSettings(samples=24, steps=4, prompts_per_batch=4, seed=3, memory_bytes=0)
    for cache_dir in (None, tmp_path):
        on_disk = collect_pixart(pixart, tight, cache_dir=cache_dir)
        assert on_disk.describe()["memory_bytes"] == 0 < in_memory.describe()["memory_bytes"]
        assert contents(on_disk) == contents(in_memory)
        for a, b in zip(
            in_memory.batch(range(24))[1].values(), on_disk.batch(range(24))[1].values(), strict=True
        ):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_cache_is_reused_and_another_request_starts_over(pixart, tmp_path):
    first = collect_pixart(pixart, cache_dir=tmp_path)
    calls = []
    handle = pixart.transformer.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    assert contents(collect_pixart(pixart, cache_dir=tmp_path)) == contents(first)
    assert max(calls) <= 2  # only the merge check, no sampling
    other = CalibrationSettings(samples=24, steps=4, prompts_per_batch=4, seed=9)
    collect_pixart(pixart, other, cache_dir=tmp_path)
    handle.remove()
    assert max(calls) == 8
    assert len(list(tmp_path.iterdir())) == 2
    # A shard cut short by a broken disk is drawn again.
    shard = sorted(tmp_path.glob("*/batch-00001.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.warns(CacheWarning, match="batch-00001.* it is made again"):
        for settings in (SMALL, other):
            collect_pixart(pixart, settings, cache_dir=tmp_path)
    assert shard.stat().st_size > 100


def test_what_diffusers_notes_in_configs_does_not_decide_the_cache():
    """It lists the arguments left at their defaults in the order of a set, which every process has another of."""
    pipeline = tiny_pixart()
    requests = []
    for names in (["b", "a"], ["a", "b"]):
        for part in (pipeline.transformer, pipeline.scheduler):
            part.register_to_config(_use_default_values=names, _name_or_path=names[0])
        requests.append(sampling_of(pipeline, PROMPTS, SMALL, PIXART_KWARGS).request())
    assert requests[0] == requests[1]
    pipeline.scheduler.register_to_config(beta_end=0.5)
    assert sampling_of(pipeline, PROMPTS, SMALL, PIXART_KWARGS).request() != requests[0]


class Dots(nn.Module):
    def forward(self, sample, timestep):
        return sample * 0.9 - timestep.reshape(-1, 1) / 1000


class DotPipeline:
    """The least that counts as a pipeline: text gives the noise its colour; needs no diffusers."""

    def __init__(self):
        self.unet = Dots()

    def __call__(self, prompt, num_inference_steps=4, generator=None):
        pairs = zip(generator, prompt, strict=True)
        sample = torch.stack([torch.randn(3, generator=noise) + len(text) for noise, text in pairs])
        for timestep in torch.linspace(999, 0, num_inference_steps):
            sample = self.unet(sample, timestep)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_calibration import SMALL, DotPipeline, PROMPTS, collect
pipeline = DotPipeline()
calls = []
def kill(module, args):
    calls.append(1)
    if len(calls) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
pipeline.unet.register_forward_pre_hook(kill)
collect(pipeline, PROMPTS, SMALL, cache_dir=sys.argv[2], progress=False)
"""


def test_resume_after_kill(tmp_path):
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path)]
    assert subprocess.run(command, timeout=120, check=False).returncode == -signal.SIGKILL
    (shard,) = tmp_path.glob("*/*.safetensors")
    (shard.parent / ".batch-00001.safetensors.1").write_bytes(b"half")
    before = shard.stat().st_mtime_ns
    pipeline, sampled = DotPipeline(), []
    pipeline.unet.register_forward_pre_hook(lambda module, args: sampled.append(len(args[0]) == 4))
    resumed = collect(pipeline, PROMPTS, SMALL, cache_dir=tmp_path, progress=False)
    assert sum(sampled) == 4  # one batch of four steps, not two
    assert shard.stat().st_mtime_ns == before
    assert contents(resumed) == contents(collect(DotPipeline(), PROMPTS, SMALL, progress=False))


def test_interrupt_leaves_finished_shards_and_no_hooks(pixart, tmp_path):
    calls = []

    def interrupt(module, args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt

    handle = pixart.transformer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        collect_pixart(pixart, cache_dir=tmp_path)
    handle.remove()
    assert not pixart.transformer._forward_pre_hooks
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(files) == ["batch-00000.safetensors", "index.json"]
    assert contents(collect_pixart(pixart, cache_dir=tmp_path)) == contents(collect_pixart(pixart))


def test_nan_names_the_timestep(pixart):
    def poison(module, args, kwargs):
        if kwargs["timestep"][0] < 500:
            args[0][0, 0, 0, 0] = float("nan")

    handle = pixart.transformer.register_forward_pre_hook(poison, with_kwargs=True)
    try:
        with pytest.raises(ValueError, match=r"in 'hidden_states' at timestep 250 \(denoiser call 3\)"):
            collect_pixart(pixart)
    finally:
        handle.remove()
    assert not pixart.transformer._forward_pre_hooks


def test_full_disk_says_so_and_leaves_nothing(pixart, tmp_path, monkeypatch):
    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"disk must have [\d.]+ (bytes|kB|MB) free"):
        collect_pixart(pixart, cache_dir=tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_pace_of_the_denoiser_is_measured_while_it_runs(pixart, tmp_path):
    start = time.perf_counter()
    pace = collect_pixart(pixart, cache_dir=tmp_path).pace
    seconds = time.perf_counter() - start
    sampling = sampling_of(pixart, PROMPTS, SMALL, PIXART_KWARGS)
    pictures, parts = sampling.batches * sampling.images, 2
    assert pace.computed == pictures * sampling.steps * parts and pace.picture_rows == sampling.steps * parts
    assert pace.timed == pace.computed * (sampling.steps - 1) / sampling.steps, (
        "the last call of a run is open"
    )
    assert 0 < pace.timed * pace.row_seconds < seconds
    assert not pixart.transformer._forward_pre_hooks
    kept = collect_pixart(pixart, cache_dir=tmp_path).pace
    assert kept.row_seconds is None is kept.picture_rows, "what is kept is not timed again"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "list of strings"),
        ([], "at least one text"),
        ("a cat", "list of strings"),
        ([1], "list of strings"),
    ],
)
def test_bad_prompts(unet, prompts, message):
    with pytest.raises(ValueError, match=message):
        collect(unet, prompts, SMALL, progress=False)


def test_bad_arguments(unet):
    with pytest.raises(ValueError, match="'samples' must be a whole number of at least 1, got 0"):
        CalibrationSettings(samples=0)
    with pytest.raises(ValueError, match="got 'no_such'"):
        collect(tiny_ddim(), None, SMALL, progress=False, call_kwargs={"no_such": 1})
    with pytest.raises(ValueError, match="'guidance_scale' must be None for DDIMPipeline"):
        collect(tiny_ddim(), None, CalibrationSettings(guidance_scale=3.0), progress=False)
    with pytest.raises(ValueError, match="must have a denoiser"):
        denoiser_of(object())
    assert denoiser_of(unet) == ("unet", unet.unet)
    two = SimpleNamespace(transformer=nn.Linear(1, 1), transformer_2=nn.Linear(1, 1))
    assert denoiser_of(two) == ("transformer", two.transformer)  # the later timesteps are the other one's


def test_load_prompts(tmp_path):
    path = tmp_path / "prompts.tsv"
    path.write_text(
        "# comment\nPrompt\tCategory\na red cat\tAnimals\n\n  \nthe sun, at noon\tSky\n", encoding="utf-8"
    )
    assert load_prompts(path) == ["a red cat", "the sun, at noon"]
    path.write_text("prompt\na cat\n")
    assert load_prompts(path) == ["prompt", "a cat"]
    for empty in ("", "# only this\n", "Prompt\tCategory\n"):
        path.write_text(empty)
        with pytest.raises(ValueError, match="at least one prompt"):
            load_prompts(path)
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="UTF-8"):
        load_prompts(path)
    with pytest.raises(FileNotFoundError, match="check the path"):
        load_prompts(tmp_path / "none.txt")


class Plain(nn.Module):
    """Denoiser of our own, with nested arguments and a table that has no batch axis."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, t, extra):
        condition, options = extra
        return {
            "noise": self.linear(x) * t.float().reshape(-1, 1)
            + condition * options["scale"]
            + options["table"]
        }


class ScalarOnly(nn.Module):
    """Denoiser that broadcasts a scalar timestep the wrong way if it is a vector."""

    def forward(self, x, t):
        return x * t


def loop(module, batch=2):
    x = torch.randn(batch, 6)  # torch's own generator: collect_from_loop seeds it
    for timestep in (900, 600, 300):
        options = {"scale": 0.5, "table": torch.arange(6.0), "name": None}
        x = module(x, torch.tensor(timestep), (torch.ones(batch, 6), options))["noise"] / 1000


def test_plain_module_with_a_forward_loop(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Plain()
    settings = CalibrationSettings(samples=4)
    calibration = collect_from_loop(module, loop, settings, cache_dir=tmp_path, progress=False)
    assert len(calibration) == 4 and set(calibration.timesteps) == {900.0, 600.0, 300.0}
    args, kwargs = calibration.batch([0, 3])
    assert kwargs == {} and isinstance(args[2], tuple) and args[2][1]["name"] is None
    assert args[2][1]["table"].shape == (6,) and args[1].shape == (2,) and args[0].shape == (2, 6)
    broken = collect_from_loop(module, lambda m: loop(m), settings, progress=False)
    assert contents(broken) == contents(calibration)

    calls = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    again = collect_from_loop(module, loop, settings, cache_dir=tmp_path, progress=False)
    handle.remove()
    assert len(calls) == 3  # of the check that rows can be merged; the loop is not run
    assert contents(again) == contents(calibration)


def scaled_loop(factor):
    return lambda module: [module(factor * torch.ones(2, 6), torch.tensor(t), EXTRA) for t in (9, 5)]


EXTRA = (torch.ones(2, 6), {"scale": 0.5, "table": torch.arange(6.0), "name": None})


def collected(loop, tmp_path, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Plain()
    settings = CalibrationSettings(samples=4)
    return contents(collect_from_loop(module, loop, settings, cache_dir=tmp_path, progress=False, **kwargs))


@pytest.mark.parametrize("cache_key", [None, "mine"])
def test_two_lambdas_of_one_scope_are_two_loops_in_the_cache(cache_key, tmp_path):
    small, large = scaled_loop(0.001), scaled_loop(1000.0)
    assert small.__qualname__ == large.__qualname__
    first = collected(small, tmp_path, cache_key=cache_key)
    # With a name of its own the second loop shares the folder, and its first call tells it from the first one.
    second = collected(large, tmp_path, cache_key=cache_key)
    assert second == collected(large, tmp_path / "other") != first
    assert collected(scaled_loop(0.001), tmp_path, cache_key=cache_key) == first
    folders = len([path for path in tmp_path.iterdir() if path.name != "other"])
    assert folders == (2 if cache_key is None else 1)


def test_loops_that_differ_after_their_first_call_are_two(tmp_path):
    def stepping(steps):
        return lambda module: [module(torch.ones(2, 6), torch.tensor(9 - n), EXTRA) for n in range(steps)]

    assert len(collected(stepping(1), tmp_path)) == 2
    assert len(collected(stepping(2), tmp_path)) == 4


class Held:
    """Something a loop closes over."""

    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize(
    "one, other",
    [
        (lambda m: m(1), lambda m: m(2)),
        (scaled_loop(1.0), scaled_loop(2.0)),
        (scaled_loop(torch.zeros(2)), scaled_loop(torch.ones(2))),
        (scaled_loop({"a": [1]}), scaled_loop({"a": [2]})),
        (scaled_loop(Held(1)), scaled_loop(Held(2))),
        (scaled_loop(scaled_loop(1)), scaled_loop(scaled_loop(2))),
        (functools.partial(loop, batch=1), functools.partial(loop, batch=2)),
        (scaled_loop(nn.Linear(1, 1)), scaled_loop(nn.Linear(1, 1))),
        (scaled_loop(torch.Generator().manual_seed(1)), scaled_loop(torch.Generator().manual_seed(2))),
    ],
)
def test_a_fingerprint_tells_values_apart_and_is_the_same_again(one, other):
    assert fingerprint(one) == fingerprint(one) != fingerprint(other)


def test_a_loop_that_cannot_be_begun_again_is_refused(tmp_path):
    rows = iter([torch.ones(2, 6)])

    def once(module):
        for x in rows:
            module(x, torch.tensor(3), EXTRA)

    assert len(collected(once, tmp_path)) == 2
    with pytest.raises(ValueError, match="can be run again"):
        collected(once, tmp_path)


class ByPicture(nn.Module):
    """A denoiser that takes a list of one picture per row, of any size, beside captions of any length."""

    def __init__(self, nested=True):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer, self.nested = nn.Linear(4, 32), nn.Linear(32, 4), nested

    def forward(self, pictures, t, captions, patch=(1, 2)):
        out = [
            self.outer(nn.functional.silu(self.inner(p)) + time + c.mean())
            for p, time, c in zip(pictures, t, captions, strict=True)
        ]
        return (out,) if self.nested else out


@torch.no_grad()
def picture_loop(model, sizes=(3, 3), kind=list):
    g = torch.Generator().manual_seed(1)
    x = [torch.randn(n, 4, generator=g) for n in sizes]
    captions = kind(torch.randn(n, generator=g) for n in (5, 7))
    for t in (0.9, 0.5, 0.1):
        out = model(kind(x), torch.tensor([t, t]), captions)
        x = [a - 0.1 * b for a, b in zip(x, out[0] if model.nested else out, strict=True)]
    return x


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_is_a_batch_axis(kind):
    model = ByPicture()
    settings = CalibrationSettings(samples=6)
    data = collect_from_loop(model, lambda m: picture_loop(m, (3, 2), kind), settings, progress=False)
    assert len(data) == 6 and data.describe()["timesteps"] == {t: 2 for t in data.describe()["timesteps"]}
    args, _ = data.batch([0, 5, 1])
    assert type(args[0]) is type(args[2]) is kind and len(args[0]) == len(args[2]) == 3
    assert [len(picture) for picture in args[0]] == [3, 2, 2] and [len(c) for c in args[2]] == [5, 7, 7]
    assert args[1].tolist() == [data.timesteps[row] for row in (0, 5, 1)]
    assert data.before[2] == 0 and data.before[3] == 1  # pictures keep their trajectories


@pytest.mark.parametrize(
    "recipe, nested", [("rtn", True), ("lbfp", False), ("guided", False), ("mpqdm", True)]
)
def test_every_kind_of_recipe_quantizes_a_denoiser_of_lists(recipe, nested):
    model = ByPicture(nested)
    want = picture_loop(model)
    options = {
        "guided": {"epochs": 1, "factor_power": 0.0, "rounding": "nearest"},
        "mpqdm": {"epochs": 1, "relation": "off"},
    }
    difloat.quantize(
        model, recipe, "w4a8", forward_loop=picture_loop, samples=6, progress=False, **options.get(recipe, {})
    )
    got = picture_loop(model)
    assert all(float((a - b).norm() / b.norm()) < 0.1 for a, b in zip(got, want, strict=True))
    sizes = {"forward_loop": lambda m: picture_loop(m, (3, 2)), "samples": 6, "progress": False}
    if recipe == "rtn":  # calls of one row each: positions of different sizes are searched together
        assert difloat.plan(ByPicture(nested), recipe, "w4a8", memory_bytes=1, **sizes).layers
    if recipe == "lbfp":
        learned = difloat.plan(ByPicture(nested), recipe, "w4a8", iterations=1, **sizes).layers
        assert learned
    if recipe in options:
        with pytest.raises(ValueError, match="one picture size"):
            difloat.plan(ByPicture(nested), recipe, "w4a8", **options[recipe], **sizes)


def test_lists_beside_a_tensor_are_no_batch_axis():
    class WithResiduals(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x, timestep, residuals):
            return self.linear(x) + sum(residuals) + timestep[:, None]

    def run(model):
        for t in (5.0, 1.0):
            model(torch.randn(2, 6), torch.tensor([t, t]), [torch.ones(2, 6), torch.zeros(2, 6)])

    data = collect_from_loop(WithResiduals(), run, CalibrationSettings(samples=4), progress=False)
    args, _ = data.batch([0, 1, 2])
    assert args[0].shape == (3, 6) and [tuple(r.shape) for r in args[2]] == [(3, 6), (3, 6)]

    def several(model):
        model([torch.ones(3, 6), torch.ones(3, 6)], torch.ones(3), [])

    with pytest.raises(ValueError, match="one tensor per row of the batch, got a list of 2 and 3 entries"):
        collect_from_loop(ByPicture(), several, CalibrationSettings(), progress=False)


def test_a_timestep_that_is_a_python_number_of_another_name_is_named():
    class Numbered(nn.Module):
        def forward(self, x, noise_step, scale=2.0):
            return x * torch.as_tensor(noise_step).reshape(-1, 1) * scale

    def run(model):
        for step in (900, 600):
            model(torch.ones(2, 6), step)

    with pytest.raises(ValueError, match=r"Python numbers 900 and 600 in 'noise_step'; pass torch.tensor"):
        collect_from_loop(Numbered(), run, CalibrationSettings(), progress=False)
    with pytest.raises(ValueError, match=r"different numbers in \['scale'\]; pass them as \[batch\] tensors"):
        collect_from_loop(
            Numbered(),
            lambda m: [m(torch.ones(2, 6), torch.full((2,), t), scale=t) for t in (1.0, 2.0)],
            CalibrationSettings(samples=4),
            progress=False,
        )


def test_inference_mode_loop_gives_tensors_for_autograd():
    module = Plain()
    calibration = collect_from_loop(
        module, torch.inference_mode()(loop), CalibrationSettings(samples=6), progress=False
    )
    args, _ = calibration.batch([0, 1])
    assert not args[0].is_inference()
    module(*args)["noise"].sum().backward()


def test_scalar_only_module_is_refused():
    def scalar_loop(module):
        x = torch.randn(2, 6)
        for timestep in (3.0, 1.0):
            x = module(x, torch.tensor(timestep))

    with pytest.raises(ValueError, match=r"timestep as a \[batch\] tensor"):
        collect_from_loop(ScalarOnly(), scalar_loop, CalibrationSettings(samples=4), progress=False)
    with pytest.raises(ValueError, match="must call the denoiser"):
        collect_from_loop(ScalarOnly(), lambda module: None, SMALL, progress=False)


def test_rows_with_different_shared_values_are_refused():
    def growing_loop(module):
        for scale in (0.5, 0.7):
            options = {"scale": scale, "table": torch.arange(6.0)}
            module(torch.randn(2, 6), torch.tensor(1), (torch.ones(2, 6), options))

    calibration = collect_from_loop(Plain(), growing_loop, CalibrationSettings(samples=4), progress=False)
    calibration.batch([0, 1])
    with pytest.raises(ValueError, match=r"different values or structure of \['extra'\]"):
        calibration.batch([0, 3])
    with pytest.raises(ValueError, match="from 0 to 3"):
        calibration.batch([4])
    assert merge([calibration._rows[0]], calibration._shelf.read)[0][1].tolist() == [1]
