"""Mixed sources, several labels, every augmentation, images that are no squares: a resumed run
sees the same data.
"""

from pathlib import Path

import pytest
from data.servers import s3_environment, s3_server
from make import jpeg, write_index, write_tar
from multiprocess.job import Job
from multiprocess.ranks import KillAll
from multiprocess.zygote import Zygote

from vitscale.data.indexing import build_index


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """83 single-label samples and 31 multi-label ones in one label space, mixed 7 to 3."""
    folder = tmp_path_factory.mktemp("sources")
    one = write_index(folder / "one", [30, 33, 20])
    members = []
    for number in range(31):
        labels = f"{number % 3} 3" if number % 2 else f"{number % 3}"
        members += [(f"m{number}.jpg", jpeg(900 + number)), (f"m{number}.cls", labels.encode())]
    (folder / "two").mkdir()
    build_index([str(write_tar(folder / "two" / "x.tar", members))], chunk_samples=4).save(
        folder / "two" / "index.json"
    )
    (folder / "map.json").write_text("[4, 3, 2, 1]")
    sources = (
        f'data.sources=[{{index = "{one}", weight = 7}}, {{index = "{folder}/two/index.json", weight = 3, '
        f'label_map = "{folder}/map.json", name = "two"}}]'
    )
    return [
        "model.image_size=[16,24]",
        "data.index=",
        sources,
        "data.labels=multi",
        "loss.name=sigmoid",
        "augment.mixup=0.2",
        "augment.cutmix=1.0",
        "augment.randaugment=deit",
        "augment.randaugment_magnitude_std=0.5",
        "augment.random_erasing=0.25",
        "augment.color_jitter=0.3",
    ]


def test_a_mixture_with_mixup_is_resumed_elastically(
    tmp_path: Path, zygote: Zygote, overrides: list[str]
) -> None:
    whole, killed = Job(tmp_path / "whole", tmp_path), Job(tmp_path / "killed", tmp_path)
    assert zygote.train(whole, 1, *overrides) == [0], whole.output()
    starts = [
        (2, ["engine.num_workers=2"], KillAll(batch=8), [-9, -9]),
        (1, ["engine.zero_stage=3"], KillAll(batch=8), [-9]),
        (2, ["engine.zero_stage=2", "engine.micro_batch=4", "engine.num_workers=1"], None, [0, 0]),
    ]
    for world_size, options, event, statuses in starts:
        assert zygote.train(killed, world_size, *overrides, *options, event=event) == statuses, (
            killed.output()
        )
    assert killed.column("step") == list(range(1, 21))
    assert killed.column("data/digest") == whole.column("data/digest")
    # With other pixels, labels or mixing the losses would differ in their third digit.
    assert killed.column("train/loss") == pytest.approx(whole.column("train/loss"), abs=2e-5)
    assert whole.rows()[-1]["data/epoch/two"] == pytest.approx(20 * 8 * 0.3 / 31, rel=0.15)


def test_repeated_augmentation_is_resumed_bit_for_bit(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    options = ("augment.repeats=2", "augment.mixup=0.8", "data.lanes=2")
    whole, killed = Job(tmp_path / "whole", index), Job(tmp_path / "killed", index)
    assert zygote.train(whole, 1, *options) == [0], whole.output()
    assert zygote.train(killed, 1, *options, "engine.num_workers=1", event=KillAll(batch=12)) == [-9]
    assert zygote.train(killed, 1, *options) == [0], killed.output()
    for name in ("train/loss", "data/digest"):
        assert killed.column(name) == whole.column(name)


def test_training_from_s3_sees_what_training_from_a_disk_sees(
    tmp_path: Path, index: Path, zygote: Zygote, uninterrupted: Job
) -> None:
    job = Job(tmp_path / "job", Path("unused"))
    url = f"data.index=s3://{index.parent.name}/index.json"
    options = (url, f"engine.cache_dir={tmp_path}/cache", "engine.num_workers=1")
    with s3_server(index.parent.parent) as port:
        statuses = zygote.train(job, 2, *options, environment=s3_environment(port))
    assert statuses == [0, 0], job.output()
    for name in ("data/digest", "train/loss"):
        assert job.column(name) == uninterrupted.column(name)
    assert any((tmp_path / "cache").rglob("*"))


def test_a_store_without_credentials_is_one_sentence(tmp_path: Path, zygote: Zygote) -> None:
    environment = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"))
    environment |= dict.fromkeys(("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"), str(tmp_path / "none"))
    environment["AWS_EC2_METADATA_DISABLED"] = "true"
    job = Job(tmp_path / "job", Path("unused"))
    assert zygote.train(job, 1, "data.index=s3://bucket/index.json", environment=environment) == [2]
    assert "error: reading s3://bucket/index.json: there are no credentials" in job.output()
    assert "Traceback" not in job.output()
