"""Position embeddings in the training command: killed, resumed on other layouts, fine-tuned."""

from pathlib import Path

import pytest
import torch
from multiprocess.job import Job
from multiprocess.ranks import KillAll
from multiprocess.zygote import Zygote

from vitscale import load_model
from vitscale.models.vit import ViT
from vitscale.weights.export import export_safetensors

KINDS = {
    "relative": ("model.posemb=relative", "model.pool=mean"),
    "two axes in every layer": (
        "model.posemb=learned2d",
        "model.posemb_at=every_layer",
        "model.num_registers=2",
        "model.dropout=0",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_continues_on_other_layouts_and_is_fine_tuned(
    tmp_path: Path, index: Path, zygote: Zygote, kind: str
) -> None:
    options = (*KINDS[kind], "total_steps=8")
    whole, job = Job(tmp_path / "whole", index), Job(tmp_path / "killed", index)
    assert zygote.train(whole, 2, *options) == [0, 0], whole.output()
    first = ("engine.zero_stage=3", "engine.activation_checkpointing=selective")
    assert zygote.train(job, 2, *options, *first, event=KillAll(batch=5)) == [-9, -9], job.output()
    second = ("engine.zero_stage=2", "engine.activation_checkpointing=full")
    assert zygote.train(job, 1, *options, *second) == [0], job.output()
    assert job.column("data/digest") == whole.column("data/digest")
    losses = whole.column("train/loss")
    assert job.column("train/loss") == pytest.approx(losses, abs=1e-5) and len(set(losses)) == 8

    model = load_model(job.run_dir)
    assert isinstance(model, ViT)
    initial = dict(ViT(model.config).named_parameters())
    export = export_safetensors(job.run_dir, tmp_path / "export.safetensors")
    exported = load_model(export)
    for (name, ours), theirs in zip(model.named_parameters(), exported.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.shape == initial[name].shape

    tuned = Job(tmp_path / "tuned", index)
    larger = (*KINDS[kind], f"init.checkpoint={job.run_dir}", "model.image_size=12", "total_steps=6")
    if kind == "relative":
        assert zygote.train(tuned, 1, *larger) == [2]
        assert "set model.image_size = 8" in tuned.output()
    else:
        assert zygote.train(tuned, 1, *larger) == [0], tuned.output()
        positions = load_model(tuned.run_dir)
        assert isinstance(positions, ViT) and positions.pos_embed_x is not None
        assert positions.pos_embed_x.shape == (2, 3, 8)
