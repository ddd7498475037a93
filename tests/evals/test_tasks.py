"""Tasks on real shards, with models whose right answers are known; and their sections."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vitscale.config import from_dict, to_dict
from vitscale.data.evalset import EvaluationSet
from vitscale.data.index import Index
from vitscale.data.sources import Source
from vitscale.errors import ConfigError, DataError, NotFinite, UserError
from vitscale.evals import ClassifyConfig, EvalConfig, FewShotConfig, KnnConfig, LinearConfig, open_task
from vitscale.evals.store import FeatureStore
from vitscale.evals.task import within_memory

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
    """A shard of noisy images in the colour of their first class. classes: the .cls texts."""
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
    """Features are the raw pixels; a logit says how near the mean colour is to the class's."""

    image_size = 4
    num_classes = 7

    def __init__(self) -> None:
        self.images_seen = 0
        self.stored = FeatureStore()

    def features(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 4, 4)
        self.images_seen += len(images)
        return images.float().flatten(1)

    def logits(self, images: Tensor) -> Tensor:
        colours = torch.tensor(COLOURS, dtype=torch.float32)
        return -(images.float().mean((2, 3))[:, None] - colours).square().sum(2)


def run(config: EvalConfig, model: ColourModel) -> dict[str, float]:
    return open_task("colours", config, model.image_size).run(model)


@pytest.fixture
def colour_shards(tmp_path: Path) -> tuple[str, str]:
    train = write_shard(tmp_path / "train.tar", [str(i % 7) for i in range(140)], seed=1)
    return train, write_shard(tmp_path / "test.tar", [str(i * 3 % 7) for i in range(45)], seed=2)


def test_fewshot_learns_colours_and_decodes_only_support_and_test(colour_shards: tuple[str, str]):
    train, test = colour_shards
    model = ColourModel()
    results = run(FewShotConfig(train=train, test=test, shots=(1, 3), seeds=(0, 1), batch_size=16), model)
    assert list(results) == ["1shot", "1shot_std", "3shot", "3shot_std"]
    assert results["3shot"] > 0.8  # grey lies amid the others, out of reach of a linear classifier
    assert results["1shot_std"] >= 0.0
    assert model.images_seen <= 45 + 2 * 3 * 7  # seeds x most shots x classes: 1 shot is a subset of 3


