"""An import takes our pixels where its source takes its own, or is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_models import TINY, images, logits, randomise, saved_model

from vitscale import load_model
from vitscale.data.transforms import normalize
from vitscale.errors import CheckpointError
from vitscale.weights.foreign.convert import export_model, import_model

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    ("mean", "std", "agreeing"),
    [([0.5] * 3, [0.5] * 3, "half"), (*IMAGENET, "imagenet"), ([0.0] * 3, [1.0] * 3, "")],
)
def test_an_import_takes_our_pixels_where_timm_takes_its_own(
    tmp_path: Path, timm: Any, mean: list[float], std: list[float], agreeing: str
) -> None:
    sizes = {"img_size": 12, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 4}
    other = randomise(timm.create_model("vit_base_patch16_224", num_classes=5, **sizes))
    folder, data = tmp_path / "timm", {"mean": mean, "std": std}
    timm.models.save_for_hf(other, folder, model_args=sizes, data_config=data, safe_serialization=True)
    read = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    channels = (torch.tensor(read.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    pixels, (mean_of, std_of) = (images(TINY) + 1) / 2, channels
    with torch.no_grad():
        expected = read((pixels - mean_of) / std_of)
    for given in filter(None, ("half", "imagenet")):
        if given != agreeing:
            message = rf"have mean \({mean[0]:.4g}, .*, which are not those of --pixels {given}; drop"
            with pytest.raises(CheckpointError, match=message):
                import_model(folder, tmp_path / "ours", format="timm", pixels=given)
    for given in {None, agreeing or None}:
        path = import_model(folder, tmp_path / "ours", format="timm", pixels=given)
        assert (logits(load_model(path), TINY) - expected).abs().max() < 1e-5
    again = timm.create_model(
        f"local-dir:{export_model(path, tmp_path / 'again', format='timm')}", pretrained=True
    ).eval()
    assert tuple(again.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)
    assert (logits(again, TINY) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("format", ["timm", "transformers"])
def test_the_normalisation_of_pixels_is_asked_for_where_no_file_says_it(tmp_path: Path, format: Any) -> None:
    model = saved_model(tmp_path / "ours.safetensors")
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "out", format=format)
    file = out / {"timm": "config.json", "transformers": "preprocessor_config.json"}[format]
    values = json.loads(file.read_text())
    for key in ("pretrained_cfg", "image_mean", "image_std"):
        values.pop(key, None)
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"says how its pixels are normalised; add --pixels half .to"):
        import_model(out, tmp_path / "back", format=format)
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    with torch.no_grad():
        expected = model(((images(TINY) + 1) / 2 - mean) / std)
    for pixels, wanted in (("half", logits(model, TINY)), ("imagenet", expected)):
        back = load_model(import_model(out, tmp_path / "back", format=format, pixels=pixels))
        assert (logits(back, TINY) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    "values",
    [
        {"mean": [0.5] * 3},
        {"mean": [0.5], "std": [0.5]},
        {"mean": [0.5] * 3, "std": [0.5, 0, 0.5]},
        {"mean": "imagenet", "std": "imagenet"},
        {"mean": [0.5, 0.5, float("inf")], "std": [0.5] * 3},
        {"mean": [10**400] * 3, "std": [0.5] * 3},
    ],
)
def test_a_normalisation_that_is_none_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    saved_model(tmp_path / "ours.safetensors")
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "timm", format="timm")
    file = out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pretrained_cfg": values}))
    with pytest.raises(CheckpointError, match=r"timm: config.json has mean .*; they must be three"):
        import_model(out, tmp_path / "back", format="timm")


@pytest.mark.parametrize(
    "keys",
    [
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        dict(zip(("image_mean", "image_std"), IMAGENET, strict=True)),
        {"do_normalize": False},
        {"image_mean": [1.0] * 3, "image_std": [0.7] * 3, "rescale_factor": 1 / 127.5},
        {"image_mean": [120.0] * 3, "image_std": [100.0] * 3, "do_rescale": False},
    ],
)
def test_an_import_takes_our_pixels_where_transformers_takes_its_own(
    tmp_path: Path, transformers: Any, keys: dict[str, Any]
) -> None:
    model = saved_model(tmp_path / "ours.safetensors")
    out = export_model(tmp_path / "ours.safetensors", tmp_path / "hf", format="transformers")
    file = out / "preprocessor_config.json"
    transformers.AutoImageProcessor.from_pretrained(out, **keys).save_pretrained(out)
    assert keys.items() <= json.loads(file.read_text()).items()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    theirs = transformers.AutoImageProcessor.from_pretrained(out)(images=pixels, return_tensors="pt")
    ours = normalize(torch.from_numpy(pixels).permute(2, 0, 1)[None], torch.float32)
    back = load_model(import_model(out, tmp_path / "back", format="transformers"))
    with torch.no_grad():
        assert (back(ours) - model(theirs["pixel_values"])).abs().max() < 1e-5
