"""Figures of what a model has learned, during training (log.figures_every_steps)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from multiprocess.job import Job
from multiprocess.zygote import Zygote
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from vitscale.data.transforms import normalize
from vitscale.inspection.attention import attention_distance, attention_maps, observe_attention
from vitscale.inspection.live import observe
from vitscale.inspection.mosaics import enlarged, filter_tiles
from vitscale.inspection.weights import principal_components
from vitscale.metrics.goodput import read_starts
from vitscale.metrics.rows import read_metrics
from vitscale.models.vit import ViT
from vitscale.models.vit_config import ViTConfig

FIGURES = ("log.figures_every_steps=8", "log.tensorboard=true", "total_steps=20")


def distances(job: Job) -> dict[int, list[float]]:
    names = [f"learned/attention_distance_{layer:02d}" for layer in range(2)]
    rows = read_metrics(job.run_dir / "metrics.jsonl")
    return {row["step"]: [row[name] for name in names] for row in rows if names[0] in row}


def test_figures_are_drawn_from_sharded_weights_and_change_no_loss(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job
) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 2, *FIGURES, "engine.zero_stage=3") == [0, 0], job.output()
    assert job.column("train/loss") == pytest.approx(uninterrupted.column("train/loss"), abs=1e-5)
    assert list(distances(job)) == [8, 16, 20]
    (start,) = read_starts(job.run_dir / "time.json")
    assert start.seconds["evaluate"] > 0.001  # and so they are not in a row's images per second
    assert all(0 < distance < 12 for values in distances(job).values() for distance in values)
    events = EventAccumulator(str(job.run_dir / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    for name, sides in {"filters": (64, 64), "positions": (444, 444), "attention": (16, 8)}.items():
        (tag,) = {tag for tag in events.Tags()["images"] if f"learned/{name}" in tag}
        shown = events.Images(tag)
        assert [event.step for event in shown] == [8, 16, 20]
        assert shown[0].width % sides[0] == 0 and shown[0].height % sides[1] == 0


def test_one_pass_sees_what_the_tools_see() -> None:
    torch.manual_seed(0)
    model = ViT(ViTConfig(variant="Ti/4", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=16))
    model.init_weights(0)
    with torch.no_grad():
        model.pos_embed.normal_()
        model.patch_embed.proj.weight.normal_()
    model.eval()
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    learned = observe(model, lambda pixels: model(pixels, features_only=True), images)
    found: list[float] = []

    def look(_: int, weights: Tensor) -> None:
        found.append(attention_distance(weights, (4, 4), 4).mean().item())

    pixels = normalize(images, torch.float32)
    observe_attention(model, pixels, look)
    assert learned.distances == pytest.approx(found)
    attention = learned.pictures["attention"]
    assert torch.equal(attention[..., :16], images)
    brightest = attention_maps(model, pixels).flatten(1).argmax(1)
    assert len(brightest) == 3 and (attention[..., 16:] <= images).all()
    filters = filter_tiles(principal_components(model.patch_embed.proj.weight, 4).filters)
    shown = learned.pictures["filters"].permute(0, 2, 3, 1)
    assert torch.equal(shown, enlarged(filters, 64))
    assert not any(
        hook for module in model.modules() for hook in (module._forward_hooks, module._forward_pre_hooks)
    )


def test_pictures_of_filters_use_the_whole_range() -> None:
    filters = torch.tensor(np.linspace(-2, 1, 12)).float().reshape(1, 2, 2, 3)
    tiles = filter_tiles(filters)
    assert tiles.min() == 0 and tiles.max() == round(127.5 + 127.5 / 2)
    assert enlarged(tiles, 9).shape == (1, 8, 8, 3)