def test_fewshot_reports_mean_and_population_deviation_over_seeds(tmp_path: Path):
    train = write_shard(tmp_path / "a.tar", [str(i % 7) for i in range(70)], seed=1)
    test = write_shard(tmp_path / "b.tar", [str((i + i // 10) % 7) for i in range(60)], seed=2)

    class Blurred(ColourModel):
        def features(self, images: Tensor) -> Tensor:
            pixels = super().features(images)
            return pixels + 400 * torch.sin(1000 * pixels)  # noise, the same wherever an image is in a batch

    def one_shot(*seeds: int) -> tuple[float, float]:
        config = FewShotConfig(train=train, test=test, shots=(1,), seeds=seeds, batch_size=1000)
        results = run(config, Blurred())
        return results["1shot"], results["1shot_std"]

    (first, deviation), (second, _), both = one_shot(0), one_shot(1), one_shot(0, 1)
    assert deviation == 0.0 and first != second
    assert both == pytest.approx(((first + second) / 2, abs(first - second) / 2))


def test_classify_counts_labelled_samples_and_any_of_several_labels(tmp_path: Path):
    test = write_shard(tmp_path / "test.tar", ["0", "1 4", "2", "6 5"])
    results = run(ClassifyConfig(test=test, batch_size=3), ColourModel())
    assert results == {"top1": 1.0, "top5": 1.0, "num_samples": 4}


def test_classify_leaves_top5_out_where_it_says_nothing(tmp_path: Path):
    class Five(ColourModel):
        num_classes = 5

        def logits(self, images: Tensor) -> Tensor:
            return super().logits(images)[:, :5].roll(1, dims=1)

    test = write_shard(tmp_path / "test.tar", ["0", "1", "2"])
    assert run(ClassifyConfig(test=test), Five()) == {"top1": 0.0, "num_samples": 3}


@pytest.mark.parametrize(
    ("kind", "values", "what", "value"),
    [
        ("classify", {}, "logits of 1 of 45", "nan"),
        ("classify", {}, "logits of 1 of 45", "-inf"),
        ("kmeans", {}, "features of 1 of 45", "nan"),
        ("fewshot", {"shots": [1, 3], "seeds": [0]}, "features of 1 of 21", "nan"),
        ("knn", {"k": [1, 5]}, "features of 1 of 140", "nan"),
        ("logistic", {"c": [1e-9]}, "features of 1 of 140", "inf"),
        ("linear", {"learning_rates": [0.1], "epochs": 1}, "features of 1 of 140", "nan"),
    ],
)
def test_each_kind_names_its_results_and_scores_no_value_that_is_not_finite(
    colour_shards: tuple[str, str], kind: str, values: dict[str, object], what: str, value: str
):
    train, test = colour_shards
    paths = {"test": test} if kind in ("classify", "kmeans") else {"train": train, "test": test}
    section = from_dict(EvalConfig, {"kind": kind, **values, **paths}, "evals.colours")
    task = open_task("colours", section, 4)

    class Overflowing(ColourModel):
        def spoiled(self, rows: Tensor) -> Tensor:
            rows[0, -1] = float(value)
            return rows

        def features(self, images: Tensor) -> Tensor:
            return self.spoiled(super().features(images))

        def logits(self, images: Tensor) -> Tensor:
            return self.spoiled(super().logits(images))

    sound = ColourModel()
    assert list(task.run(sound)) == task.names(sound)
    with pytest.raises(NotFinite, match=f"^the {what} images are not finite$"):
        task.run(Overflowing())


def test_classify_maps_the_labels_of_a_test_set(tmp_path: Path):
    class Swapped(ColourModel):
        """Its classes 0 and 1 are the shards' 1 and 0."""

        def logits(self, images: Tensor) -> Tensor:
            return super().logits(images)[:, [1, 0, 2, 3, 4, 5, 6]]

    test = write_shard(tmp_path / "test.tar", ["0", "1", "2", "1"])
    (tmp_path / "map.json").write_text('{"0": 1, "1": 0, "2": 2}')
    mapped = ClassifyConfig(test=test, label_map=f"{tmp_path}/map.json")
    assert run(mapped, Swapped())["top1"] == 1.0 and run(ClassifyConfig(test=test), Swapped())["top1"] == 0.25
    opened = EvaluationSet.open(test, image_size=4, label_map=mapped.label_map)
    assert opened.labels(np.arange(4)).tolist() == [[1], [0], [2], [0]]
    for content, sentence in (
        ("[1, 0]", "has no entry for label 2, which the shards hold"),
        ("[1, 0, 7]", r"class 7 \(from 2\) does not exist in a model of 7 classes"),
    ):
        (tmp_path / "map.json").write_text(content)
        with pytest.raises(DataError, match=sentence):
            run(mapped, Swapped())


def test_a_class_beyond_the_head_is_refused(tmp_path: Path):
    test = write_shard(tmp_path / "test.tar", ["0", "7"])
    with pytest.raises(DataError, match="class 7 does not exist in a model of 7 classes"):
        run(ClassifyConfig(test=test), ColourModel())


def test_a_split_that_the_training_data_lack_is_refused(index: Index):
    whole = Source(name="0", index=index, label_map={}, excluded=np.empty(0, dtype=np.int64))
    for source in (None, whole):
        with pytest.raises(ConfigError, match="val: these training data have no validation split"):
            open_task("val", ClassifyConfig(split="validation"), 4, source)


@pytest.mark.parametrize(
    ("size", "where", "way_out"),
    [
        (9, "evals.colours", "evals.colours.batch_size 9; set evals.colours.batch_size to 4, or lower"),
        (2, "", "--batch-size 2; set --batch-size to 1, or lower"),
        (1, "", "--batch-size 1; use a GPU with more"),
    ],
)
def test_a_batch_that_fits_into_no_gpu_is_refused_with_the_one_to_try(
    colour_shards: tuple[str, str], size: int, where: str, way_out: str
):
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    task = open_task("colours", ClassifyConfig(test=colour_shards[1], batch_size=size), 4)
    with pytest.raises(ConfigError, match=f"^colours: CUDA is out of memory with {way_out}$"):
        within_memory(task, full, where)


def test_fewshot_refuses_several_labels_and_unknown_test_classes(tmp_path: Path):
    single = write_shard(tmp_path / "single.tar", ["0", "1"] * 4)
    multi = write_shard(tmp_path / "multi.tar", ["0", "1 2"])
    other = write_shard(tmp_path / "other.tar", ["0", "5"])

    def one_shot(train: str, test: str) -> dict[str, float]:
        return run(FewShotConfig(train=train, test=test, shots=(1,)), ColourModel())

    assert set(one_shot(single, single)) == {"1shot", "1shot_std"}
    with pytest.raises(DataError, match="there are samples with 2 labels"):
        one_shot(multi, single)
    with pytest.raises(DataError, match="class 5 does not occur in the training shards"):
        one_shot(single, other)


def test_classes_that_do_not_fit_are_named(tmp_path: Path):
    (tmp_path / "classes.json").write_text('["red", "green", "blue"]')
    single = write_shard(tmp_path / "single.tar", ["0", "1"] * 4)
    other = write_shard(tmp_path / "other.tar", ["0", "2"])

    class Two(ColourModel):
        num_classes = 2

    with pytest.raises(DataError, match=r"class 2 \(blue\) does not exist in a model of 2 classes"):
        run(ClassifyConfig(test=other), Two())
    with pytest.raises(DataError, match=r"class 2 \(blue\) does not occur in the training shards"):
        run(FewShotConfig(train=single, test=other, shots=(1,)), ColourModel())
    with pytest.raises(DataError, match=r"but class 0 \(red\) has 1; lower shots"):
        run(FewShotConfig(train=other, test=other, shots=(2,)), ColourModel())


def test_missing_shards_show_when_the_task_is_opened(tmp_path: Path):
    config = ClassifyConfig(test=f"{tmp_path}/none-*.tar")
    with pytest.raises(UserError, match="no file matches"):
        open_task("colours", config, image_size=4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"test": ""}, "evals.digits.test is empty: an evaluation needs test shards"),
        ({"train": ""}, "evals.digits.train is empty: fewshot needs training shards"),
        ({"shots": [0]}, r"evals.digits.shots \[0\] must list different whole numbers from 1 up, like \[1\]"),
        ({"shots": []}, r"evals.digits.shots \[\] must list"),
        ({"seeds": [1, 1]}, r"evals.digits.seeds \[1, 1\] must list different whole numbers from 0 up"),
        ({"seeds": [-1]}, r"evals.digits.seeds \[-1\] must list"),
        ({"l2_reg": 0}, "evals.digits.l2_reg 0.0 must be above 0"),
        ({"batch_size": 0}, "evals.digits.batch_size 0 must be above 0"),
        ({"every_steps": 0}, "evals.digits.every_steps 0 must be above 0"),
        ({"num_workers": -2}, "evals.digits.num_workers -2 must be 0, which decodes in the main process, or"),
        ({"kind": "fewshots"}, "evals.digits.kind 'fewshots' is not one of .* did you mean \"fewshot\""),
        (
            {"kind": "classify"},
            'unknown key evals.digits.train: only kind = "fewshot" or "knn" or .* or "linear" reads it',
        ),
    ],
)
def test_a_wrong_section_is_refused_by_its_own_name(values: dict[str, object], message: str):
    good = {"kind": "fewshot", "train": "a.tar", "test": "b.tar", "shots": [1], "seeds": [0]}
    assert from_dict(EvalConfig, good, "evals.digits").shots == (1,)
    with pytest.raises(ConfigError, match=message):
        from_dict(EvalConfig, good | values, "evals.digits")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (KnnConfig(train="a.tar", test="b.tar", k=()), r"evals\.digits\.k \[\] must list"),
        (KnnConfig(train="a.tar", test="b.tar", temperature=0.0), r"evals\.digits\.temperature 0\.0 must"),
        (FewShotConfig(train="a.tar", test="b.tar", shots=()), r"evals\.digits\.shots \[\] must list"),
        (LinearConfig(train="a.tar", test="b.tar", learning_rates=(-1.0,)), "numbers above 0"),
        (ClassifyConfig(), r"evals\.digits\.test is empty"),
    ],
)
def test_a_wrong_section_that_was_built_in_python_is_refused_too(section: EvalConfig, message: str):
    with pytest.raises(ConfigError, match=message):
        open_task("digits", section, 4)


