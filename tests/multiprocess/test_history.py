"""What a start writes down: its layout, what was changed, and a trace if one is asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
from multiprocess.job import Job
from multiprocess.ranks import KillAll, Throttle
from multiprocess.zygote import Zygote

from vitscale.data.order import DIGEST_MASK, digest
from vitscale.metrics.rows import read_metrics
from vitscale.run_dir.history import card


def test_each_start_is_a_row_with_its_layout_and_what_changed(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 2, event=KillAll(batch=9)) == [-9, -9]
    with open(job.run_dir / "history.jsonl", "a") as file:
        file.write('{"torn by a ki')
    assert zygote.train(job, 1, "engine.micro_batch=4", "total_steps=22") == [0], job.output()
    first, _, second = (job.run_dir / "history.jsonl").read_text().splitlines()
    one, two = json.loads(first), json.loads(second)
    assert (one["step"], one["world_size"], one["grad_accum_steps"], one["changed"]) == (0, 2, 2, {})
    assert (two["step"], two["world_size"], two["micro_batch"]) == (max(two["step"], 1), 1, 4)
    assert two["changed"] == {"engine.micro_batch": [2, 4], "total_steps": [20, 22]}
    assert set(two["versions"]) == {"vitscale", "torch", "deepspeed", "numpy"}
    assert job.output().count(" was done before, with the ") == 1
    assert "from step 0\n2 ranks at ZeRO " in card(one) and "rolled back" not in card(one)
    assert "\nengine.micro_batch = 4, before 2" in card(two)
    later = {**two, "step": 9, "data_step": 12, "rollbacks": 1}
    assert "from step 9\n" in card(later)
    assert "\nrolled back once, 3 batches passed over in all\n" in card(later)


def test_the_steps_that_are_asked_for_are_traced_with_their_phases(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 2, "log.profile=[3, 4]", "total_steps=6") == [0, 0], job.output()
    (path,) = (job.run_dir / "profile").iterdir()
    events = json.loads(path.read_text())["traceEvents"]
    spans = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert path.name == "steps-3-4.pt.trace.json"
    assert [spans.count(phase) for phase in ("data", "step", "log")] == [2, 2, 1]
    assert any(event["name"] == "aten::addmm" for event in events)


def test_the_time_of_a_run_is_told_over_all_of_its_starts(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 2, event=KillAll(batch=12)) == [-9, -9]  # two steps beyond the checkpoint of 9
    assert zygote.train(job, 2) == [0, 0], job.output()
    last = job.rows()[-1]
    parts = {name: last[name] for name in last if name.startswith("goodput/")}
    assert sum(parts.values()) == pytest.approx(1) and min(parts.values()) >= 0
    assert last["run/starts"] == 2 and last["run/world_size"] == 2
    assert all(parts[f"goodput/{kind}"] > 0 for kind in ("step", "data", "log", "save", "start", "lost"))
    # What has no name is little, even in so short a run on a busy machine.
    assert parts["goodput/other"] < 0.15, parts
    assert job.output().count("INFO wall time since the first start: ") == 1


def test_the_rank_that_slows_the_others_down_is_named(tmp_path: Path, index: Path, zygote: Zygote) -> None:
    job = Job(tmp_path, index)
    assert zygote.train(job, 4, "total_steps=8", event=Throttle(rank=2, seconds=0.2)) == [0] * 4, job.output()
    assert (
        set(job.column("perf/slowest_rank")[1:]) == {2} and min(job.column("perf/slowest_ratio")[1:]) > 1.25
    )
    assert job.output().count("rank 2 on ") == 1 and " is slow: its forward passes take " in job.output()


def test_a_loss_that_stands_out_is_written_down_with_its_samples(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    few = ("total_steps=70", "log.every_steps=7", "guard.spike_deviations=0.01")  # about half of all do
    assert zygote.train(job, 2, *few) == [0, 0], job.output()
    rows = read_metrics(job.run_dir / "spikes.jsonl")
    assert 2 <= len(rows) <= 18 and min(row["step"] for row in rows) > 50
    assert all(len(row["samples"]) == 8 and row["loss"] > row["median"] for row in rows)
    digests = {digest(np.array(numbers(row)), 0) & DIGEST_MASK for row in rows if row["step"] % 7 == 0}
    assert digests <= set(job.column("data/digest"))


def numbers(row: dict) -> list[int]:
    return [int(place.split("sample number ")[1].replace(",", "")) for place in row["samples"]]


def test_a_start_cleans_what_killed_ones_left_of_the_files_of_the_run(
    tmp_path: Path, index: Path, zygote: Zygote
) -> None:
    job = Job(tmp_path, index)
    job.run_dir.mkdir()
    names = ("status.json", "config.toml", "data.npz", "time.json")
    rows = ("metrics.jsonl", "quarantine.jsonl", "spikes.jsonl")
    for name in (*names, *rows, "somebody.else"):
        (job.run_dir / f".{name}.tmp-12").touch()
    assert zygote.train(job, 1, "total_steps=6") == [0], job.output()
    assert [path.name for path in job.run_dir.glob(".*tmp*")] == [".somebody.else.tmp-12"]
