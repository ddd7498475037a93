"""A packing that is killed or interrupted leaves whole shards only, and the next run continues.

The images at which it stops are replaced by named pipes, and the packing blocks where it reads
them. So each test knows which shards are finished, however busy the machine is.
"""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from make import jpeg
from pack_files import read_all, shard_bytes

from vitscale.curate.pack.config import PackConfig
from vitscale.curate.pack.run import pack

ROOT = Path(__file__).resolve().parents[2]
SAMPLES_PER_SHARD = 10
CONFIG = PackConfig(format="csv", samples_per_shard=SAMPLES_PER_SHARD, short_side=12)
OPTIONS = ["--format", "csv", "--samples-per-shard", str(SAMPLES_PER_SHARD), "--short-side", "12"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of 99 images and a broken one. It lists paths only: pipes may stand in."""
    (tmp_path / "images").mkdir()
    for number in range(100):
        content = jpeg(number)
        (tmp_path / "images" / f"{number}.jpg").write_bytes(content[:200] if number == 40 else content)
    rows = "".join(f"images/{number}.jpg,{number % 3}\n" for number in range(100))
    (tmp_path / "table.csv").write_text(f"path,label\n{rows}")
    return tmp_path / "table.csv"


@pytest.fixture
def whole(table: Path) -> Path:
    """What a packing that nothing stops makes of the table."""
    pack(str(table), table.parent / "whole", CONFIG)
    return table.parent / "whole"


def images_in(shard: Path) -> list[str]:
    """The names of the images of a shard: its keys are train_POSITION_NAME."""
    return [sample.key.split("_")[2] for sample in read_all([str(shard)])]


@contextlib.contextmanager
def pipes_in_place_of(images: Sequence[Path]) -> Iterator[list[bytes]]:
    """Yields the contents of the images, and puts them back at the end."""
    contents = [image.read_bytes() for image in images]
    for image in images:
        image.unlink()
        os.mkfifo(image)
    try:
        yield contents
    finally:
        for image, content in zip(images, contents, strict=True):
            image.unlink()
            image.write_bytes(content)


def wait_for_reader(pipe: Path, process: subprocess.Popen[bytes]) -> int:
    """Wait until the packing opens the pipe, and return the end to write to."""
    while process.poll() is None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            assert error.errno == errno.ENXIO, "nobody reads it yet is the only excuse"
            time.sleep(0.01)
    pytest.fail(f"the packing ended with {process.returncode} before it read {pipe}")


@contextlib.contextmanager
def blocked_packing(
    table: Path, whole: Path, workers: int, shard_number: int
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], None]]]:
    """A packing into out/ whose processes all block, and a function that unblocks them.

    Each process reads an image of another shard, from `shard_number` on; all shards before that
    are finished.
    """
    images = []
    for number in range(shard_number, shard_number + max(workers, 1)):
        middle = images_in(whole / f"train-{number:06d}.tar")[number % 8]
        images.append(table.parent / "images" / f"{middle}.jpg")
    command = [sys.executable, ROOT / "tools" / "data.py", "pack", table, table.parent / "out"]
    with pipes_in_place_of(images) as contents:
        process = subprocess.Popen(
            [*command, *OPTIONS, "--workers", str(workers)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
        )
        writers: list[int] = []

        def unblock() -> None:
            for writer, content in zip(writers, contents, strict=True):
                os.write(writer, content)
                os.close(writer)
            writers.clear()

        try:
            for image in images:
                writers.append(wait_for_reader(image, process))
            yield process, unblock
        finally:
            process.kill()
            process.wait()
            for writer in writers:
                os.close(writer)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_packing_that_is_killed_again_and_again_ends_in_the_same_bytes(
    table: Path, whole: Path, workers: int
) -> None:
    out = table.parent / "out"
    for num_finished in (0, 3, 8):
        with blocked_packing(table, whole, workers, num_finished) as (process, _):
            children = psutil.Process(process.pid).children()
            process.kill()
            process.wait()
            assert len(children) == workers
            assert not psutil.wait_procs(children, timeout=30)[1]
        finished = [f"train-{number:06d}.tar" for number in range(num_finished)]
        assert list(shard_bytes(out)) == finished
    assert list(out.glob(".*.tmp-*"))  # the last kill left half a shard behind
    report = pack(str(table), out, CONFIG)
    assert report.num_kept_shards == 8
    assert shard_bytes(out) == shard_bytes(whole) and not list(out.glob(".*"))
    assert report.num_samples == {"train": 99} and report.num_omissions == 1
    assert "40.jpg: cannot be decoded" in report.omissions[0]
    assert (out / "pack-report.json").read_bytes() == (whole / "pack-report.json").read_bytes()


def test_an_interrupt_leaves_no_worker_behind_and_the_next_run_continues(table: Path, whole: Path) -> None:
    out = table.parent / "out"
    with blocked_packing(table, whole, 2, 3) as (process, unblock):
        children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        unblock()  # the workers finish the shards that they have begun
        assert process.wait(timeout=60) == 130
        assert len(children) == 2
        assert not psutil.wait_procs(children, timeout=30)[1]
    assert not list(out.glob(".train*"))
    num_kept = len(shard_bytes(out))
    assert num_kept >= 5
    assert pack(str(table), out, CONFIG).num_kept_shards == num_kept
    assert shard_bytes(out) == shard_bytes(whole)
