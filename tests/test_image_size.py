"""model.image_size as a number or as [height, width]: read, written and refused."""

from pathlib import Path

import pytest

from vitscale.config import differing_keys, from_dict, load, to_dict, to_toml
from vitscale.errors import ConfigError
from vitscale.image_size import ImageSize, image_size, pixels, sides, whole_patches, written
from vitscale.models.hybrid import HybridConfig
from vitscale.models.resnet import ResNetConfig
from vitscale.models.vit_config import ViTConfig
from vitscale.train_config import TrainConfig

BASE = {"run_dir": "run", "global_batch": 8, "total_steps": 4, "data": {"index": "x"}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [("224", 224), ("[224, 224]", 224), ("[384, 128]", (384, 128)), ("[16, 32]", (16, 32))],
)
def test_a_size_is_read_and_written_back(tmp_path: Path, given: str, expected: ImageSize) -> None:
    base = tmp_path / "base.toml"
    base.write_text(to_toml(from_dict(TrainConfig, BASE)))
    assert "image_size = 224\n" in base.read_text()  # as before there were other sizes
    config = load(TrainConfig, [base], [f"model.image_size={given}"])
    assert config.model.image_size == expected
    again = tmp_path / "again.toml"
    again.write_text(to_toml(config))
    assert f"image_size = {written(expected)}\n" in again.read_text()
    assert load(TrainConfig, [again]) == config == from_dict(TrainConfig, to_dict(config))
    changed = differing_keys(to_dict(load(TrainConfig, [base])), to_dict(config))
    assert changed == ([] if expected == 224 else ["model.image_size"])


@pytest.mark.parametrize(
    ("size", "patch", "rounded"),
    [(384, 14, 378), (384, 16, 384), ((100, 384), 14, (98, 378)), ((390, 379), 14, 378), (8, 14, 8)],
)
def test_a_size_is_rounded_down_to_whole_patches(size: ImageSize, patch: int, rounded: ImageSize) -> None:
    assert whole_patches(size, patch) == rounded


def test_a_size_is_shown_by_height_and_width() -> None:
    assert (sides(224), sides((384, 128))) == ((224, 224), (384, 128))
    assert (image_size(7, 7), image_size(7, 8)) == (7, (7, 8))
    assert (pixels(224), pixels((384, 128))) == ("224 px", "384 x 128 px")


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("size", [224.0, "224", None, (224,), (224, 224, 3), (224.0, 224.0)])
def test_what_is_no_size_is_refused(size: object) -> None:
    with pytest.raises(ValueError, match=r"image_size .* must be a whole number, like 224, or"):
        ViTConfig(image_size=size)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([224], "model.image_size [224] must have 2 values, not 1"),
        ([3, 224, 224], "model.image_size [3, 224, 224] must have 2 values, not 3"),
        (["224", 32], "model.image_size[0] must be a whole number, not '224'"),
        ("224x32", "model.image_size must be a whole number, not '224x32'"),
        (True, "model.image_size must be a whole number, not true"),
        ([224.5, 32], "model.image_size[0] must be a whole number, not 224.5"),
        ([225, 40], "model.image_size [225, 40] is not two multiples of the patch size 16; use [224, 32]"),
        ([0, 40], "model.image_size [0, 40] is not two multiples of the patch size 16; use [16, 32]"),
        ([230, 220], "model.image_size [230, 220] is not two multiples of the patch size 16; use 224"),
        (225, "model.image_size 225 is not a multiple of the patch size 16; use 224"),
        (
            [16, 1 << 17],
            "model.image_size [16, 131072] must be at most 65,536, and make at most 1,048,576 patches, "
            "not 8,192",
        ),
    ],
)
def test_what_is_no_size_is_refused_in_a_sentence(value: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(TrainConfig, BASE | {"model": {"image_size": value}})
    assert str(error.value) == message


def test_every_kind_of_model_has_a_grid_of_rows_and_columns() -> None:
    assert ViTConfig(variant="B/16", image_size=(32, 80)).grid == (2, 5)
    assert HybridConfig(variant="R50+B/16", image_size=(80, 32)).grid == (5, 2)
    resnet = ResNetConfig(variant="R50x1", image_size=(65, 32))  # halved five times, rounded up
    assert resnet.grid == (3, 1)
    assert [resnet.block_shapes[0].grid_in, resnet.block_shapes[3].grid_out] == [(17, 8), (9, 4)]
    with pytest.raises(ConfigError, match=r"model.image_size \[0, 5\] must lie in \[1, 65,536\]"):
        ResNetConfig(image_size=(0, 5))
    with pytest.raises(ConfigError, match=r"\[32, 81\] is not two multiples .* 16; use \[32, 80\]"):
        HybridConfig(variant="R50+B/16", image_size=(32, 81))
