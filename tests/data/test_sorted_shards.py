"""Shards that are sorted by class are noticed, and the command that is named shuffles them."""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.make import jpeg, write_tar
from tools.data import main
from vitscale.curate.stats import doubts
from vitscale.data.index import Index
from vitscale.data.indexing import build_index
from vitscale.data.neighbours import compare
from vitscale.stores import storage

RANDOM = np.random.default_rng(0)
SORTED = [(number // 20,) for number in range(200)]
SHUFFLED = [SORTED[number] for number in RANDOM.permutation(200)]


def write(folder: Path, labels: Sequence[tuple[int, ...]], num_shards: int = 4) -> str:
    """Shards with these labels in order; their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, numbers in enumerate(np.array_split(np.arange(len(labels)), num_shards)):
        members = [
            (f"s{n:04d}.{kind}", data)
            for n in numbers.tolist()
            for kind, data in (("jpg", jpeg(n)), ("cls", " ".join(map(str, labels[n])).encode()))
        ]
        write_tar(folder / f"train-{shard}.tar", members)
    return str(folder / "train-*.tar")


def indexed(folder: Path, labels: Sequence[tuple[int, ...]], num_shards: int = 4) -> Index:
    return build_index(storage.expand(write(folder, labels, num_shards)))


def test_shards_sorted_by_class_are_noticed(tmp_path: Path) -> None:
    alike = indexed(tmp_path, SORTED).neighbours
    # 4 shards of 50 samples: 196 pairs, of which 8 cross from one class to the next.
    assert (alike.pairs, alike.mean) == (196, 188 / 196)
    assert alike.chance == pytest.approx(19 / 199) and alike.is_clustered
    assert alike.describe().startswith("the shards are sorted by class (neighbours have 0.96 labels in ")


def test_shards_in_random_order_are_not(tmp_path: Path) -> None:
    alike = indexed(tmp_path, SHUFFLED).neighbours
    assert alike.pairs == 196 and abs(alike.degree) < 0.1 and not alike.is_clustered


def test_shards_of_a_few_classes_each_are_clustered(tmp_path: Path) -> None:
    """In random order within a shard, but only two or three of the classes are in each."""
    labels = [SORTED[50 * shard + number] for shard in range(4) for number in RANDOM.permutation(50)]
    alike = indexed(tmp_path, labels).neighbours
    assert alike.is_clustered and alike.describe().startswith("the shards are clustered by class")


def test_several_labels_a_sample_are_compared_as_sets(tmp_path: Path) -> None:
    """Half of all samples also have the label 99: alone, that says nothing of the order."""
    several = [(*labels, 99) if number % 2 else labels for number, labels in enumerate(SHUFFLED)]
    order = RANDOM.permutation(200)
    shuffled = indexed(tmp_path / "a", [several[number] for number in order]).neighbours
    in_order = indexed(tmp_path / "b", sorted(several)).neighbours
    assert not shuffled.is_clustered and in_order.is_clustered
    assert shuffled.chance == in_order.chance == pytest.approx(19 / 199 + 100 * 99 / (200 * 199))


@pytest.mark.parametrize(
    "labels",
    [
        [(0,)],
        [(0,), (0,)],
        [(0,), (1,)],
        [(0,), (0,), (1,), (1,)],
        [(0,)] * 60,  # one class cannot be sorted
        [(number,) for number in range(60)],  # nor can classes of one sample
        [(0,)] * 59 + [(1,)],
    ],
)
def test_tiny_and_trivial_sets_are_not_called_sorted(tmp_path: Path, labels: list[tuple[int, ...]]) -> None:
    assert not indexed(tmp_path, labels, 1).neighbours.is_clustered


def test_random_orders_are_hardly_ever_called_sorted() -> None:
    """2,000 shuffled sets of 5 to 300 samples, of 2 to 50 classes of unequal size."""
    called = 0
    for seed in range(2000):
        random = np.random.default_rng(seed)
        num_samples, num_classes = int(random.integers(5, 300)), int(random.integers(2, 50))
        labels = random.geometric(3 / num_classes if num_classes > 3 else 0.5, num_samples)
        counts = dict(enumerate(np.bincount(labels).tolist()))
        shared = int((labels[1:] == labels[:-1]).sum())
        called += compare(num_samples - 1, shared, counts, num_samples, 1).is_clustered
    assert called <= 2


def test_samples_without_labels_do_not_count(tmp_path: Path) -> None:
    members = []
    for number, (label,) in enumerate(SORTED):
        members.append((f"s{number}.jpg", jpeg(number)))
        if number % 3:
            members.append((f"s{number}.cls", str(label).encode()))
    index = build_index([str(write_tar(tmp_path / "x.tar", members))])
    assert index.num_damaged == 67 and index.neighbours.pairs == 132 and index.neighbours.is_clustered


def test_an_index_of_before_says_nothing(tmp_path: Path) -> None:
    pattern = write(tmp_path, SORTED)
    main(["index", pattern, "--workers", "0"])
    path = tmp_path / "index.json"
    values = json.loads(path.read_text())
    del values["num_neighbours"], values["shared_labels"], values["checksum"]
    path.write_text(json.dumps(values))
    index = Index.load(str(path))
    assert index.neighbours.pairs == 0 and not index.neighbours.is_clustered
    assert index.fingerprint() == build_index(storage.expand(pattern)).fingerprint()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_command_that_is_named_shuffles_the_shards(tmp_path: Path, capsys, workers: int) -> None:
    folder = tmp_path / "with space"
    assert main(["index", write(folder, SORTED), "--workers", str(workers)]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("check: ")]
    for command in ("stats", "verify"):
        assert main([command, str(folder / "index.json")]) == 0
        assert line in capsys.readouterr().err
    words = shlex.split(line.partition("in random order: ")[2])
    assert words[:3] == ["python", "tools/data.py", "pack"]
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=True)
    assert "check: " not in done.stderr
    before, after = Index.load(str(folder / "index.json")), Index.load(f"{folder}/shuffled/index.json")
    assert after.label_counts == before.label_counts and not after.neighbours.is_clustered
    assert main(["stats", f"{folder}/shuffled/index.json"]) == 0
    assert "in neighbours      0." in capsys.readouterr().out


def test_an_index_says_how_its_shards_are_packed_again(tmp_path: Path) -> None:
    """The labels are read as they were when the index was made."""
    members = [
        (f"s{number}.{kind}", data)
        for number in range(8)
        for kind, data in (("jpg", jpeg(number)), ("json", json.dumps({"kind": number % 2}).encode()))
    ]
    write_tar(tmp_path / "train-0.tar", members)
    write_tar(tmp_path / "test-0.tar", members[:2])  # not in the index
    pattern = str(tmp_path / "train-*.tar")
    assert main(["index", pattern, "--label-key", "kind", "--workers", "0"]) == 0
    assert main(["pack", str(tmp_path / "index.json"), f"{tmp_path}/new", "--format", "shards"]) == 0
    assert Index.load(f"{tmp_path}/new/index.json").label_counts == {0: 4, 1: 4}
    assert not (tmp_path / "new" / "test.index.json").exists()


def test_remote_shards_have_to_be_copied_first(tmp_path: Path, capsys) -> None:
    assert main(["index", write(tmp_path, SORTED), "--workers", "0"]) == 0
    path = tmp_path / "index.json"
    values = json.loads(path.read_text())
    for shard in values["shards"]:
        shard["url"] = f"s3://bucket/{shard['url']}"
    path.write_text(json.dumps(values))
    (sentence,) = doubts(Index.load(str(path)), path)
    assert "copy them to a disk, index them there" in sentence
    assert "pack INDEX OUT --format shards" in sentence
