"""Models for a training loop of one's own: loaded for other images and classes, and saved."""

import dataclasses
from pathlib import Path

import pytest
import torch
from foreign_models import TINY, images, logits, saved_model
from multiprocess.compiled import MODELS
from torch.nn.functional import cross_entropy

from vitscale import load_model, save_model
from vitscale.errors import ConfigError
from vitscale.models import ModelConfig
from vitscale.models.posemb import resize_posemb

KINDS: dict[str, ModelConfig] = {
    "vit": TINY,
    "masked": dataclasses.replace(TINY, num_patch_outputs=8, representation_size=8, head_bias=-2.0),
    "hybrid": MODELS["hybrid"],
    "resnet": MODELS["resnet"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_gets_another_size_and_head_is_trained_and_saved(tmp_path: Path, kind: str) -> None:
    saved_model(tmp_path / "saved.safetensors", KINDS[kind])
    model = load_model(tmp_path / "saved.safetensors", image_size=(32, 16), num_classes=3)
    batch, labels = images(model.config), torch.tensor([0, 2, 1])
    assert not model.training and batch.shape[2:] == (32, 16)
    assert model(batch).shape == (3, 3) and not model(batch).any()  # the new head is of zeros
    backbone = dict(load_model(tmp_path / "saved.safetensors", num_classes=0).named_parameters())
    new = {
        name for name, param in model.named_parameters() if not torch.equal(param, backbone.get(name, labels))
    }
    assert new == {"head.weight", "head.bias"} | ({"pos_embed"} if "pos_embed" in backbone else set())
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    cross_entropy(model(batch), labels).backward()
    optimizer.step()
    again = load_model(save_model(model.eval(), tmp_path / "tuned", step=1))
    assert again.config == model.config and model(batch).any()
    assert torch.equal(logits(again, model.config), logits(model, model.config))


def test_another_size_alone_keeps_the_head(tmp_path: Path) -> None:
    path = tmp_path / "saved.safetensors"
    source = saved_model(path, dataclasses.replace(TINY, representation_size=8))
    model = load_model(path, image_size=20)
    assert torch.equal(model.pos_embed, resize_posemb(source.pos_embed, (3, 3), (5, 5)))
    assert torch.equal(model.head.weight, source.head.weight) and model.config.representation_size == 8
    same = load_model(path, image_size=12)
    assert torch.equal(logits(same, TINY), logits(source, TINY))


def test_what_a_model_cannot_be_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "saved.safetensors"
    source = saved_model(path)
    with pytest.raises(ConfigError, match="image_size"):
        load_model(path, image_size=13)
    with pytest.raises(ConfigError, match="num_classes"):
        load_model(path, num_classes=-1)
    for wrapped in (torch.nn.Sequential(source), torch.compile(source)):
        name = type(wrapped).__name__
        with pytest.raises(TypeError, match=f"of vitscale, not {name}; .*, ._orig_mod of torch.compile"):
            save_model(wrapped, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"out.pt has the name of a .pt file"):
        save_model(source, tmp_path / "out.pt")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (torch.nn.Linear(32, 7), r"head.weight is \(7, 32\) in the model, but \(5, 32\) by model.config"),
        (torch.nn.Linear(32, 5, bias=False), r"head.bias is absent in the model, but \(5,\) by"),
        (torch.nn.Sequential(torch.nn.Linear(32, 5)), r"head.weight is absent"),
        (torch.nn.Bilinear(32, 32, 5), r"head.weight is \(5, 32, 32\)"),
    ],
)
def test_a_model_that_its_config_does_not_describe_is_not_saved(
    tmp_path: Path, layer: torch.nn.Module, message: str
) -> None:
    model = saved_model(tmp_path / "saved.safetensors")
    model.head = layer
    with pytest.raises(ConfigError, match=message):
        save_model(model, tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()
