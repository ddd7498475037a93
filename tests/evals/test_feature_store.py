"""Features are computed once for the same weights and the same data, and again for others."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evals.test_tasks import ColourModel, write_shard
from safetensors.torch import save

from vitscale.evals import KnnConfig, open_task
from vitscale.evals.store import FeatureStore, digest_of
from vitscale.evaluate import evaluate
from vitscale.models import build_model
from vitscale.models.vit_config import ViTConfig
from vitscale.weights.export import export_metadata, write_export


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"features": torch.full((3, 2), float(self.calls))}


def test_memory_alone_keeps_them_for_one_model():
    compute, store = Counted(), FeatureStore()
    assert store.get("a", compute) is store.get("a", compute)
    assert compute.calls == 1
    assert store.get("b", compute)["features"][0, 0] == 2
    assert FeatureStore().get("a", compute)["features"][0, 0] == 3


def test_a_folder_keeps_them_for_the_same_weights(tmp_path: Path):
    folder, compute = str(tmp_path / "new" / "folder"), Counted()
    FeatureStore(folder, "model").get("a", compute)
    assert torch.equal(FeatureStore(folder, "model").get("a", compute)["features"], torch.ones(3, 2))
    assert compute.calls == 1
    assert all(path.stat().st_mode & 0o044 for path in Path(folder).iterdir())  # others may share it
    FeatureStore(folder, "other").get("a", compute)
    FeatureStore(folder, "model").get("b", compute)
    assert compute.calls == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data.replace(b'"features"', b'"fdatures"'),
        lambda data: data.replace(b'"F32"', b'"I32"'),
        lambda data: save({"features": torch.ones(3, 2)}),  # as before files had a digest
    ],
    ids=["cut", "another value", "another name", "another dtype", "no digest"],
)
def test_a_damaged_file_is_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
):
    compute = Counted()
    FeatureStore(str(tmp_path), "model").get("a", compute)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert FeatureStore(str(tmp_path), "model").get("a", compute)["features"][0, 0] == 2
    assert "its features are computed again" in caplog.text
    assert FeatureStore(str(tmp_path), "model").get("a", compute)["features"][0, 0] == 2


def test_other_values_have_another_name():
    torch.manual_seed(0)
    one = torch.nn.Linear(3, 2)
    same = torch.nn.Linear(3, 2)
    same.load_state_dict(one.state_dict())
    assert digest_of(one.state_dict().items()) == digest_of(same.state_dict().items())
    with torch.no_grad():
        same.bias[0] += 1e-7
    assert digest_of(one.state_dict().items()) != digest_of(same.state_dict().items())


@pytest.mark.parametrize(
    ("change", "files"),
    [
        ({"num_heads": 4}, 2),
        ({"gelu": "exact"}, 2),
        ({"norm_eps": 1e-3}, 2),
        ({"dropout": 0.5, "drop_path": 0.5, "head_bias": -1.0}, 1),  # of training alone
        ({"variant": "S/4", "width": 192, "mlp_dim": 768, "num_heads": 3}, 1),  # the same, spelled out
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_equal_tensors_in_another_model_have_other_features(
    tmp_path: Path, change: dict[str, Any], files: int
) -> None:
    config = ViTConfig(variant="Ti/4", depth=1, image_size=4, num_classes=2)
    weights = {name: param.detach() for name, param in build_model(config, seed=0).named_parameters()}
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    shards, folder = write_shard(tmp_path / "a.tar", ["0", "1"] * 4), tmp_path / "features"
    knn = KnnConfig(train=shards, test=shards, k=(1,))
    for number, model in enumerate((config, dataclasses.replace(config, **change))):
        path = tmp_path / f"{number}.safetensors"
        write_export(path, weights.items(), shapes, export_metadata(model, 7, "fp32"))
        evaluate(str(path), "a", knn, torch.device("cpu"), cache=str(folder))
    assert len(list(folder.iterdir())) == files


def test_another_size_crop_or_set_is_other_data(tmp_path: Path):
    shards = [write_shard(tmp_path / f"{i}.tar", ["0", "1"] * 4, seed=i) for i in range(2)]

    def fingerprints(image_size: int = 4, crop: str = "resize") -> list[str]:
        task = open_task("a", KnnConfig(train=shards[0], test=shards[1], k=(1,), crop=crop), image_size)
        return [task.train.fingerprint(), task.test.fingerprint()]

    assert fingerprints() == fingerprints()
    assert len({*fingerprints(), *fingerprints(8), *fingerprints(crop="center")}) == 6


def test_a_second_model_sees_no_images_that_the_first_has_stored(tmp_path: Path):
    shards = write_shard(tmp_path / "a.tar", ["0", "1"] * 4)
    config = KnnConfig(train=shards, test=shards, k=(1,))
    models = [ColourModel(), ColourModel()]
    for model in models:
        model.stored = FeatureStore(str(tmp_path / "features"), "colours")
        assert open_task("a", config, 4).run(model) == {"1nn": 1.0}
    assert [model.images_seen for model in models] == [8, 0]  # both sets are the same here
