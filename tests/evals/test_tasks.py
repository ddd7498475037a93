"""Tasks on real shards, with models whose right answers are known."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vitscale.config import ConfigError, from_dict
from vitscale.evals.tasks import EvalConfig, open_task, run_task

COLOURS = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 0),
    (0, 255, 255),
    (255, 0, 255),
    (128, 128, 128),
]


def write_shard(path: Path, classes: list[str], seed: int = 0, encoding: str = "png") -> str:
    """A shard with a noisy image of the first class's colour for each of `classes`, the texts of the .cls."""
    generator = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for i, text in enumerate(classes):
            colour = COLOURS[int(text.split()[0]) % 7] if text.strip() else (0, 0, 0)
            pixels = np.clip(np.array(colour) + generator.normal(0, 20, (8, 8, 3)), 0, 255).astype(np.uint8)
            image = io.BytesIO()
            Image.fromarray(pixels).save(image, encoding)
            for extension, data in ((encoding, image.getvalue()), ("cls", text.encode())):
                member = tarfile.TarInfo(f"sample{i:05d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


class ColourModel:
    """Features are the raw pixels; a logit is the nearness of the mean colour to the class's."""

    image_size = 4
    num_classes = 7

    def __init__(self) -> None:
        self.images_seen = 0

    def features(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 4, 4)
        self.images_seen += len(images)
        return images.float().flatten(1)

    def logits(self, images: Tensor) -> Tensor:
        colours = torch.tensor(COLOURS, dtype=torch.float32)
        return -(images.float().mean((2, 3))[:, None] - colours).square().sum(2)


@pytest.fixture
def colour_shards(tmp_path: Path) -> tuple[str, str]:
    train = write_shard(tmp_path / "train.tar", [str(i % 7) for i in range(140)], seed=1)
    return train, write_shard(tmp_path / "test.tar", [str(i * 3 % 7) for i in range(45)], seed=2)


def test_fewshot_learns_colours_and_decodes_only_support_and_test(colour_shards: tuple[str, str]):
    train, test = colour_shards
    config = EvalConfig(kind="fewshot", train=train, test=test, shots=(1, 3), seeds=(0, 1), batch_size=16)
    model = ColourModel()
    results = run_task("colours", config, model)
    assert list(results) == ["1shot", "1shot_std", "3shot", "3shot_std"]
    assert results["3shot"] > 0.8  # grey lies amid the others, out of reach of a linear classifier
    assert results["1shot_std"] >= 0.0
    assert model.images_seen <= 45 + 2 * 3 * 7  # seeds x most shots x classes: 1 shot is a subset of 3


def test_fewshot_reports_mean_and_population_deviation_over_seeds(tmp_path: Path):
    train = write_shard(tmp_path / "a.tar", [str(i % 7) for i in range(70)], seed=1)
    test = write_shard(tmp_path / "b.tar", [str((i + i // 10) % 7) for i in range(60)], seed=2)

    class Blurred(ColourModel):
        def features(self, images: Tensor) -> Tensor:
            noise = torch.randn(images.shape[0], 48, generator=torch.Generator().manual_seed(5))
            return super().features(images) + 400 * noise

    def run(*seeds: int) -> dict[str, float]:
        config = EvalConfig(kind="fewshot", train=train, test=test, shots=(1,), seeds=seeds, batch_size=1000)
        return run_task("blurred", config, Blurred())

    both = run(0, 1)
    assert both == run(0, 1)
    assert both["1shot_std"] > 0 and run(0)["1shot_std"] == 0.0


def test_classify_counts_labelled_samples_and_any_of_several_labels(tmp_path: Path):
    test = write_shard(tmp_path / "test.tar", ["0", "1 4", "2", "6 5"])
    results = run_task("colours", EvalConfig(test=test, batch_size=3), ColourModel())
    assert results == {"top1": 1.0, "top5": 1.0, "num_samples": 4}


def test_classify_leaves_top5_out_where_it_says_nothing(tmp_path: Path):
    class Five(ColourModel):
        num_classes = 5

        def logits(self, images: Tensor) -> Tensor:
            return super().logits(images)[:, :5].roll(1, dims=1)

    test = write_shard(tmp_path / "test.tar", ["0", "1", "2"])
    assert run_task("five", EvalConfig(test=test), Five()) == {"top1": 0.0, "num_samples": 3}


def test_a_class_beyond_the_head_is_refused(tmp_path: Path):
    test = write_shard(tmp_path / "test.tar", ["0", "7"])
    with pytest.raises(ConfigError, match="class 7 does not exist in a model of 7 classes"):
        run_task("colours", EvalConfig(test=test), ColourModel())


def test_fewshot_refuses_several_labels_and_unknown_test_classes(tmp_path: Path):
    single = write_shard(tmp_path / "single.tar", ["0", "1"] * 4)
    multi = write_shard(tmp_path / "multi.tar", ["0", "1 2"])
    other = write_shard(tmp_path / "other.tar", ["0", "5"])

    def config(train: str, test: str) -> EvalConfig:
        return EvalConfig(kind="fewshot", train=train, test=test, shots=(1,))

    with pytest.raises(ConfigError, match="sample 1 has 2 labels"):
        run_task("x", config(multi, single), ColourModel())
    with pytest.raises(ConfigError, match="class 5 does not occur in the training shards"):
        run_task("x", config(single, other), ColourModel())


def test_missing_shards_show_when_the_task_is_opened(tmp_path: Path):
    with pytest.raises(ConfigError, match="no file matches"):
        open_task("x", EvalConfig(test=f"{tmp_path}/none-*.tar"), image_size=4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "test is empty"),
        ({"test": "a.tar", "kind": "fewshot"}, "train is empty"),
        ({"test": "a.tar", "train": "b.tar"}, 'only kind = "fewshot" reads it'),
        ({"test": "a.tar", "shots": [0]}, r"shots \[0\] must list different whole numbers from 1 up"),
        ({"test": "a.tar", "shots": []}, "shots"),
        ({"test": "a.tar", "seeds": [1, 1]}, "seeds"),
        ({"test": "a.tar", "l2_reg": 0}, "l2_reg"),
        ({"test": "a.tar", "batch_size": 0}, "batch_size"),
        ({"test": "a.tar", "num_workers": -1}, "num_workers"),
        ({"test": "a.tar", "kind": "fewshots"}, 'did you mean "fewshot"'),
    ],
)
def test_a_wrong_section_is_refused_in_a_sentence(values: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        from_dict(EvalConfig, values)


def test_raw_cifar10_pixels_reach_the_measured_baseline(shared_data: Path):
    """Measured with all 50,000 + 10,000 images: 10 shots 21.7, 22.1, 25.3; 25 shots 25.2, 25.7, 26.2."""
    folder = shared_data / "cifar10"
    config = EvalConfig(
        kind="fewshot",
        train=f"{folder}/train-*.tar",
        test=f"{folder}/test-*.tar",
        shots=(1, 10, 25),
        batch_size=500,
    )

    class Pixels(ColourModel):
        image_size = 32

        def features(self, images: Tensor) -> Tensor:
            return images.float().flatten(1)

    results = run_task("pixels", config, Pixels())
    assert 0.105 < results["1shot"] < 0.185
    assert 0.18 < results["10shot"] < 0.29
    assert 0.22 < results["25shot"] < 0.29
