"""Checkpoints in a real object store: runs save there, are killed in it and resume from it."""

import dataclasses
from pathlib import Path

import pytest
from data.servers import faulty_proxy, s3_environment, s3_server, use_s3
from make import state_of, write_step
from multiprocess.job import Job
from multiprocess.rank_runs import train_apart
from multiprocess.ranks import FewAttempts, Kill, Stop
from multiprocess.zygote import Zygote

from vitscale.checkpoint import store
from vitscale.checkpoint.manifest import MANIFEST, Manifest
from vitscale.checkpoint.store import CheckpointConfig
from vitscale.checkpoint.verify import open_directory
from vitscale.cluster import restarts
from vitscale.errors import CheckpointError
from vitscale.guard import ending
from vitscale.stores import storage
from vitscale.weights.saved import load_model


@pytest.fixture
def bucket(tmp_path: Path):
    """The folder behind a bucket, and the port of its server."""
    folder = tmp_path / "buckets" / "runs"
    folder.mkdir(parents=True)
    with s3_server(folder.parent, written=True) as port:
        yield folder, port


def test_a_run_is_killed_and_resumed_from_the_store(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job, bucket, monkeypatch
) -> None:
    """Each start has a new run directory, as on another node; a fifth of the requests fails."""
    folder, port = bucket
    options = ["checkpoint.store=s3://runs/a", "checkpoint.every_steps=2"]
    with faulty_proxy(port, "reset", 0.2) as proxy:
        environment = s3_environment(proxy)
        for node, effect in enumerate((3, 60, 56)):
            job, kill = Job(tmp_path / f"node-{node}", index), Kill(rank=node % 2, save=1, effect=effect)
            statuses = zygote.train(job, 2, *options, event=kill, environment=environment)
            assert statuses[kill.rank] == -9, job.output()
            assert steps_in(folder, "a"), job.output()
        job = Job(tmp_path / "last", index)
        assert zygote.train(job, 1, *options, environment=environment) == [0], job.output()
    num_rows = len(job.rows())
    assert 0 < num_rows < 20, "the run started from scratch"
    expected = uninterrupted.column("train/loss")[-num_rows:]
    assert job.column("train/loss") == pytest.approx(expected, abs=1e-6)
    assert job.column("data/digest") == uninterrupted.column("data/digest")[-num_rows:]

    assert steps_in(folder, "a") == [18, 20], "retention, and the remains of killed saves"
    assert (folder / "a/checkpoints/latest").read_text() == "step-000000020\n"
    names = sorted(path.name for path in (folder / "a/checkpoints/step-000000020").iterdir())
    assert len(names) == 2 and MANIFEST in names
    assert not any((job.run_dir / "checkpoints").iterdir()), "the staging directory was not emptied"

    use_s3(monkeypatch, port)
    assert open_directory("s3://runs/a").manifest.step == 20
    load_model("s3://runs/a")


def test_two_jobs_that_save_one_step_leave_a_whole_checkpoint(tmp_path: Path, bucket, monkeypatch) -> None:
    """As when a job that was told to end still uploads while its successor trains."""
    use_s3(monkeypatch, bucket[1])
    home = store.Home(tmp_path / "node", "s3://runs/h")

    def uploaded(step: int, token: str) -> Manifest:
        written = write_step(tmp_path / f"{step}-{token}", step, state_of(step))
        manifest = Manifest.load(written)
        files = {f"{token}-{name}": info for name, info in manifest.files.items()}
        for name in manifest.files:
            storage.upload(written / name, f"{store.step_folder(home.store, step)}/{token}-{name}")
        return dataclasses.replace(manifest, files=files)

    def published(manifest: Manifest) -> list[str]:
        """What a store holds of its step, and of the earlier one, after it was saved."""
        store.publish(manifest, home.store)
        assert open_directory(store.step_folder(home.store, manifest.step)).manifest == manifest
        store.apply_retention(home, CheckpointConfig(), (), lambda _: True)
        return [name for step in (4, 5) for name in storage.names_in(store.step_folder(home.store, step))]

    late, old, new = uploaded(4, "late"), uploaded(5, "old"), uploaded(5, "new")
    for manifest in (new, old):
        assert published(manifest) == [*late.files, MANIFEST, *new.files, *old.files]
    monkeypatch.setattr(store, "ABANDONED_SECONDS", -60.0)
    assert published(old) == [MANIFEST, *old.files]
    with pytest.raises(CheckpointError, match=r"/new-rank-00000.* another job saves to checkpoint.store"):
        store.publish(new, home.store)


def test_a_store_that_cannot_be_written_is_refused_before_the_first_step(
    tmp_path: Path, index: Path, zygote: Zygote, bucket
) -> None:
    job, environment = Job(tmp_path / "one", index), s3_environment(bucket[1])
    statuses = zygote.train(job, 2, "checkpoint.store=s3://no-such-bucket/a", environment=environment)
    assert statuses == [2, 2], job.output()
    assert "error: checkpoint.store s3://no-such-bucket/a/checkpoints cannot be written: " in job.output()
    assert job.output().count("error: ") == 1 and not job.rows(), job.output()


