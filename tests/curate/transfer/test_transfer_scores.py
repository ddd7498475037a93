"""What tools/evaluate.py classify says of a packed test set, computed beside it by hand."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from curate.transfer.transfer_raw import FOLDER_CLASSES, make_raw, write_objectnet, write_real
from curate.vtab.vtab_files import encoded, picture
from PIL import Image
from torch import Tensor

from tools.data import main as data_main
from tools.evaluate import main as evaluate_main
from vitscale.checkpoint.safetensors import write_safetensors
from vitscale.config import to_dict
from vitscale.models import build_model
from vitscale.models.vit_config import ViTConfig
from vitscale.weights.saved import load_model

SIZE = 8


def export(path: Path, head_scale: float, favourites: dict[int, float]) -> Path:
    """A tiny untrained model of 1,000 classes, with a bias for its favourite ones."""
    config = ViTConfig(
        width=16, depth=1, num_heads=2, mlp_dim=32, patch_size=4, image_size=SIZE, num_classes=1000
    )
    state = build_model(config, seed=0).state_dict()
    generator = torch.Generator().manual_seed(1)
    state["head.weight"] = head_scale * torch.randn(state["head.weight"].shape, generator=generator)
    for label, bias in favourites.items():
        state["head.bias"][label] += bias
    metadata = {"format": "pt", "vitscale.model": json.dumps(to_dict(config)), "vitscale.step": "1"}
    write_safetensors(path, state, metadata)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its favourites are the classes that ObjectNet shows."""
    favourites = {label: 9.0 for labels in FOLDER_CLASSES.values() for label in labels}
    return export(tmp_path_factory.mktemp("export") / "model.safetensors", 1.0, favourites)


def ranked(model: Path, images: list[bytes | np.ndarray]) -> Tensor:
    """[n, 1000]: the classes of each image, the highest logit first, without the evaluation."""
    arrays = [np.asarray(Image.open(io.BytesIO(i))) if isinstance(i, bytes) else i for i in images]
    pixels = torch.stack([torch.from_numpy(array.copy()) for array in arrays]).permute(0, 3, 1, 2)
    with torch.no_grad():
        return load_model(model)(pixels / 127.5 - 1.0).argsort(1, descending=True)


def scored(model: Path, shards: str, tmp_path: Path) -> dict[str, float]:
    out, rows = tmp_path / "result.json", tmp_path / "rows.jsonl"
    command = ["classify", str(model), "--data", shards, "--batch-size", "7", "--json", str(out)]
    assert evaluate_main([*command, "--predictions", str(rows)]) == 0
    return json.loads(out.read_text())["results"]


def test_imagenet_real_counts_any_label_and_leaves_out_images_without_one(
    model: Path, tmp_path: Path
) -> None:
    images = [encoded(picture(n, n, SIZE, SIZE)) for n in range(11)]
    classes = ranked(model, list(images))
    first, third, last = classes[:, 0].tolist(), classes[:, 2].tolist(), classes[:, 999].tolist()
    labels = [
        [first[0]],  # right
        [last[1], first[1]],  # right by its second label
        [last[2], third[2]],  # among the five highest
        [last[3]],
        [],
        [last[5], third[5], first[5]],
        [],
        [last[7]],
        [third[8]],
        [],
        [last[10]],
    ]
    raw = write_real(tmp_path, labels, images)
    command = ["pack", str(raw.source), str(tmp_path / "out"), "--format", "imagenet_real"]
    assert data_main([*command, "--val-labels", raw.val_labels]) == 0
    index = str(tmp_path / "out" / "val.index.json")
    assert scored(model, index, tmp_path) == {"top1": 3 / 8, "top5": 5 / 8, "num_samples": 8}
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    found = {int(row["key"][-8:]): (row["labels"], row["right"]) for row in rows}
    assert found == {n: (row, first[n - 1] in row) for n, row in enumerate(labels, 1)}


def test_objectnet_counts_any_class_of_the_folder(model: Path, tmp_path: Path) -> None:
    raw = write_objectnet(tmp_path, images_per_folder=12, size=SIZE)
    assert data_main(["pack", str(raw.source), str(tmp_path / "out"), "--format", "objectnet"]) == 0
    samples = list(raw.samples["test"].values())
    classes = ranked(model, [image for _, image in samples if image is not None])
    hits = [[int(c) in labels for c in row[:5]] for row, (labels, _) in zip(classes, samples, strict=True)]
    expected = {
        "top1": sum(row[0] for row in hits) / 60,
        "top5": sum(any(row) for row in hits) / 60,
        "num_samples": 60,
    }
    assert 0 < expected["top1"] < expected["top5"] < 1
    assert scored(model, f"{tmp_path}/out/test-*.tar", tmp_path) == expected
    # By the first class of a folder alone, it would be another figure.
    first_alone = [int(row[0]) == labels[0] for row, (labels, _) in zip(classes, samples, strict=True)]
    assert expected["top1"] != sum(first_alone) / 60


def test_imagenet_v2_is_scored_by_the_numbers_of_its_folders(tmp_path: Path) -> None:
    raw = make_raw("imagenet_v2", tmp_path)
    assert data_main(["pack", str(raw.source), str(tmp_path / "out"), "--format", "imagenet_v2"]) == 0
    # Always class 10, then 999, then three that no image has. Sorted as text, "10" would be 2.
    constant = export(tmp_path / "constant.safetensors", 0.0, {10: 5, 999: 4, 5: 3, 6: 2, 7: 1})
    results = scored(constant, f"{tmp_path}/out/test-*.tar", tmp_path)
    assert results == {"top1": 3 / 21, "top5": 6 / 21, "num_samples": 21}
