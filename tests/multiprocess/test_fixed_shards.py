"""A run that ended over damaged samples continues: with a higher limit, or on fixed shards."""

import json
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
from make import jpeg, newest, write_tar
from multiprocess.job import Job
from multiprocess.ranks import KillAll
from multiprocess.zygote import Zygote

from vitscale.checkpoint import store
from vitscale.data.indexing import build_index
from vitscale.data.samples import DEFAULT_KEYS, SampleKeys
from vitscale.metrics.rows import read_metrics

SAMPLES = 64  # in two shards, in chunks of 4: 8 steps of 8 an epoch
BROKEN = range(0, SAMPLES, 8)  # in every second chunk
TEXT = b"a text file"
OPTIONS = ("total_steps=24", "schedule.warmup_steps=1")
OVER = "more than data.max_bad_fraction 0.01 allows"


def write(
    folder: Path,
    broken: Collection[int] = (),
    *,
    image: Callable[[int], bytes] = jpeg,
    counts: tuple[int, ...] = (32, 32),
    keys: SampleKeys = DEFAULT_KEYS,
) -> Path:
    """Shards with text instead of an image in the `broken` samples, and their index."""
    folder.mkdir(exist_ok=True)
    paths, first = [], 0
    for shard, count in enumerate(counts):
        members = []
        for sample in range(first, first + count):
            members += [
                (f"s{sample:03d}.jpg", TEXT if sample in broken else image(sample)),
                (f"s{sample:03d}.cls", str(sample % 5).encode()),
            ]
        first += count
        paths.append(str(write_tar(folder / f"train-{shard}.tar", members)))
    build_index(paths, chunk_samples=4, keys=keys).save(folder / "index.json")
    return folder / "index.json"


@pytest.fixture
def stopped(tmp_path: Path, zygote: Zygote) -> Job:
    """A run that ended with status 2 because an eighth of its samples could not be used."""
    job = Job(tmp_path / "job", write(tmp_path / "shards", BROKEN))
    assert 2 in zygote.train(job, 2, *OPTIONS), job.output()
    assert OVER in job.output()
    return job


def step_of(job: Job) -> int:
    return newest(store.directory_of(job.run_dir)).manifest.step


def test_the_sentence_names_both_ways_out(stopped: Job) -> None:
    assert 5 < step_of(stopped) < 20
    assert "fix the shards, index them again and run the same command" in stopped.mistake()
    assert "raise data.max_bad_fraction" in stopped.mistake()


def test_a_higher_limit_continues_the_run_with_the_same_data(
    tmp_path: Path, stopped: Job, zygote: Zygote
) -> None:
    assert zygote.train(stopped, 1, *OPTIONS, "data.max_bad_fraction=0.2") == [0], stopped.output()
    lenient = Job(tmp_path / "lenient", tmp_path / "shards" / "index.json")
    assert zygote.train(lenient, 2, *OPTIONS, "data.max_bad_fraction=0.2") == [0, 0], lenient.output()
    assert stopped.column("data/digest") == lenient.column("data/digest")


def test_fixed_shards_continue_the_run_and_their_samples_are_delivered_from_then_on(
    tmp_path: Path, stopped: Job, zygote: Zygote
) -> None:
    step = step_of(stopped)
    before = stopped.column("data/digest")
    index = write(tmp_path / "shards")
    assert zygote.train(stopped, 1, *OPTIONS) == [0], stopped.output()
    sound = Job(tmp_path / "sound", index)
    assert zygote.train(sound, 2, *OPTIONS) == [0, 0], sound.output()
    digests, all_sound = stopped.column("data/digest"), sound.column("data/digest")
    assert digests[:step] == before != all_sound[:step]
    assert digests[step:] == all_sound[step:]
    assert stopped.column("data/bad_samples")[-1] == stopped.column("data/bad_samples")[step - 1]


def test_shards_that_are_as_they_were_indexed_again_continue_the_run(tmp_path: Path, zygote: Zygote) -> None:
    job = Job(tmp_path / "job", write(tmp_path / "shards"))
    shard = tmp_path / "shards" / "train-0.tar"
    whole = shard.read_bytes()
    shard.write_bytes(bytes(len(whole)))
    assert zygote.train(job, 1, *OPTIONS) == [2], job.output()
    assert OVER in job.mistake()
    shard.write_bytes(whole)
    assert zygote.train(job, 1, *OPTIONS) == [0], job.output()


def test_a_fixed_part_is_enough_and_the_rest_may_follow(tmp_path: Path, stopped: Job, zygote: Zygote) -> None:
    write(tmp_path / "shards", BROKEN[:2])
    limit = ("data.max_bad_fraction=0.005", "checkpoint.every_steps=0")
    # Killed before it has saved: the checkpoint is still of the shards before the first fix.
    assert zygote.train(stopped, 1, *OPTIONS, *limit, event=KillAll(batch=2)) == [-9], stopped.output()
    write(tmp_path / "shards")
    assert zygote.train(stopped, 1, *OPTIONS) == [0], stopped.output()


