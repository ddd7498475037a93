"""Many faults on one run, and nothing of it shows in the result.

The reference is a run with the same damaged samples, the same losses that are not finite and
the same rollback, and without a kill, stop, preemption or full disk.

The rollback comes before the first fault. To where a run is rolled back, and how many skipped
steps it has counted by then, depend on where it was stopped and resumed, so that later it would
not be the same in both runs.
"""

import collections
import json
import os
import random
import re
import subprocess
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from make import verified, write_shards
from multiprocess.ends import read_status
from multiprocess.job import Job
from multiprocess.soak import FILLER, Fault, Start, draw_faults, starts_of
from multiprocess.zygote import Zygote

from vitscale.checkpoint.load import FragmentReader
from vitscale.data.indexing import build_index
from vitscale.metrics.goodput import summary
from vitscale.metrics.rows import read_metrics

SEEDS = (0, 1)
ROLLED_BACK = range(4, 14)  # ten steps in a row, after the healthy checkpoint of step 3
FIRST_STEP, LAST_STEPS = 24, 20  # of a fault, and after the last one
OPTIONS = (
    "engine.zero_stage=2", "optim.ema_decay=0.9", "model.drop_path=0.2", "model.dropout=0.1",
    "augment.mixup=0.2", "data.max_bad_fraction=0.1",
)  # fmt: skip
# Of a row, what depends on time, on data workers or on how often the run was started.
MEASURED = re.compile(r"(time|perf|loader|goodput)/|run/starts")


@pytest.fixture
def damaged_index(tmp_path: Path) -> Path:
    """83 samples: a cut image, and four in a chunk that is no longer what was indexed."""
    shards = write_shards(tmp_path / "shards", [30, 33, 20])
    overwrite(Path(shards[0]), "s00017.jpg")
    path = tmp_path / "shards" / "index.json"
    build_index(shards, chunk_samples=4).save(path)
    overwrite(Path(shards[1]), "s00044.jpg")
    return path


def overwrite(shard: Path, member: str) -> None:
    """Set most of the content of a member of a tar to zero."""
    with tarfile.open(shard) as archive:
        info = archive.getmember(member)
    content = bytearray(shard.read_bytes())
    content[info.offset_data + 100 : info.offset_data + info.size] = bytes(info.size - 100)
    shard.write_bytes(content)


