"""The loader: the same samples and pixels at any world size, worker count and starting step;
damaged samples are replaced and counted.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from make import jpeg, write_index, write_tar

from vitscale.data.data_config import DataConfig, SourceConfig
from vitscale.data.index import Index
from vitscale.data.indexing import build_index
from vitscale.data.lane import Lane, ViewConfig
from vitscale.data.loader import Stream, batches
from vitscale.data.reader import Chunk, read_chunk
from vitscale.data.sources import Source, check_labels, make_mixture, open_sources
from vitscale.data.transforms import AugmentConfig
from vitscale.errors import ConfigError, DataError

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
        view_config=ViewConfig(augment, "simplejpeg", 8, 5),
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
    alone = list(batches(make_stream(index, 0, 8), 0))
    ranks = [list(batches(make_stream(index, 0, 8, r, 2), 2)) for r in range(2)]
    for step, whole in enumerate(alone):
        assert torch.equal(torch.cat([rank[step].images for rank in ranks]), whole.images)
    delivered = np.concatenate([batch.ids for batch in alone])
    assert len(delivered) == 64 and not set(bad) & set(delivered.tolist())
    sentences = [sentence for batch in alone for sentence in batch.bad]
    by_key = {sentence.split("sample s")[1][:5]: sentence for sentence in sentences}
    assert sorted(by_key) == ["00003", "00017", "00030", "00041"]
    assert "not a JPEG" in by_key["00003"] and "label 5 is out of range" in by_key["00041"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_with_nothing_usable_end_in_one_sentence(tmp_path: Path, num_workers: int) -> None:
    index = damaged_index(tmp_path, {n: (jpeg(n)[:100], b"0") for n in range(64)})
    stream = make_stream(index, 0, 8)
    with pytest.raises(DataError, match=r"^100 samples in a row could not be used"):
        next(batches(stream, num_workers))


def test_half_of_the_data_is_enough(tmp_path: Path) -> None:
    index = damaged_index(tmp_path, {n: (jpeg(n)[:100], b"0") for n in range(32)})
    delivered = [batch.ids for batch in batches(make_stream(index, 0, 8), 0)]
    assert np.concatenate(delivered).min() >= 32


def test_labels_that_have_no_place_are_named_by_their_class(tmp_path: Path, caplog) -> None:
    index = damaged_index(tmp_path, {3: (jpeg(3), b"17")})
    names = [f"animal {label}" for label in range(18)]
    Path(index.shards[0].url).with_name("classes.json").write_text(json.dumps(names))
    assert index.describe_lone()[0].startswith("label 17 (animal 17) stands alone among 6 labels: ")
    (source,) = make_stream(index, 0, 1).sources
    check_labels((source,), CONFIG, 5)
    assert "label 17 (animal 17) is out of range for model.num_classes 5" in caplog.text
    with pytest.raises(ConfigError, match=r"holds label 4 \(animal 4\), out of range"):
        check_labels((source,), CONFIG, 4)
    mapped = dataclasses.replace(source, label_map={label: label + 7 for label in range(5)})
    with pytest.raises(ConfigError, match=r"holds label 11 \(from 4 \(animal 4\)\), out of range"):
        check_labels((mapped,), CONFIG, 5)
    replaced = [sentence for batch in batches(make_stream(index, 0, 8), 0) for sentence in batch.bad]
    assert replaced and all("label 17 (animal 17) is out of range" in sentence for sentence in replaced)


@pytest.mark.parametrize(
    ("label_map", "problem"),
    [
        ({17: 5}, r"label 17 (mapped to 5) is out of range for model.num_classes 5"),
        ({}, "label 17 is not in the label map"),
        ({17: 4}, ""),
    ],
)
def test_a_lone_label_that_a_label_map_sends_out_of_range_is_replaced(
    tmp_path: Path, caplog, label_map: dict[int, int], problem: str
) -> None:
    index = damaged_index(tmp_path, {3: (jpeg(3), b"17")})
    (source,) = make_stream(index, 0, 1).sources
    mapped = dataclasses.replace(source, label_map={label: label for label in range(5)} | label_map)
    check_labels((mapped,), CONFIG, 5)
    assert caplog.text.count("stands alone: its 1 samples will be replaced") == bool(problem)
    assert problem in caplog.text
    delivered = list(batches(dataclasses.replace(make_stream(index, 0, 8), sources=(mapped,)), 0))
    bad = {sentence for batch in delivered for sentence in batch.bad}
    assert len(bad) == bool(problem) and all(problem in sentence for sentence in bad)
    assert max(int(batch.labels.max()) for batch in delivered) == 4


def test_a_sample_without_a_label_is_no_damage_but_replaced_in_training(tmp_path: Path) -> None:
    members = [(f"s{n:05d}.jpg", jpeg(n)) for n in range(40)]
    labels = [(f"s{n:05d}.json", b"[]" if n == 7 else str(n % 5).encode()) for n in range(40)]
    pairs = [member for pair in zip(members, labels, strict=True) for member in pair]
    index = build_index([str(write_tar(tmp_path / "x.tar", pairs))], chunk_samples=4)
    assert (index.num_samples, index.num_damaged, sum(index.label_counts.values())) == (40, 0, 39)
    seen = list(batches(make_stream(index, 0, 5), 0))  # 8 samples a batch: one epoch
    bad = [sentence for batch in seen for sentence in batch.bad]
    assert [sentence.endswith("s00007: it has no label, and training needs one") for sentence in bad] == [
        True
    ]
    assert all((batch.labels >= 0).all() for batch in seen)


@pytest.mark.parametrize("label", [b"5000", b"9" * 20])
def test_a_label_that_stands_alone_does_not_block_a_run(tmp_path: Path, caplog, label: bytes) -> None:
    index = damaged_index(tmp_path, {3: (jpeg(3), label)})
    sources = make_stream(index, 0, 1).sources
    assert sources[0].max_label == 4
    check_labels(sources, CONFIG, 5)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == (label == b"5000") and all("label 5000 is out of range" in line for line in warned)
    with pytest.raises(ConfigError, match=r"label 4, out of range .* set model.num_classes = 5"):
        check_labels(sources, CONFIG, 4)
    seen = list(batches(make_stream(index, 0, 8), 0))
    bad = {sentence for batch in seen for sentence in batch.bad}
    assert len(bad) == 1 and "sample s00003" in bad.pop()
    assert not any(3 in batch.ids for batch in seen)


def test_a_label_map_may_leave_out_a_label_that_stands_alone(tmp_path: Path) -> None:
    damaged_index(tmp_path, {3: (jpeg(3), b"5000")}).save(tmp_path / "index.json")
    (tmp_path / "map.json").write_text("[1, 2, 3, 4, 0]")
    config = DataConfig(index=str(tmp_path / "index.json"), label_map=str(tmp_path / "map.json"))
    sources = open_sources(config)
    check_labels(sources, config, 5)
    stream = make_stream(sources[0].index, 0, 8, label_map=dict(sources[0].label_map))
    bad = {sentence for batch in batches(stream, 0) for sentence in batch.bad}
    assert len(bad) == 1 and bad.pop().endswith("sample s00003: label 5000 is not in the label map")


def test_several_labels_need_a_multi_label_config(tmp_path: Path) -> None:
    index = damaged_index(tmp_path, {0: (jpeg(0), b"1 3")})
    sources = make_stream(index, 0, 1).sources
    check_labels(sources, dataclasses.replace(CONFIG, labels="multi"), 5)
    with pytest.raises(ConfigError, match=r'data.labels = "multi"'):
        check_labels(sources, CONFIG, 5)
    rows = torch.cat([batch.labels for batch in batches(make_stream(index, 0, 8), 0)])
    assert rows.shape == (64, 2) and [1, 3] in rows.tolist() and (rows[:, 1] == -1).sum() == 63


@pytest.fixture(scope="module")
def two_indexes(tmp_path_factory: pytest.TempPathFactory) -> list[Index]:
    folder = tmp_path_factory.mktemp("two")
    second = damaged_index(folder, {n: (jpeg(500 + n), b"1 3") for n in range(0, 31, 2)}, count=31)
    return [Index.load(str(write_index(folder / "one", [40, 37, 20]))), second]


EVERYTHING = AugmentConfig(
    randaugment="deit", randaugment_magnitude_std=0.5, color_jitter=0.3, random_erasing=0.25
)


@pytest.mark.parametrize(
    ("world_size", "num_workers", "first"), [(1, 2, 0), (2, 2, 5), (4, 0, 13), (1, 3, 29)]
)
@pytest.mark.parametrize("repeats", [1, 2])
def test_a_mixture_with_every_augmentation_gives_the_same_pixels_to_anyone(
    two_indexes: list[Index], world_size: int, num_workers: int, first: int, repeats: int
) -> None:
    augment = dataclasses.replace(EVERYTHING, repeats=repeats)
    reference = list(batches(make_stream(two_indexes, 0, 30, augment=augment), 0))[first:]
    ranks = [
        list(batches(make_stream(two_indexes, first, 30, r, world_size, augment), num_workers))
        for r in range(world_size)
    ]
    for step, whole in enumerate(reference):
        assert torch.equal(torch.cat([rank[step].images for rank in ranks]), whole.images)
        assert torch.equal(torch.cat([rank[step].labels for rank in ranks]), whole.labels)
        assert np.array_equal(np.concatenate([rank[step].ids for rank in ranks]), whole.ids)


def test_a_mixture_draws_from_its_sources_in_exact_proportion(two_indexes: list[Index]) -> None:
    ids = np.stack([batch.ids for batch in batches(make_stream(two_indexes, 0, 40), 0)])
    from_first = np.cumsum((ids < 97).sum(axis=1))
    assert from_first.tolist() == [int(8 * (step + 1) * 7 / 10 + 0.5) for step in range(40)]
    labels = {
        label
        for batch in batches(make_stream(two_indexes, 0, 40), 0)
        for label in batch.labels[:, 1].tolist()
    }
    assert labels == {-1, 3}


def test_views_of_one_sample_in_a_batch_differ_and_are_those_of_its_epoch(module_index: Index) -> None:
    stream = make_stream(module_index, 0, 10, augment=AugmentConfig(repeats=2))
    for batch in batches(stream, 0):
        for sample in set(batch.ids.tolist()):
            views = batch.images[torch.from_numpy(batch.ids == sample)]
            assert len(views) == 2 and not torch.equal(views[0], views[1])


def test_labels_are_mapped_into_the_space_of_the_run(module_index: Index) -> None:
    mapping = {0: 4, 1: 3, 2: 2, 3: 1, 4: 0}
    plain = batches(make_stream(module_index, 0, 12), 0)
    mapped = batches(make_stream(module_index, 0, 12, label_map=mapping), 0)
    for before, after in zip(plain, mapped, strict=True):
        assert torch.equal(4 - before.labels, after.labels) and torch.equal(before.images, after.images)


def test_excluded_samples_are_never_delivered_and_no_damage(module_index: Index) -> None:
    excluded = np.arange(0, 97, 3)
    stream = make_stream(module_index, 0, 24, excluded=excluded)
    seen = list(batches(stream, 2))
    assert not set(excluded.tolist()) & {sample for batch in seen for sample in batch.ids.tolist()}
    assert not any(batch.bad for batch in seen)
    plain = list(batches(make_stream(module_index, 0, 24), 0))
    kept = [(after.ids == before.ids).mean() for after, before in zip(seen, plain, strict=True)]
    assert 0.6 < np.mean(kept) < 0.75  # the others stay where they were


def test_the_read_ahead_of_a_lane_is_bounded(module_index: Index) -> None:
    """A lane holds at most a window, what it read ahead of the next, and a rest of a chunk."""
    stream = make_stream(module_index, 0, 24)
    with ThreadPoolExecutor(2) as threads:
        read = functools.partial(read_chunk, module_index)
        lane = Lane(1, 0, stream.mixture, stream.sources, stream.view_config, (read,), threads)
        num_held = []
        for _ in range(24):
            lane.take_step()
            num_held.append(len(lane._readers[0]._held))
    assert max(num_held) <= 8 + 4 and min(num_held) < 8


@pytest.mark.parametrize("chunk_order", ["shuffled", "stratified"])
def test_a_lane_reads_no_chunk_twice_in_an_epoch(
    module_index: Index, chunk_order: Literal["shuffled", "stratified"]
) -> None:
    """Windows end inside chunks: what the next one needs of such a chunk is carried over."""
    config = dataclasses.replace(CONFIG, lanes=1, chunk_order=chunk_order)
    sources = make_stream(module_index, 0, 1).sources
    mixture = make_mixture(sources, config, seed=1, global_batch=8)
    view_config = ViewConfig(AugmentConfig(), "simplejpeg", 8, 5)
    chunks: list[int] = []

    def read(chunk: int) -> Chunk:
        chunks.append(chunk)
        return read_chunk(module_index, chunk)

    with ThreadPoolExecutor(1) as threads:
        lane = Lane(0, 0, mixture, sources, view_config, (read,), threads)
        squares = [square for _ in range(mixture.steps_per_epoch - 1) for square in lane.take_step()]
    drawn = module_index.layout.chunk_of(np.array([square.key.sample for square in squares]))
    assert len(set(drawn.tolist())) > 20
    assert len(set(chunks)) == len(chunks)
