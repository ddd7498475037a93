"""The loader: the same samples and pixels at any world size, worker count and starting step; damage
replaced
and counted.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_files import jpeg, write_index, write_tar

from vitscale.config import ConfigError
from vitscale.data.index import DataError, Index, build_index
from vitscale.data.lane import Recipe
from vitscale.data.loader import Stream, batches
from vitscale.data.sources import DataConfig, Source, SourceConfig, check_labels, make_mixture
from vitscale.data.transforms import AugmentConfig

CONFIG = DataConfig(index="index.json", lanes=4, window_chunks=2)


def make_stream(
    indexes: Index | Sequence[Index],
    first: int,
    last: int,
    rank: int = 0,
    world_size: int = 1,
    augment: AugmentConfig = AugmentConfig(),  # noqa: B008
    **changes,
) -> Stream:
    sources = tuple(
        Source(name=str(n), index=index, label_map={}, excluded=np.empty(0, dtype=np.int64))
        for n, index in enumerate([indexes] if isinstance(indexes, Index) else indexes)
    )
    sources = tuple(dataclasses.replace(source, **changes) for source in sources)
    weights = (SourceConfig(index="a", weight=0.7), SourceConfig(index="b", weight=0.3))
    config = CONFIG if len(sources) == 1 else dataclasses.replace(CONFIG, index="", sources=weights)
    mixture = make_mixture(sources, config, seed=1, global_batch=8, repeats=augment.repeats)
    return Stream(
        sources=sources,
        mixture=mixture,
        recipe=Recipe(augment, "simplejpeg", 8, 5),
        lanes=mixture.rank_lanes(rank, world_size),
        first_step=first,
        last_step=last,
    )


@pytest.fixture(scope="module")
def module_index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index.load(str(write_index(tmp_path_factory.mktemp("shards"), [40, 37, 20])))


@pytest.mark.parametrize(
    ("world_size", "num_workers", "first"), [(1, 2, 0), (2, 0, 5), (2, 3, 11), (4, 0, 13), (1, 0, 23)]
)
def test_any_world_worker_count_and_start_gives_the_same_pixels(
    module_index: Index, world_size: int, num_workers: int, first: int
) -> None:
    reference = list(batches(make_stream(module_index, 0, 26), 0))[first:]
    ranks = [
        list(batches(make_stream(module_index, first, 26, r, world_size), num_workers))
        for r in range(world_size)
    ]
    assert [len(rank) for rank in ranks] == [26 - first] * world_size
    for step, whole in enumerate(reference):
        assert torch.equal(torch.cat([rank[step].images for rank in ranks]), whole.images)
        assert torch.equal(torch.cat([rank[step].labels for rank in ranks]), whole.labels)
        assert np.array_equal(np.concatenate([rank[step].ids for rank in ranks]), whole.ids)


def test_augmentation_differs_between_epochs(module_index: Index) -> None:
    steps = make_stream(module_index, 0, 1).mixture.steps_per_epoch
    seen: dict[int, list[torch.Tensor]] = {}
    for batch in batches(make_stream(module_index, 0, 2 * steps), 0):
        for sample_id, image in zip(batch.ids.tolist(), batch.images, strict=True):
            seen.setdefault(sample_id, []).append(image)
    twice = [views for views in seen.values() if len(views) == 2]
    assert len(twice) > 80
    assert sum(torch.equal(*views) for views in twice) < 5


def damaged_index(folder: Path, bad: dict[int, tuple[bytes, bytes]], count: int = 64) -> Index:
    members = []
    for number in range(count):
        image, label = bad.get(number, (jpeg(number), str(number % 5).encode()))
        members += [(f"s{number:05d}.jpg", image), (f"s{number:05d}.cls", label)]
    return build_index([str(write_tar(folder / "x.tar", members))], chunk_samples=4)


def test_unusable_samples_are_replaced_the_same_way_by_anyone_and_named(tmp_path: Path) -> None:
    bad = {
        3: (b"this is a text file", b"3"),
        17: (jpeg(17)[:200], b"2"),
        30: (jpeg(30)[:150] + bytes(64) + jpeg(30)[214:], b"0"),
        41: (jpeg(41), b"5"),
    }
    index = damaged_index(tmp_path, bad)
    one = list(batches(make_stream(index, 0, 8), 0))
    two = [list(batches(make_stream(index, 0, 8, r, 2), 2)) for r in range(2)]
    for step, whole in enumerate(one):
        assert torch.equal(torch.cat([rank[step].images for rank in two]), whole.images)
    delivered = np.concatenate([batch.ids for batch in one])
    assert len(delivered) == 64 and not set(bad) & set(delivered.tolist())
    sentences = "\n".join(sentence for batch in one for sentence in batch.bad)
    for number, reason in (
        (3, "not a JPEG"),
        (17, "s00017"),
        (30, "s00030"),
        (41, "label 5 is out of range"),
    ):
        assert f"s{number:05d}" in sentences and reason in sentences
    named = {sentence.split("sample s")[1][:5] for batch in one for sentence in batch.bad}
    assert named == {f"{number:05d}" for number in bad}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_with_nothing_usable_end_in_one_sentence(tmp_path: Path, num_workers: int) -> None:
    index = damaged_index(tmp_path, {n: (jpeg(n)[:100], b"0") for n in range(64)})
    with pytest.raises(DataError, match=r"^100 samples in a row could not be used"):
        list(batches(make_stream(index, 0, 8), num_workers))


def test_labels_that_the_model_has_no_place_for_are_refused(module_index: Index) -> None:
    check_labels(make_stream(module_index, 0, 1).sources, CONFIG, 5)
    with pytest.raises(
        ConfigError, match=r"label 4, out of range for model.num_classes 4 .* set model.num_classes = 5"
    ):
        check_labels(make_stream(module_index, 0, 1).sources, CONFIG, 4)


def test_several_labels_need_a_multi_label_config(tmp_path: Path) -> None:
    index = damaged_index(tmp_path, {0: (jpeg(0), b"1 3")})
    with pytest.raises(ConfigError, match=r'data.labels = "multi"'):
        check_labels(make_stream(index, 0, 1).sources, CONFIG, 5)
    check_labels(make_stream(index, 0, 1).sources, dataclasses.replace(CONFIG, labels="multi"), 5)
    rows = torch.cat([batch.labels for batch in batches(make_stream(index, 0, 8), 0)])
    assert rows.shape == (64, 2) and [1, 3] in rows.tolist() and (rows[:, 1] == -1).sum() == 63