@pytest.fixture
def soaked(tmp_path: Path, damaged_index: Path) -> Iterator[Job]:
    """A run that has a disk of its own, which can be full, where a test may mount one."""
    job = Job(tmp_path / "soaked", damaged_index)
    if os.geteuid() != 0:
        yield job
        return
    job.run_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", job.run_dir], check=True)
    try:
        yield job
    finally:
        subprocess.run(["umount", job.run_dir], check=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_with_many_faults_ends_as_one_without(
    tmp_path: Path,
    soaked: Job,
    damaged_index: Path,
    zygote: Zygote,
    sweep: bool,
    seed: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not sweep and seed:
        pytest.skip("one seed is enough without --sweep")
    rng, num_faults = random.Random(seed), 50 if sweep else 5
    faults = draw_faults(rng, num_faults, FIRST_STEP, freeze=sweep)
    total = faults[-1].step + LAST_STEPS
    # Not among the last steps: a run whose last checkpoint is not healthy ends with status 2.
    steps = rng.sample(range(FIRST_STEP, total - LAST_STEPS // 2), k=3 + num_faults // 5)
    spoiled = {step: rng.randrange(2) for step in steps}
    options = (*OPTIONS, f"total_steps={total}")

    began, whole = time.monotonic(), Job(tmp_path / "whole", damaged_index)
    unharmed = Start(whole.run_dir, (), spoiled, ROLLED_BACK)
    assert zygote.train(whole, 2, *options, event=unharmed) == [0, 0], whole.output()
    starts = starts_of(soaked.run_dir, faults, spoiled, ROLLED_BACK)
    logs = train_through(soaked, starts, options, zygote)
    check_same(soaked, whole, total, len(spoiled))
    check_records(soaked, starts, logs)
    with capsys.disabled():
        print(f"\n{report(soaked, faults, starts, time.monotonic() - began)}")


def train_through(job: Job, starts: Sequence[Start], options: Sequence[str], zygote: Zygote) -> list[str]:
    """Run the same command until the run is done. Returns what each start printed.

    Every fault must have happened, and have had the end that it must have.
    """
    outputs = []
    for number, start in enumerate(starts):
        job.log = job.config.with_name(f"log-{number}")
        statuses = zygote.train(job, 2, *options, *start.overrides, event=start)
        outputs.append(job.output())
        assert start.seen(statuses, job), f"start {number}, {start.faults}: {statuses}\n{outputs[-1]}"
        (job.run_dir / FILLER).unlink(missing_ok=True)
    return outputs


def check_same(soaked: Job, whole: Job, total: int, num_spoiled: int) -> None:
    """The two runs have the same numbers in every step, and the same state at their end."""
    assert soaked.column("step") == list(range(1, total + 1))
    for row, expected in zip(soaked.rows(), whole.rows(), strict=True):
        assert comparable(row) == comparable(expected)
    last = whole.rows()[-1]
    assert last["train/skipped_steps"] == num_spoiled and last["data/bad_samples"] >= 5
    damaged, expected = (read_metrics(job.run_dir / "quarantine.jsonl") for job in (soaked, whole))
    assert damaged == expected
    folders = [job.checkpoints()[total] for job in (soaked, whole)]
    manifest, other = map(verified, folders)
    assert {"fp32", "exp_avg", "exp_avg_sq", "ema"} == set(manifest.slots)
    assert manifest.train.data_step == total + len(ROLLED_BACK)
    for field in ("step", "data_step", "samples_seen", "bad_samples", "rollbacks", "healthy"):
        assert getattr(manifest.train, field) == getattr(other.train, field), field
    assert manifest.counters == other.counters
    reader, expected_reader = FragmentReader(folders[0], manifest), FragmentReader(folders[1], other)
    for slot in manifest.slots:
        for name in manifest.tensors:
            assert torch.equal(reader.whole(name, slot), expected_reader.whole(name, slot)), f"{slot}/{name}"


def comparable(row: dict) -> str:
    """What two rows of the same step have in common; a NaN is equal to another one."""
    return json.dumps({name: value for name, value in row.items() if not MEASURED.match(name)})


def check_records(job: Job, starts: Sequence[Start], logs: Sequence[str]) -> None:
    """What the run directory says about how the run came about."""
    status = read_status(job)
    assert (status["state"], status["step"]) == ("done", job.rows()[-1]["step"])
    assert not job.temporary_saves() and not list(job.run_dir.glob(".*.tmp-*"))
    history = read_metrics(job.run_dir / "history.jsonl")
    assert len(history) == len(starts) + 1, "each start, and the one after the rollback"
    assert [row["rollbacks"] for row in history] == [0] + [1] * len(starts)
    assert not any(": now it differs by " in log for log in logs)
    assert any("was done before, with the same loss" in log for log in logs)
    last = job.rows()[-1]
    assert last["run/starts"] == len(history)
    parts = [last[name] for name in last if name.startswith("goodput/")]
    assert sum(parts) == pytest.approx(1) and min(parts) >= 0


def report(job: Job, faults: Sequence[Fault], starts: Sequence[Start], seconds: float) -> str:
    kinds = collections.Counter(type(fault).__name__ for fault in faults)
    row = job.rows()[-1]
    goodput = summary({name: row[name] for name in row if name.startswith("goodput/")})
    return (
        f"{len(faults)} faults {dict(kinds)}, {row['train/skipped_steps']} steps skipped, "
        f"{row['data/bad_samples']} samples replaced, one rollback: {row['step']} steps in {len(starts)} "
        f"starts, {seconds:.0f} s with the reference; {goodput}"
    )
