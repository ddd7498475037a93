"""The page of real runs: one with three starts on damaged shards, and two runs compared."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from make import jpeg, write_tar
from markup import Page, checked
from multiprocess.job import Job
from multiprocess.ranks import KillAll
from multiprocess.zygote import Zygote

from tools.report import main
from vitscale import config as configs
from vitscale.data.indexing import build_index
from vitscale.data.sources import open_sources
from vitscale.job import derive
from vitscale.progress import Progress
from vitscale.report.page.samples import first_batch
from vitscale.start import open_stream
from vitscale.train_config import TrainConfig

CLASSES = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "cat & dog", "d", "e"]
BROKEN, MISLABELLED = 5, 9  # sample ids: text instead of an image; a class that the model has not
TOLERANT = ("data.max_bad_fraction=1", "total_steps=90", "guard.spike_deviations=0.01", "log.every_steps=5")
EXPECTED = ("expect.source=<i>a guess</i>", "expect.bands.train/loss=[[1, 0, 0.5], [90, 0, 0.5]]")


def write(folder: Path, name: str, num_samples: int, *, damaged: bool = False) -> Path:
    """A shard of samples whose keys and class names are hostile; its index is returned."""
    folder.mkdir(exist_ok=True)
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    members = []
    for sample in range(num_samples):
        is_text, label = damaged and sample == BROKEN, 77 if damaged and sample == MISLABELLED else sample % 5
        content = b"no image" if is_text else jpeg(sample)
        key = f"<b>{sample:03d}"
        members += [(f"{key}.jpg", content), (f"{key}.cls", str(label).encode())]
    shard = write_tar(folder / f"{name}.tar", members)
    build_index([str(shard)], chunk_samples=4).save(folder / f"{name}.json")
    return folder / f"{name}.json"


def flip_a_byte_of_a_chunk(index: Path) -> None:
    """Damage an image of the fifth chunk after the shard was indexed."""
    shard = index.with_suffix(".tar")
    data = bytearray(shard.read_bytes())
    at = data.index(b"<b>018.jpg") + 512 + 200
    data[at] ^= 1
    shard.write_bytes(bytes(data))


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Iterator[Job]:
    """Three starts, two of them killed, on shards with damage of three kinds."""
    folder = tmp_path_factory.mktemp("eventful")
    index = write(folder / "shards", "train", 60, damaged=True)
    write(folder / "shards", "test", 10)
    flip_a_byte_of_a_chunk(index)
    job = Job(folder / "job", index)
    test = (f"evals.held.test={folder}/shards/test.json", "evals.held.every_steps=30")
    options = (*TOLERANT, *EXPECTED, *test, "engine.num_workers=1")
    assert zygote.train(job, 2, *options, event=KillAll(batch=14)) == [-9, -9]
    assert zygote.train(job, 1, *options, event=KillAll(batch=14)) == [-9]
    assert zygote.train(job, 2, *options, "engine.zero_stage=2") == [0, 0], job.output()
    yield job


def report(*arguments: object) -> Page:
    """The page that tools/report.py writes with these arguments."""
    out = str(arguments[-1])
    assert main([*map(str, arguments[:-1]), "--out", out]) == 0
    return checked(Path(out).read_text())


def sections(page: Page) -> list[str]:
    return [values["id"] or "" for tag, values in page.tags if tag == "section"]


@pytest.fixture(scope="module")
def page(eventful: Job, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report(eventful.run_dir, tmp_path_factory.mktemp("page") / "page.html")


def test_every_section_of_a_run_is_there(page: Page) -> None:
    assert sections(page) == [
        "expectations", "curves", "throughput", "where-the-time-went", "evaluations", "starts", "data",
        "checkpoints", "model-inputs", "predictions", "config",
    ]  # fmt: skip
    assert "90 of 90 steps" in page.text and "done all of its steps are done" in page.text
    assert "training loss, mean" in page.text and "held/top1" in page.text


def test_each_start_says_from_where_and_what_is_new(page: Page, eventful: Job) -> None:
    starts = [json.loads(line) for line in (eventful.run_dir / "history.jsonl").read_text().splitlines()]
    assert [row["world_size"] for row in starts] == [2, 1, 2]
    assert "engine.zero_stage = 2 (before: 1)" in page.text
    marks = [text for text in page.texts if text.startswith("start 2, from step ")]
    assert set(marks) == {f"start 2, from step {starts[1]['step']:,}"} and len(marks) >= 8


def test_damaged_samples_are_named_with_their_pictures_or_the_reason(page: Page, eventful: Job) -> None:
    lines = (eventful.run_dir / "quarantine.jsonl").read_text().splitlines()
    different = len({json.loads(line)["sample"] for line in lines})
    assert f"{different} different samples were replaced, {len(lines)} times in all" in page.text
    assert "No picture: " in page.text
    pictures = [values["alt"] for tag, values in page.tags if tag == "img"]
    # The mislabelled one can be seen, and so can the intact neighbours of the flipped byte.
    assert {"sample <b>009", "sample <b>016", "sample <b>017", "sample <b>019"} <= set(pictures)
    assert "sample <b>005" not in pictures


def test_spikes_are_listed_with_the_pictures_of_their_samples(page: Page, eventful: Job) -> None:
    rows = (eventful.run_dir / "spikes.jsonl").read_text().splitlines()
    assert rows and f"{len(rows)} losses stand out" in page.text
    assert f"Samples of step {json.loads(rows[-1])['step']:,}, the first 8" in page.text


def test_inputs_and_predictions_are_pictures_with_class_names_as_text(page: Page) -> None:
    alts = [values["alt"] or "" for tag, values in page.tags if tag == "img"]
    assert sum(alt.startswith("model input of class ") for alt in alts) == 8
    assert sum(alt.startswith("image of class ") for alt in alts) == 10
    assert "0 (<script>alert(1)</script>)" in page.text
    verdicts = re.findall("[\u2713\u2717] (?:right|wrong)", page.text)
    assert len(verdicts) == 10
    assert alts.count("image weighted by attention") == 10
    assert alts.count("filter") > 3 and alts.count("position embedding similarity") == 1
    right = sum("right" in verdict for verdict in verdicts)
    assert f"images spread over evals.held: {right} right" in page.text


def test_the_predictions_are_those_of_the_evaluation(page: Page, eventful: Job) -> None:
    rows = [json.loads(line) for line in (eventful.run_dir / "metrics.jsonl").read_text().splitlines()]
    (top1,) = [row["eval/held/top1"] for row in rows if row["step"] == 90 and "eval/held/top1" in row]
    assert f"{round(10 * top1)} right" in page.text  # all ten of the test set are shown


def test_expectations_are_drawn_and_judged_after_the_restarts(page: Page, eventful: Job) -> None:
    (loss,) = [row["train/loss"] for row in eventful.rows() if row["step"] == 90]
    verdict = f"{loss - 0.5:.2g} above the band since step 1"
    assert verdict in page.text and "Source of the bands: <i>a guess</i>" in page.text
    assert f"train/loss: {verdict}, " in eventful.output()
    assert page.count("polygon") == 1


def test_the_inputs_are_those_that_training_read(eventful: Job) -> None:
    config = configs.load(TrainConfig, [eventful.run_dir / "config.toml"], ["engine.num_workers=0"])
    job = derive(config, 1, open_sources(config.data))
    trained = next(open_stream(job, Progress()))
    shown = first_batch(job)
    assert len(shown.images) == 8 and (shown.images == trained.images).all()
    assert shown.ids.tolist() == trained.ids.tolist()


def test_without_its_data_a_run_has_a_page_with_the_reasons(eventful: Job, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(eventful.run_dir, moved)
    text = (moved / "config.toml").read_text()
    (moved / "config.toml").write_text(
        text.replace("train.json", "gone.json").replace("test.json", "away.json")
    )
    page = report(moved, tmp_path / "page.html")
    assert "The inputs cannot be shown: index" in page.text and "gone.json is missing" in page.text
    assert "There are no pictures of samples: index" in page.text
    assert "There are no predictions: " in page.text and page.count("img") == 0
    page = report(eventful.run_dir, "--no-images", tmp_path / "page.html")
    assert page.count("img") == 0 and "model-inputs" not in sections(page)


def test_two_runs_are_drawn_over_one_another_with_what_differs(
    eventful: Job, tmp_path: Path, zygote: Zygote
) -> None:
    other = Job(tmp_path / "other", Path(eventful.config.read_text().split('index = "')[1].split('"')[0]))
    assert zygote.train(other, 1, *TOLERANT, "optim.lr=1e-3", "total_steps=30") == [0], other.output()
    page = report(eventful.run_dir, other.run_dir, tmp_path / "page.html")
    assert "job/run, other/run: vitscale run" in page.text and "what-differs" in sections(page)
    differing = page.text.split("Config keys that differ")[1].split("The whole config")[0]
    assert "optim.lr 0.005 0.001" in differing and "total_steps 90 30" in differing
    assert "optim.weight_decay" not in differing.split("Keys that differ from their defaults")[0]
    labels = page.values("data-label")
    assert {"job/run", "other/run"} <= set(labels)
    assert labels.count("other/run, single steps") == 1
