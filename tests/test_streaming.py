"""Quantizing from files to files, block by block: the same checkpoint as in memory, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from difloat import checkpoint, job, run, run_from_disk, sources
from difloat.checkpoint import CheckpointError, streaming
from difloat.layers.exclude import EXCLUDED
from tiny import PROMPTS, tiny_pixart, tiny_unet

RTN = ("rtn", "w4a8")


@pytest.fixture(scope="module", params=[tiny_pixart, tiny_unet])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in half precision, in several shards."""
    folder = tmp_path_factory.mktemp("source") / "pipeline"
    request.param().to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    return folder


def in_memory(source: Path, out: Path, *, exclude: list[str] | None = None, **options: str) -> Path:
    """The checkpoint that quantizing in memory gives."""
    from difloat import api

    where = sources.Source(str(source))
    pipeline = run.load_pipeline(str(source), dtype="stored")
    plan = api.plan(pipeline, *RTN, progress=False, exclude=exclude or [], **options)
    run.finish(pipeline, plan, where, out, run.Sampling(PROMPTS, 0), seconds={})
    return out


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a component, from however many files."""
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(file).items()
    }


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"grid": "int", "scale": "minmax"}, marks=pytest.mark.slow)]
)
def test_the_checkpoint_is_that_of_quantizing_in_memory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    monkeypatch.setattr(streaming, "_SHARD_BYTES", 20_000)
    made = run_from_disk.quantize(
        sources.Source(str(source)), tmp_path / "streamed", job.request(*RTN, options)
    )
    whole = in_memory(source, tmp_path / "whole", **options)
    assert all(finding.passed for finding in checkpoint.verify(tmp_path / "streamed"))
    name = "transformer" if (source / "transformer").is_dir() else "unet"
    assert len(list((tmp_path / "streamed" / name).glob("*.safetensors"))) > 1
    for component in {path.parent.name for path in source.glob("*/*.safetensors")}:
        expected, found = everything(whole / component), everything(tmp_path / "streamed" / component)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert tensor.dtype == found[key].dtype and tensor.equal(found[key]), f"{component} {key}"
    configs = [
        json.loads((tmp_path / kind / name / "config.json").read_text()) for kind in ("streamed", "whole")
    ]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"] and configs[0] == configs[1]
    report = json.loads((whole / "report.json").read_text())
    assert made is not None and [row.name for row in made.layers] == [row["name"] for row in report["layers"]]
    assert (made.packed_bytes, made.original_bytes) == (report["packed_bytes"], report["original_bytes"])
    assert [list(entry) for entry in made.skipped] == report["skipped"]


def test_excluded_layers_stay_and_a_streamed_checkpoint_draws(source: Path, tmp_path: Path) -> None:
    out, where = tmp_path / "out", sources.Source(str(source))
    run_from_disk.quantize(where, out, job.request(*RTN, {}, exclude=["*.to_q", "*blocks.0*"]))
    whole = in_memory(source, tmp_path / "whole", exclude=["*.to_q", "*blocks.0*"])
    plans = [
        checkpoint.save_load.read_plan(next(iter(checkpoint.save_load.components(at).values())))[0]
        for at in (out, whole)
    ]
    assert plans[0].skipped == plans[1].skipped and EXCLUDED in plans[0].skipped.values()
    drawn = [
        run.draw(checkpoint.load(at), run.Sampling(PROMPTS, 2, 2, call_kwargs={}), progress=False)
        for at in (out, whole)
    ]
    assert drawn[0].images.equal(drawn[1].images)


def test_what_cannot_be_streamed_is_said_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    where = sources.Source(str(source))
    with pytest.raises(ValueError, match="must need no data to be streamed, got lbfp"):
        run_from_disk.quantize(where, out, job.request("lbfp", "w4a8", {}))
    with pytest.raises(ValueError, match="directory or a hub name to be streamed"):
        run_from_disk.quantize(sources.Source("emoji-unet"), out, job.request(*RTN, {}))
    with pytest.raises(ValueError, match="exclude must name layers"):
        run_from_disk.quantize(where, out, job.request(*RTN, {}, exclude=["no_such_layer"]))
    with pytest.raises(ValueError, match="must have a layer to quantize"):
        run_from_disk.quantize(where, out, job.request(*RTN, {}, exclude=["*"]))
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    file = next(
        file for name in ("transformer", "unet") for file in sorted(broken.glob(f"{name}/*.safetensors"))
    )
    state = safetensors.torch.load_file(file)
    layer = next(name for name in state if name.endswith("to_q.weight"))
    state[layer][0, 0] = torch.nan
    safetensors.torch.save_file(state, file)
    with pytest.raises(ValueError, match="must be finite"):
        run_from_disk.quantize(sources.Source(str(broken)), out, job.request(*RTN, {}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]
    del state[layer]
    for index in file.parent.glob("*.index.json"):
        index.unlink()
    safetensors.torch.save_file(state, file.parent / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="by their names to be streamed"):
        run_from_disk.quantize(sources.Source(str(broken)), out, job.request(*RTN, {}))
