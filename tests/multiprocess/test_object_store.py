"""Checkpoints in a real object store: saved there, killed there, resumed from there, and no more kept than
asked.
"""

from pathlib import Path

import pytest
from data.servers import faulty_proxy, s3_environment, s3_server, use_s3
from multiprocess.job import Job
from multiprocess.zygote import Zygote

from vitscale import storage
from vitscale.checkpoint import store
from vitscale.checkpoint.format import MANIFEST
from vitscale.evaluate import load_model

TRAIN, KILL = "multiprocess.ranks:train", "multiprocess.ranks:train_until_killed"


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
    """The run directory is emptied in between, as on other nodes; a fifth of the answers is cut off."""
    folder, port = bucket
    options = ["checkpoint.store=s3://runs/a", "checkpoint.every_steps=2"]
    with faulty_proxy(port, "reset", 0.2) as proxy:
        for attempt, effect in enumerate((3, 60, 56)):
            job = Job(tmp_path / f"node-{attempt}", index)
            arguments = [job.config, attempt % 2, 1, effect, *options]
            log = tmp_path / f"node-{attempt}" / "rank-0.log"
            statuses = zygote.run(2, KILL, *arguments, log=log, environment=s3_environment(proxy))
            assert -9 in statuses, job.output()
            assert steps(folder), job.output()
        job = Job(tmp_path / "last", index)
        log = tmp_path / "last" / "rank-0.log"
        arguments = [job.config, *options]
        assert zygote.run(1, TRAIN, *arguments, log=log, environment=s3_environment(proxy)) == [0], (
            job.output()
        )
    expected = uninterrupted.column("train/loss")
    assert job.column("train/loss") == pytest.approx(expected[-len(job.rows()) :], abs=1e-6)
    assert job.column("data/digest") == uninterrupted.column("data/digest")[-len(job.rows()) :]
    assert 0 < len(job.rows()) < 20, "the run began anew"

    assert steps(folder) == [18, 20], "retention, and the remains of killed saves"
    assert (folder / "a/checkpoints/latest").read_text() == "step-000000020\n"
    names = sorted(path.name for path in (folder / "a/checkpoints/step-000000020").iterdir())
    assert len(names) == 2 and MANIFEST in names
    assert not any((job.run_dir / "checkpoints").iterdir()), "the staging directory was not emptied"

    use_s3(monkeypatch, port)
    assert store.newest_good("s3://runs/a/checkpoints")[1].step == 20
    load_model("s3://runs/a")


def test_a_damaged_checkpoint_in_the_store_is_passed_over(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job, bucket
) -> None:
    folder, port = bucket
    job = Job(tmp_path / "one", index)
    options = ["checkpoint.store=s3://runs/b", "checkpoint.every_steps=2", "checkpoint.keep_last=3"]
    run = {"log": tmp_path / "one" / "rank-0.log", "environment": s3_environment(port)}
    little = "multiprocess.ranks:train_a_little"
    assert zygote.run(2, little, job.config, *options, **run) == [75, 75], job.output()
    newest = max(steps(folder, "b"))
    (file, _) = sorted((folder / f"b/checkpoints/{store.step_name(newest)}").glob("rank-*"))
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    assert zygote.run(2, TRAIN, job.config, *options, **run) == [0, 0], job.output()
    assert f"checkpoint passed over: s3://runs/b/checkpoints/{store.step_name(newest)}/rank-" in job.output()
    assert job.column("train/loss") == uninterrupted.column("train/loss")


def test_another_store_does_not_make_a_run_begin_anew(
    tmp_path: Path, index: Path, zygote: Zygote, bucket
) -> None:
    job = Job(tmp_path / "one", index)
    run = {"log": tmp_path / "one" / "rank-0.log", "environment": s3_environment(bucket[1])}
    assert zygote.run(1, TRAIN, job.config, "checkpoint.store=s3://runs/d", "total_steps=6", **run) == [0]
    for other in ("", "s3://runs/e"):
        arguments = [job.config, f"checkpoint.store={other}", "total_steps=8"]
        assert zygote.run(1, TRAIN, *arguments, **run) == [2], job.output()
    assert "has its newest checkpoint at s3://runs/d/checkpoints/step-000000006, where" in job.output()
    assert job.column("step") == list(range(1, 7))
    arguments[1] = "checkpoint.store=s3://runs/d"
    assert zygote.run(1, TRAIN, *arguments, **run) == [0], job.output()
    assert job.column("step") == list(range(1, 9))
    elsewhere = Job(tmp_path / "two", index)  # another experiment that was given the same store
    run["log"] = tmp_path / "two" / "rank-0.log"
    arguments = [elsewhere.config, "checkpoint.store=s3://runs/d", "optim.lr=0.1", "total_steps=8"]
    assert zygote.run(1, TRAIN, *arguments, **run) == [2], elsewhere.output()
    assert "holds another experiment: optim.lr was 0.005, now 0.1" in elsewhere.output()


def test_nodes_that_share_no_disk_save_to_the_store_and_go_on_from_it(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job, bucket, monkeypatch
) -> None:
    folder, port = bucket
    job = Job(tmp_path / "one", index)
    options = ["checkpoint.store=s3://runs/f", "checkpoint.keep_last=3"]
    run = {"log": tmp_path / "one" / "rank-0.log", "environment": s3_environment(port)}
    apart = "multiprocess.ranks:train_apart"
    assert zygote.run(2, apart, job.config, tmp_path / "node", *options, **run) == [0, 0], job.output()
    assert steps(folder, "f") == [15, 18, 20]
    use_s3(monkeypatch, port)
    for name in ("step-000000018", "step-000000020"):
        storage.delete(f"s3://runs/f/checkpoints/{name}/{MANIFEST}")
    assert zygote.run(2, apart, job.config, tmp_path / "new", *options, **run) == [0, 0], job.output()
    job.run_dir = tmp_path / "new-0"
    assert job.column("train/loss") == uninterrupted.column("train/loss")[15:]


def test_a_store_that_refuses_ends_the_run_with_a_sentence(
    tmp_path: Path, index: Path, zygote: Zygote, bucket
) -> None:
    job = Job(tmp_path / "one", index)
    environment = {**s3_environment(bucket[1]), "AWS_SECRET_ACCESS_KEY": "wrong"}
    log = tmp_path / "one" / "rank-0.log"
    arguments = [job.config, "checkpoint.store=s3://runs/c"]
    assert zygote.run(2, TRAIN, *arguments, log=log, environment=environment) == [2, 2]
    assert "access is denied" in job.output() and "Traceback" not in job.output()


def steps(folder: Path, run: str = "a") -> list[int]:
    """The steps of the committed checkpoints below the bucket's prefix."""
    manifests = folder.glob(f"{run}/checkpoints/step-*/{MANIFEST}")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in manifests)
