"""Mistakes in starting or resuming a run: one sentence, exit status 2, and nothing is lost."""

import shutil
from pathlib import Path

import pytest
from make import jpeg, newest, write_partly_broken, write_tar
from multiprocess import rank_runs
from multiprocess.job import Job
from multiprocess.zygote import Zygote

from vitscale.checkpoint import store
from vitscale.data.indexing import build_index


@pytest.fixture
def finished(tmp_path: Path, uninterrupted: Job, index: Path) -> Job:
    """A copy of the reference run, for the test to damage."""
    job = Job(tmp_path / "copy", index)
    shutil.copytree(uninterrupted.run_dir, job.run_dir)
    config = (job.run_dir / "config.toml").read_text()
    (job.run_dir / "config.toml").write_text(config.replace(str(uninterrupted.run_dir), str(job.run_dir)))
    return job


def sentence(job: Job) -> str:
    """The mistake of the only start that made one."""
    assert job.output().count("\nerror: ") + job.output().startswith("error: ") == 1, job.output()
    return job.mistake()


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def test_a_flipped_byte_sends_the_run_back_to_the_checkpoint_before(
    finished: Job, uninterrupted: Job, zygote: Zygote
) -> None:
    folder = finished.checkpoints()[20]
    flip_byte(folder / "rank-00001.safetensors")
    assert zygote.train(finished, 2) == [0, 0], finished.output()
    assert f"{folder}/rank-00001.safetensors is damaged: its checksum does not match" in finished.output()
    assert "resumed from" in finished.output() and "step-000000018" in finished.output()
    assert finished.column("train/loss") == uninterrupted.column("train/loss")
    assert newest(store.directory_of(finished.run_dir)).folder == str(folder)


def test_a_run_with_no_good_checkpoint_left_is_not_started_afresh(finished: Job, zygote: Zygote) -> None:
    for folder in finished.checkpoints().values():
        flip_byte(folder / "manifest.json")
    before = (finished.run_dir / "metrics.jsonl").read_bytes()
    assert zygote.train(finished, 1) == [2]
    assert "no checkpoint in" in sentence(finished) and "manifest.json is damaged" in sentence(finished)
    assert (finished.run_dir / "metrics.jsonl").read_bytes() == before


def test_another_experiment_in_the_run_directory_is_refused_with_the_keys(
    finished: Job, zygote: Zygote
) -> None:
    before = (finished.run_dir / "config.toml").read_bytes()
    assert zygote.train(finished, 1, "optim.lr=1e-4", "model.depth=1") == [2]
    assert "model.depth was 2, now 1, optim.lr was 0.005, now 0.0001" in sentence(finished)
    assert (finished.run_dir / "config.toml").read_bytes() == before


def test_a_checkpoint_of_another_experiment_is_not_resumed_where_the_config_is_gone(
    finished: Job, zygote: Zygote
) -> None:
    (finished.run_dir / "config.toml").unlink()
    assert zygote.train(finished, 1, "optim.lr=0.1", "total_steps=22") == [2]
    assert "step-000000020 holds another experiment: optim.lr was 0.005, now 0.1" in sentence(finished)
    assert zygote.train(finished, 1, "total_steps=22") == [0], finished.output()


def test_other_data_behind_the_same_path_are_refused(
    tmp_path: Path, finished: Job, index: Path, zygote: Zygote
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(index.parent, folder)
    text = finished.config.read_text().replace(str(index), str(folder / "index.json"))
    finished.config.write_text(text)
    config = finished.run_dir / "config.toml"
    config.write_text(config.read_text().replace(str(index), str(folder / "index.json")))
    assert zygote.train(finished, 1) == [0], finished.output()  # the same shards elsewhere are the same data
    (folder / "train-000002.tar").unlink()
    build_index(sorted(map(str, folder.glob("train-*.tar"))), chunk_samples=4).save(folder / "index.json")
    assert zygote.train(finished, 1, "total_steps=24") == [2]
    assert "was trained on other data than" in sentence(finished)


def test_too_many_bad_samples_end_the_run_with_a_count_and_a_checkpoint(
    tmp_path: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path / "job", write_partly_broken(tmp_path))
    assert 2 in zygote.train(job, 2), job.output()
    assert "more than data.max_bad_fraction 0.01 allows" in sentence(job)
    assert job.column("data/bad_samples")[-1] > 10
    assert newest(store.directory_of(job.run_dir))
    assert (job.run_dir / "quarantine.jsonl").read_text().count("not a JPEG, PNG or WebP") >= 10
    assert zygote.train(job, 1, "total_steps=30", "checkpoint.every_steps=0") == [2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optim.wieght_decay=0.1",
            "unknown key optim.wieght_decay in [optim]; did you mean optim.weight_decay?",
        ),
        (
            "engine.micro_batch=3",
            "global_batch 8 is not a multiple of engine.micro_batch 3 x world_size 1 = 3; use",
        ),
        ("model.num_classes=4", "holds label 4, out of range for model.num_classes 4"),
        ("data.index=nowhere/index.json", "index nowhere/index.json is missing"),
        ("total_steps=0", "set exactly one of total_steps, total_epochs, total_samples"),
        ("schedule.warmup_steps=20", "schedule.warmup_steps 20 must be below the run's 20 steps"),
        (
            "schedule={decay='wsd', warmup_steps=8, cooldown_steps=13}",
            "a warmup of 8 steps and schedule.cooldown_steps 13 do not fit into the run's 20 steps",
        ),
        ("init.checkpoint=nowhere", "nowhere is not a checkpoint"),
    ],
)
def test_a_config_that_cannot_run_says_what_to_write(
    tmp_path: Path, index: Path, override: str, message: str, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 1, override) == [2]
    assert message in sentence(job)


def test_a_mistake_at_the_first_start_may_be_fixed(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 1, "init.checkpoint=nowhere") == [2]
    assert "nowhere is not a checkpoint" in sentence(job)
    assert zygote.train(job, 1, "total_steps=6") == [0], job.output()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("classify RUN --data none-*.tar", "no file matches 'none-*.tar'"),
        ("classify away --data OTHER", "away"),
        ("classify RUN --data OTHER", "class 7 does not exist in a model of 5 classes"),
        ("fewshot RUN --train TRAIN --test OTHER --shots 1", "class 7 does not occur"),
        ("fewshot RUN --train OTHER --test OTHER --shots 9", "needs 9 training examples of every class"),
    ],
)
def test_a_mistake_in_an_evaluation_is_told_once(
    tmp_path: Path, uninterrupted: Job, index: Path, zygote: Zygote, command: str, expected: str
) -> None:
    other, train = tmp_path / "other.tar", index.with_name("train-000000.tar")
    members = [(f"{n}.{kind}", data) for n in range(9) for kind, data in (("jpg", jpeg(n)), ("cls", b"7"))]
    write_tar(other, [*members[:16], ("8.jpg", jpeg(8)), ("8.cls", b"1")])
    job = Job(tmp_path / "job", index)
    names = {"RUN": uninterrupted.run_dir, "OTHER": other, "TRAIN": train}
    argv = [str(names.get(word, word)) for word in command.split()]
    assert 2 in zygote.run(2, rank_runs.evaluate, argv, log=job.log)
    assert expected in sentence(job), job.output()
