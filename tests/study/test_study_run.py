"""A study that is really run: killed, continued, and plotted."""

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

from make import write_index

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 300
STUDY = """
out = "{out}"
metric = "eval/test/top1"
overrides = ["total_steps=4"]

[[models]]
name = "ViT"
config = "{config}"

[[models]]
name = "ResNet"
config = "{config}"
overrides = [
    "model.kind=resnet", "model.variant=R26x1", "model.width=32", "model.stages=[1]", "data.fraction=0.6",
]
"""
RUN = """
run_dir = "unused"
global_batch = 8
total_steps = 9

[model]
variant = "{variant}"
image_size = 8
num_classes = 5

[data]
index = "{index}"

[engine]
num_workers = 0

[evals.test]
kind = "classify"
test = "{test}"
every_steps = 4
"""


def study(*words: object) -> list[str]:
    return [sys.executable, "tools/study.py", *map(str, words)]


def test_a_study_is_killed_and_continued_and_its_plots_stand_beside_the_papers(tmp_path: Path) -> None:
    index = write_index(tmp_path / "shards", [40, 43])
    path, config, out = tmp_path / "study.toml", tmp_path / "run.toml", tmp_path / "out"
    config.write_text(RUN.format(variant="mu/4", index=index, test=index.parent / "train-*.tar"))
    path.write_text(STUDY.format(out=out, config=config))
    first = subprocess.Popen(study("run", path), cwd=ROOT, start_new_session=True)
    result = out / "ViT/fraction-1/seed-0/result.json"
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not result.exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = result.stat().st_mtime_ns
    launcher = f"{sys.executable} -m torch.distributed.run --nproc_per_node 2"
    second = subprocess.run(
        study("run", path, "--launcher", launcher), cwd=ROOT, capture_output=True, text=True
    )
    assert second.returncode == 0, second.stderr
    assert result.stat().st_mtime_ns == before and "to do: none" in second.stdout
    assert second.stdout.count(" done ") == 2
    drawn = subprocess.run(study("plot", path, out), cwd=ROOT, capture_output=True, text=True)
    assert drawn.stdout.split() == [f"{out}/by_compute.png", f"{out}/by_data.png"], drawn.stderr
    for name in ("by_compute", "by_data"):
        header = (out / f"{name}.png").read_bytes()[:24]
        assert header[:4] == b"\x89PNG" and struct.unpack(">II", header[16:]) == (2200, 920)