def test_a_section_reads_test_shards_or_a_split():
    assert from_dict(EvalConfig, {"split": "validation"}, "evals.val") == ClassifyConfig(split="validation")
    for values, message in (
        (
            {"split": "validation", "test": "a.tar"},
            'evals.val.test and evals.val.split are both set, .* = ""',
        ),
        (
            {"split": "validation", "label_map": "a.json"},
            "evals.val.label_map is for test shards: data.label_map maps .* leave it out",
        ),
        ({"split": "train"}, "evals.val.split 'train' is not one of '', 'validation'"),
        ({"kind": "fewshot", "split": "validation"}, 'evals.val.split: only kind = "classify" reads it'),
    ):
        with pytest.raises(ConfigError, match=message):
            from_dict(EvalConfig, values, "evals.val")


def test_a_section_without_a_kind_classifies():
    assert from_dict(EvalConfig, {"test": "a.tar"}, "evals.digits") == ClassifyConfig(test="a.tar")


def test_a_section_that_an_earlier_version_wrote_in_full_loads():
    """When one section had the keys of all kinds, those of few-shot were always written."""
    flat = {"train": "", "shots": [3], "seeds": [0, 1, 2], "l2_reg": 1024.0}
    written = to_dict(ClassifyConfig(test="a.tar")) | flat
    assert from_dict(EvalConfig, written, "evals.digits") == ClassifyConfig(test="a.tar")
    with pytest.raises(ConfigError, match=r"unknown key evals.digits.train: only kind = .fewshot. or "):
        from_dict(EvalConfig, written | {"train": "b.tar"}, "evals.digits")
    with pytest.raises(ConfigError, match=r"unknown key evals.digits.shots: only kind = .fewshot. reads it"):
        from_dict(EvalConfig, {"test": "a.tar", "shots": [3]}, "evals.digits")


def test_raw_cifar10_pixels_reach_the_measured_baseline(shared_data: Path):
    """Measured with all 50,000 + 10,000 images, for three seeds:

    10 shots    21.7  22.1  25.3
    25 shots    25.2  25.7  26.2
    """
    folder = shared_data / "cifar10"
    config = FewShotConfig(
        train=f"{folder}/train-*.tar",
        test=f"{folder}/test-*.tar",
        shots=(1, 10, 25),
        batch_size=500,
    )

    class Pixels(ColourModel):
        image_size = 32

        def features(self, images: Tensor) -> Tensor:
            return images.float().flatten(1)

    results = run(config, Pixels())
    assert 0.105 < results["1shot"] < 0.185
    assert 0.18 < results["10shot"] < 0.29
    assert 0.22 < results["25shot"] < 0.29
