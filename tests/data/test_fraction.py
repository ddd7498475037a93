"""data.fraction: a part of the data that a seed chooses by the samples' keys."""

from pathlib import Path

import numpy as np
import pytest
from make import jpeg, write_shards, write_tar

from vitscale.data.data_config import DataConfig, SourceConfig
from vitscale.data.index import Index
from vitscale.data.indexing import build_index
from vitscale.data.lane import ViewConfig
from vitscale.data.loader import Stream, batches
from vitscale.data.reader import read_samples
from vitscale.data.sources import Source, make_mixture, open_sources
from vitscale.data.transforms import AugmentConfig
from vitscale.errors import ConfigError


def source_of(index: Index, folder: Path, **changes: object) -> Source:
    folder.mkdir(exist_ok=True)
    index.save(folder / "index.json")
    (source,) = open_sources(DataConfig(index=str(folder / "index.json"), **changes))  # type: ignore[arg-type]
    return source


def trained_ids(source: Source, steps: int = 0, global_batch: int = 4) -> set[int]:
    """What the first epoch delivers, or so many steps."""
    mixture = make_mixture((source,), DataConfig(lanes=2), seed=1, global_batch=global_batch)
    stream = Stream(
        sources=(source,),
        mixture=mixture,
        view_config=ViewConfig(AugmentConfig(), "simplejpeg", 8, 5),
        lanes=range(2),
        first_step=0,
        last_step=steps or mixture.steps_per_epoch,
    )
    return {sample for batch in batches(stream, 0) for sample in batch.ids.tolist()}


def chosen_ids(source: Source) -> set[int]:
    return set(source.layout.drawn_ids(np.arange(source.layout.num_drawn)).tolist())


def test_a_run_trains_on_the_part_and_on_nothing_else(index: Index, tmp_path: Path) -> None:
    source = source_of(index, tmp_path, fraction=0.4)
    chosen = chosen_ids(source)
    assert 25 < len(chosen) < 55
    trained = trained_ids(source)
    assert trained <= chosen and len(trained) == len(chosen) // 4 * 4
    assert trained_ids(source, steps=60) == chosen  # each epoch loses another tail


def test_a_smaller_part_lies_inside_a_larger_one_of_the_same_seed(index: Index, tmp_path: Path) -> None:
    parts = [
        chosen_ids(source_of(index, tmp_path / f"{fraction}", fraction=fraction))
        for fraction in (0.1, 0.3, 0.9, 1.0)
    ]
    assert parts[0] < parts[1] < parts[2] < parts[3] and len(parts[3]) == 97
    other = chosen_ids(source_of(index, tmp_path / "other", fraction=0.3, fraction_seed=1))
    assert not other <= parts[2] and not parts[1] <= other


def test_the_part_is_of_keys_and_not_of_places(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [40, 37, 20])
    keys = []
    for number, order in enumerate((shards, shards[::-1])):
        index = build_index(order)
        ids = sorted(chosen_ids(source_of(index, tmp_path / str(number), fraction=0.3)))
        keys.append({sample.key for sample in read_samples(index, ids)})
    assert keys[0] == keys[1]


def test_the_part_never_changes(index: Index, tmp_path: Path) -> None:
    """Golden values: a resumed run must find the samples that it began with."""
    ids = chosen_ids(source_of(index, tmp_path, fraction=0.1, fraction_seed=5))
    assert sorted(ids) == [4, 16, 18, 43, 51, 52, 59, 77, 95]


def test_the_validation_split_stays_whole_and_apart(index: Index, tmp_path: Path) -> None:
    whole = source_of(index, tmp_path / "whole", validation_fraction=0.3)
    source = source_of(index, tmp_path / "part", validation_fraction=0.3, fraction=0.5)
    assert source.held_out.tolist() == whole.held_out.tolist()
    chosen = chosen_ids(source)
    assert not chosen & set(source.held_out.tolist()) and 20 < len(chosen) < 48
    prints = {source.fingerprint(), whole.fingerprint(), index.fingerprint()}
    assert len(prints) == 3


def test_the_full_set_is_what_it_was_without_the_key(index: Index, tmp_path: Path) -> None:
    source = source_of(index, tmp_path, fraction=1.0, fraction_seed=3)
    assert source.fingerprint() == index.fingerprint() and len(chosen_ids(source)) == 97


def test_a_plan_without_the_data_counts_the_samples_that_are_trained_on() -> None:
    section = SourceConfig(index="none", num_samples=655_360)
    config = DataConfig(sources=(section,), fraction=1e-4)  # of 65,536 hashes 7, not 6.55
    (source,) = open_sources(config, missing=[section])
    assert source.layout.num_drawn == 70


def test_what_replaces_a_damaged_sample_is_of_the_part(tmp_path: Path) -> None:
    """Of 1% of the set: draws from all of it would miss that part a hundred times in a row."""
    members = []
    for sample in range(2_000):
        image = b"no image" if sample % 2 else jpeg(sample % 50)
        members += [(f"s{sample:05d}.jpg", image), (f"s{sample:05d}.cls", str(sample % 5).encode())]
    index = build_index([str(write_tar(tmp_path / "x.tar", members))])
    source = source_of(index, tmp_path, fraction=0.01)
    chosen = chosen_ids(source)
    assert trained_ids(source, steps=40) <= {sample for sample in chosen if sample % 2 == 0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fraction": 0.0}, "data.fraction 0.0 must lie in"),
        ({"fraction": 1.5}, "data.fraction 1.5 must lie in"),
        ({"fraction": float("nan")}, "data.fraction nan must lie in"),
        ({"fraction_seed": -1}, "data.fraction_seed -1 must not be negative"),
        ({"sources": (SourceConfig(index="a"), SourceConfig(index="b")), "fraction": 0.5}, "is for a single"),
    ],
)
def test_a_part_that_cannot_be_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DataConfig(**changes)  # type: ignore[arg-type]


def test_a_part_without_samples_is_refused(index: Index, tmp_path: Path) -> None:
    source = source_of(index, tmp_path, fraction=0.0001)
    with pytest.raises(ConfigError, match=r"no samples to train on: .* data\.fraction; change that"):
        make_mixture((source,), DataConfig(), seed=1, global_batch=4)