def test_samples_that_the_run_itself_found_damaged_may_be_fixed(tmp_path: Path, zygote: Zygote) -> None:
    """Cut JPEGs: the index takes them for images, and only decoding finds out."""

    def cut(sample: int) -> bytes:
        return jpeg(sample)[:200] if sample % 4 == 1 and sample < 32 else jpeg(sample)

    job = Job(tmp_path / "job", write(tmp_path / "shards", image=cut))
    options = (*OPTIONS, "total_steps=60")
    assert zygote.train(job, 1, *options) == [2], job.output()
    rows = [json.loads(line) for line in (job.run_dir / "quarantine.jsonl").read_text().splitlines()]
    found = {int(row["sample"].split("sample number ")[1].split(":")[0]) for row in rows}
    left = sorted({sample for sample in range(32) if sample % 4 == 1} - found)

    def fixed(sample: int) -> bytes:
        return cut(sample) if sample in left else jpeg(sample)

    write(tmp_path / "shards", image=fixed)
    assert zygote.train(job, 1, *options, "data.max_bad_fraction=1") == [0], job.output()


def test_shards_that_a_run_accepted_stay_accepted_though_it_is_killed_before_it_saves(
    tmp_path: Path, zygote: Zygote
) -> None:
    """The resume drops the rows about samples that were found damaged after the checkpoint."""
    broken = set[int]()

    def image(sample: int) -> bytes:
        return jpeg(sample)[:200] if sample in broken else jpeg(sample)

    broken |= set(range(0, SAMPLES, 4))
    job = Job(tmp_path / "job", write(tmp_path / "shards", image=image))
    options = (*OPTIONS, "data.max_bad_fraction=1", "total_steps=8")
    assert zygote.train(job, 1, *options, event=KillAll(batch=6)) == [-9], job.output()
    rows = read_metrics(job.run_dir / "quarantine.jsonl")
    found = {row["sample"].split("sample s")[1][:3] for row in rows if row["data_step"] > step_of(job) == 3}
    assert found, rows
    broken -= set(map(int, found))
    write(tmp_path / "shards", image=image)
    assert zygote.train(job, 1, *options, event=KillAll(batch=1)) == [-9], job.output()
    assert zygote.train(job, 1, *options) == [0], job.output()


def test_other_labels_of_the_same_shards_are_refused(tmp_path: Path, zygote: Zygote) -> None:
    job = Job(tmp_path / "job", write(tmp_path / "shards"))
    assert zygote.train(job, 1, *OPTIONS, "total_steps=2") == [0], job.output()
    options = (*OPTIONS, "total_steps=4")
    write(tmp_path / "shards", keys=SampleKeys(classes={"0": 1, "1": 0}))
    assert zygote.train(job, 1, *options) == [2]
    assert (
        "was trained on other data than the config names now (the index was made with no class"
        in job.mistake()
    )
    write(tmp_path / "shards")
    assert zygote.train(job, 1, *options) == [0], job.output()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image": lambda sample: jpeg(sample + 1000 * (sample == 37))},
            "shards/train-1.tar has changed in samples 36 to 39, none of which was damaged",
        ),
        ({"counts": (32, 31)}, "shards/train-1.tar held 32 samples, now 31"),
        ({"counts": (32, 32, 1)}, "the index held 2 shards, now 3"),
    ],
    ids=["a sound sample", "a sample less", "a shard more"],
)
def test_a_change_of_what_was_not_damaged_is_refused_by_place(
    tmp_path: Path, stopped: Job, zygote: Zygote, change: dict, message: str
) -> None:
    write(tmp_path / "shards", **change)
    assert zygote.train(stopped, 1, *OPTIONS) == [2]
    assert "was trained on other data than the config names now" in stopped.mistake()
    assert message in stopped.mistake()
    write(tmp_path / "shards")
    assert zygote.train(stopped, 1, *OPTIONS) == [0], stopped.output()


def test_a_run_without_a_record_of_its_data_needs_the_very_same_shards(
    tmp_path: Path, stopped: Job, zygote: Zygote
) -> None:
    (stopped.run_dir / "data.npz").unlink()
    write(tmp_path / "shards")
    assert zygote.train(stopped, 1, *OPTIONS) == [2]
    assert "was trained on other data than the config names now" in stopped.mistake()
    write(tmp_path / "shards", BROKEN)
    assert zygote.train(stopped, 1, *OPTIONS, "data.max_bad_fraction=0.2") == [0], stopped.output()
    with np.load(stopped.run_dir / "data.npz", allow_pickle=False) as record:  # it has one from now on
        assert record["fingerprints"].shape == (1, 1)
