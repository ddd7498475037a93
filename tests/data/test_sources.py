"""[data]: indexes with their label maps and exclusions, and what is refused of them."""

import dataclasses
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from make import write_index

from vitscale.data.data_config import DataConfig, SourceConfig
from vitscale.data.id_set import IdSet
from vitscale.data.index import Index, planned_index
from vitscale.data.sources import Source, check_labels, open_sources, warn_of_classes
from vitscale.errors import ConfigError, DataError, StoreError


def test_labels_that_the_model_has_no_place_for_are_refused(index: Index) -> None:
    sources = (Source(name="0", index=index, label_map={}, excluded=np.empty(0, dtype=np.int64)),)
    check_labels(sources, DataConfig(index="index.json"), 5)
    sentence = r"label 4, out of range for model.num_classes 4 .* set model.num_classes = 5"
    with pytest.raises(ConfigError, match=sentence):
        check_labels(sources, DataConfig(index="index.json"), 4)


@pytest.fixture
def index_path(index: Index) -> str:
    return str(Path(index.shards[0].url).parent / "index.json")


def test_sources_are_opened_with_their_label_maps(index_path: str, tmp_path: Path) -> None:
    (tmp_path / "dict.json").write_text('{"0": 7, "1": 8, "2": 9, "3": 10, "4": 11}')
    (tmp_path / "list.json").write_text("[1, 2, 3, 4, 5]")
    maps = ("", f"{tmp_path}/dict.json", f"{tmp_path}/list.json")
    config = DataConfig(sources=tuple(SourceConfig(index=index_path, label_map=path) for path in maps))
    sources = open_sources(config)
    assert [source.max_label for source in sources] == [4, 11, 5]
    check_labels(sources, config, 12)
    sentence = r"holds label 11 \(from 4\), out of range for model.num_classes 11"
    with pytest.raises(ConfigError, match=sentence):
        check_labels(sources, config, 11)


@pytest.mark.parametrize(
    ("ours", "theirs", "label_map", "words"),
    [
        (["ant", "cat"], ["cat", "dog"], "", "'cat' is class 1 in {0} and class 0 in {1}"),
        (["ant", "cat"], ["cat", "dog"], "[1, 2, 3, 4, 5]", ""),
        (["ant", "cat"], ["ant", "cat"], "[1, 2, 3, 4, 5]", "'ant' is class 0 in {0} and class 1 in {1}"),
        (["tench", "eel", "ray"], ["Tinca tinca", "ray", "eel"], "", "'eel' is class 1 in {0} and"),
        (["tench", "ray"], ["tench, Tinca tinca", "ray"], "", ""),
        (["ant", "cat"], ["cat"], "", "'cat' is class 1 in {0} and class 0 in {1}"),
        (["ant", "cat"], [], "", ""),
    ],
)  # fmt: skip
def test_sources_that_number_the_same_classes_differently_are_named(
    tmp_path: Path, caplog, ours: list[str], theirs: list[str], label_map: str, words: str
) -> None:
    paths = []
    for name, classes in (("a", ours), ("b", theirs)):
        paths.append(str(write_index(tmp_path / name, [5])))
        (tmp_path / name / "classes.json").write_text(json.dumps(classes))
    (tmp_path / "map.json").write_text(label_map)
    first, second = SourceConfig(index=paths[0]), SourceConfig(index=paths[1])
    if label_map:
        second = dataclasses.replace(second, label_map=f"{tmp_path}/map.json")
    config = DataConfig(sources=(first, second))
    warn_of_classes(open_sources(config), config)
    assert len(caplog.records) == bool(words) and words.format(*paths) in caplog.text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[0, 1, 2]", "has no entry for label 3"),
        ("nonsense", "is not a label map; it must be JSON"),
        ("5", "is not a label map; it must be JSON"),
        ("[" * 100_000, "is not a label map; it must be JSON"),
        ('{"0": "cat"}', "maps to 'cat'; labels are whole numbers from 0"),
        ("[0, 1, 2, 3, -1]", "maps to -1; labels are whole numbers from 0"),
        ("[0, 1, 2, 3, 1.5]", "maps to 1.5; labels are whole numbers from 0"),
    ],
    ids=range(7),
)
def test_a_label_map_that_does_not_fit_is_refused(
    index_path: str, tmp_path: Path, content: str, sentence: str
) -> None:
    (tmp_path / "map.json").write_text(content)
    config = DataConfig(index=index_path, label_map=f"{tmp_path}/map.json")
    with pytest.raises(DataError, match=sentence):
        open_sources(config)


