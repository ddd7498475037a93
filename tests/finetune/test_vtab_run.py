"""VTAB-1k from miniatures in the true layouts to the table, killed and continued."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from curate.vtab.vtab_raw import make_raw
from finetune.commands import ROOT, TIMEOUT_SECONDS, run

from tools.evaluate import main
from vitscale.curate.pack.config import PackConfig
from vitscale.curate.pack.run import pack
from vitscale.data.indexing import build_index
from vitscale.vtab.tasks import TASKS

# A few steps, of the two images that dSprites in small leaves for training.
SMALL = (
    *("total_steps=4", "global_batch=2", "model.image_size=8", "engine.num_workers=0"),
    *("engine.micro_batch=2", "log.every_steps=1", "checkpoint.every_steps=1"),
)
DATA = "data [x]"  # a name that is a pattern of others
COUNTS = {"retinopathy": 3}  # whose images take long


def make_task(folder: Path, name: str) -> None:
    raw = make_raw(name, folder / "raw" / name, COUNTS.get(name, 120))
    out = folder / DATA / name
    report = pack(str(raw.source), out, PackConfig(format=f"vtab/{name}", membership=raw.membership))
    for split, paths in report.shards.items():
        build_index(paths).save(out / f"{split}.index.json")


def command(model: Path, folder: Path, *options: str) -> list[str]:
    words = ["tools/evaluate.py", "vtab", model, "--data", folder / DATA, "--out", folder / "out"]
    return [sys.executable, *map(str, words), *options]


def evaluate(model: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run(command(model, folder, *options))


def small(*tasks: str) -> list[str]:
    return ["--tasks", ",".join(tasks), *(word for text in SMALL for word in ("--set", text))]


def test_killed_in_the_midst_it_does_no_task_twice(tmp_path: Path, model: Path) -> None:
    for name in ("svhn", "dtd"):
        make_task(tmp_path, name)
    first = subprocess.Popen(
        command(model, tmp_path, *small("svhn", "dtd")), cwd=ROOT, start_new_session=True,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    done = tmp_path / "out" / "svhn" / "final-seed0" / "result.json"
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not done.exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = (done.read_bytes(), done.stat().st_mtime_ns)
    second = evaluate(model, tmp_path, *small("svhn", "dtd"))
    assert second.returncode == 0, second.stderr
    assert (done.read_bytes(), done.stat().st_mtime_ns) == before
    starts = (done.parent / "run" / "history.jsonl").read_text().splitlines()
    assert len(starts) == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["tasks"]) == ["dtd", "svhn"] and results["num_tasks"] == 2
    assert "total_steps=4" in results["not_the_protocol"]
    assert not any(text.startswith("engine") for text in results["not_the_protocol"])
    assert any("vtab/svhn: not the published split" in text for text in results["not_the_protocol"])
    assert "mean of these 2, not of all 19" in second.stdout
    # Other settings are not mixed with those of before.
    other = evaluate(model, tmp_path, *small("svhn", "dtd"), "--set", "optim.lr=0.5")
    assert other.returncode == 2 and "holds a run with other settings (optim.lr)" in other.stderr


def test_what_is_missing_is_told_before_anything_is_trained(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_task(tmp_path, "svhn")
    for options, sentence in (
        (
            ["--tasks", "svhn,dtd"],
            f"{DATA}/dtd holds no train800-*.tar; make it with: python tools/data.py pack",
        ),
        (["--tasks", "mnist"], "--tasks mnist: name some of caltech101, "),
        (["--tasks", "svhn", "--protocol", "linear", "--set", "seed=1"], "--set changes fine-tunings"),
        (["--tasks", "svhn", "--set", "optim.rate=1"], "unknown key optim.rate"),
    ):
        assert main(command(model, tmp_path, *options)[2:]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("error: ") == 1, error
        assert not list(tmp_path.glob("out/*/*/run"))


def test_all_19_tasks_from_raw_files_to_the_table(tmp_path: Path, model: Path, sweep: bool) -> None:
    if not sweep:
        pytest.skip("with --sweep: two tasks are done above")
    began = time.monotonic()
    for name in TASKS:
        make_task(tmp_path, name)
    ended = evaluate(model, tmp_path, *small(*TASKS), "--slots", "2")
    assert ended.returncode == 0, ended.stderr
    assert time.monotonic() - began < 600
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["tasks"]) == list(TASKS) and "mean of all 19" in ended.stdout
    print(ended.stdout, f"{time.monotonic() - began:.0f} s")


def test_a_sweep_chooses_by_val200_and_a_probe_needs_no_training(
    tmp_path: Path, model: Path, sweep: bool
) -> None:
    make_task(tmp_path, "svhn")
    probe = evaluate(model, tmp_path, "--tasks", "svhn", "--protocol", "linear", "--seeds", "0,1")
    assert probe.returncode == 0, probe.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["tasks"]["svhn"]["accuracies"]) == 2 and results["protocol"] == "linear"
    if not sweep:
        return
    swept = evaluate(model, tmp_path, *small("svhn"), "--protocol", "light")
    assert swept.returncode == 0, swept.stderr
    folders = sorted(path.name for path in (tmp_path / "out" / "svhn").glob("*-*"))
    assert sum(name.startswith("sweep-") for name in folders) == 4
    scores = {
        path.parent.name: json.loads(path.read_text())["results"]["top1"]
        for path in (tmp_path / "out" / "svhn").glob("sweep-*/result.json")
    }
    final = (tmp_path / "out" / "svhn" / "final-seed0" / "config.toml").read_text()
    best = max(scores.values())
    rates = {name.split("-")[1].removeprefix("lr") for name, score in scores.items() if score == best}
    assert any(f"lr = {rate}" in final for rate in rates)