def test_a_store_that_is_down_for_a_time_ends_a_start_but_not_the_run(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job, bucket
) -> None:
    job, option = Job(tmp_path / "one", index), "checkpoint.store=s3://runs/g"
    up, down = s3_environment(bucket[1]), s3_environment(9)  # where nothing listens
    assert zygote.train(job, 2, option, event=Stop(), environment=up) == [75, 75], job.output()
    assert zygote.train(job, 2, option, event=FewAttempts(), environment=down) == [1, 1], job.output()
    status = ending.read(job.run_dir)
    assert status and status["reason"].startswith("listing s3://runs/g/checkpoints failed 2 times"), status
    assert restarts.decide(status, 1, num_vain=1, max_vain=5).kind == "again"
    assert zygote.train(job, 2, option, environment=up) == [0, 0], job.output()
    assert job.column("train/loss") == uninterrupted.column("train/loss")


def test_a_damaged_checkpoint_in_the_store_is_passed_over(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job, bucket
) -> None:
    folder, port = bucket
    job, environment = Job(tmp_path / "one", index), s3_environment(port)
    options = ["checkpoint.store=s3://runs/b", "checkpoint.every_steps=2", "checkpoint.keep_last=3"]
    statuses = zygote.train(job, 2, *options, event=Stop(), environment=environment)
    assert statuses == [75, 75], job.output()
    newest = store.step_name(steps_in(folder, "b")[-1])
    (file, _) = sorted((folder / f"b/checkpoints/{newest}").glob("rank-*"))
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    assert zygote.train(job, 2, *options, environment=environment) == [0, 0], job.output()
    assert f"checkpoint passed over: s3://runs/b/checkpoints/{newest}/rank-" in job.output()
    assert job.column("train/loss") == uninterrupted.column("train/loss")


def test_another_store_does_not_make_a_run_start_from_scratch(
    tmp_path: Path, index: Path, zygote: Zygote, bucket
) -> None:
    job, environment = Job(tmp_path / "one", index), s3_environment(bucket[1])
    first, longer = ("checkpoint.store=s3://runs/d", "total_steps=6"), "total_steps=8"
    assert zygote.train(job, 1, *first, environment=environment) == [0], job.output()
    for other in ("", "s3://runs/e"):
        statuses = zygote.train(job, 1, f"checkpoint.store={other}", longer, environment=environment)
        assert statuses == [2], job.output()
    assert "has its newest checkpoint at s3://runs/d/checkpoints/step-000000006, where" in job.output()
    assert job.column("step") == list(range(1, 7))
    assert zygote.train(job, 1, first[0], longer, environment=environment) == [0], job.output()
    assert job.column("step") == list(range(1, 9))
    elsewhere = Job(tmp_path / "two", index)  # another experiment that was given the same store
    statuses = zygote.train(elsewhere, 1, first[0], longer, "optim.lr=0.1", environment=environment)
    assert statuses == [2], elsewhere.output()
    assert "holds another experiment: optim.lr was 0.005, now 0.1" in elsewhere.output()


def test_nodes_that_share_no_disk_save_to_the_store_and_continue_from_it(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job, bucket, monkeypatch
) -> None:
    folder, port = bucket
    job = Job(tmp_path / "one", index)
    options = ["checkpoint.store=s3://runs/f", "checkpoint.keep_last=3"]

    def train_on(nodes: Path) -> list[int]:
        environment = s3_environment(port)
        return zygote.run(2, train_apart, job.config, nodes, options, log=job.log, environment=environment)

    assert train_on(tmp_path / "node") == [0, 0], job.output()
    assert steps_in(folder, "f") == [15, 18, 20]
    use_s3(monkeypatch, port)
    for step in (18, 20):
        storage.delete(f"s3://runs/f/checkpoints/{store.step_name(step)}/{MANIFEST}")
    assert train_on(tmp_path / "new") == [0, 0], job.output()
    job.run_dir = tmp_path / "new-0"
    assert job.column("train/loss") == uninterrupted.column("train/loss")[15:]


def test_a_store_that_refuses_ends_the_run_with_a_sentence(
    tmp_path: Path, index: Path, zygote: Zygote, bucket
) -> None:
    job = Job(tmp_path / "one", index)
    environment = {**s3_environment(bucket[1]), "AWS_SECRET_ACCESS_KEY": "wrong"}
    statuses = zygote.train(job, 2, "checkpoint.store=s3://runs/c", environment=environment)
    assert statuses == [2, 2], job.output()
    assert "access is denied" in job.output() and "Traceback" not in job.output()


def steps_in(bucket: Path, run: str) -> list[int]:
    """The steps of a run's committed checkpoints in a bucket's folder, rising."""
    manifests = bucket.glob(f"{run}/checkpoints/step-*/{MANIFEST}")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in manifests)