def test_a_label_map_that_is_missing_or_a_folder_is_refused(index_path: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json does not exist"):
        open_sources(DataConfig(index=index_path, label_map=f"{tmp_path}/none.json"))
    with pytest.raises(StoreError, match="cannot be read: Is a directory; name a JSON file"):
        open_sources(DataConfig(index=index_path, label_map=str(tmp_path)))


def test_an_index_that_is_a_folder_is_refused(index_path: str) -> None:
    with pytest.raises(StoreError, match=r"cannot be read: Is a directory; name an index\.json"):
        open_sources(DataConfig(index=str(Path(index_path).parent)))


def test_a_list_that_leaves_out_more_than_half_is_refused(
    index: Index, index_path: str, tmp_path: Path
) -> None:
    exclusions = {"format": "vitscale-exclude", "version": 1, "index_fingerprint": index.fingerprint()}
    for count in (48, 49):
        (tmp_path / f"{count}.json").write_text(json.dumps({**exclusions, "ids": list(range(count))}))
    (source,) = open_sources(DataConfig(index=index_path, exclude=f"{tmp_path}/48.json"))
    assert source.excluded.tolist() == list(range(48))
    with pytest.raises(DataError, match="leaves out 49 of 97 samples, more than half"):
        open_sources(DataConfig(index=index_path, exclude=f"{tmp_path}/49.json"))


def test_a_config_with_two_kinds_of_sources_is_refused(index_path: str) -> None:
    with pytest.raises(ConfigError, match="write them into each of the sources"):
        DataConfig(index=index_path, sources=(SourceConfig(index=index_path),))


def test_sources_must_have_different_names(index_path: str) -> None:
    first, second = SourceConfig(index=index_path, name="a"), SourceConfig(index=index_path, name="b")
    assert [source.name for source in open_sources(DataConfig(sources=(first, second)))] == ["a", "b"]
    with pytest.raises(ConfigError, match="sources have the names a, a; give each a different name"):
        open_sources(DataConfig(sources=(first, first)))


@pytest.mark.parametrize(
    ("accepted", "refused", "sentence"),
    [
        ({"lanes": 0}, {"lanes": -1}, "data.lanes -1 must be 0 or more"),
        ({"window_chunks": 1}, {"window_chunks": 0}, "data.window_chunks 0 must be 1 or more"),
        ({"max_bad_fraction": 1.0}, {"max_bad_fraction": 1.1}, "data.max_bad_fraction 1.1 must lie in"),
    ],
)
def test_a_data_config_out_of_bounds_is_refused(accepted: dict, refused: dict, sentence: str) -> None:
    DataConfig(**accepted)
    with pytest.raises(ConfigError, match=sentence):
        DataConfig(**refused)


def test_every_change_of_what_samples_are_changes_the_fingerprint(index: Index) -> None:
    source = Source(name="0", index=index, label_map={}, excluded=np.empty(0, dtype=np.int64))
    sources = [
        source,
        dataclasses.replace(source, label_map={0: 1}),
        dataclasses.replace(source, excluded=np.array([3])),
    ]
    assert len({source.fingerprint() for source in sources}) == 3


def test_a_source_holds_sets_only_of_what_is_left_out() -> None:
    """A bit and its counts for each sample are 76 MB of a rank's memory for JFT-300M."""
    num_samples, nothing = 2_000_000, np.empty(0, dtype=np.int64)
    not_chosen = IdSet.of(np.array([5]), num_samples)
    left_out = [
        ({}, []),
        ({"held_out": np.array([3, 5])}, [3, 5]),
        ({"not_chosen": not_chosen}, [5]),
        ({"held_out": np.array([3]), "not_chosen": not_chosen}, [3, 5]),
    ]
    peaks = []
    for changes, ids in left_out:
        source = Source(name="0", index=planned_index(num_samples), label_map={}, excluded=nothing, **changes)
        tracemalloc.start()
        assert source.layout.num_drawn == num_samples - len(ids)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert [i for i in (0, 3, 5, num_samples - 1) if not source.is_trained_on(i)] == ids
    assert peaks[0] < num_samples / 64 > peaks[2] and peaks[1] > num_samples
