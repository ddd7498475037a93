"""Packing: what goes in comes out, the same bytes each time, nothing dropped in silence, and a kill costs
nothing but time.
"""

import fcntl
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image
from shard_files import jpeg

from tools.data import main
from vitscale.config import ConfigError
from vitscale.data.index import build_index
from vitscale.data.pack.config import PackConfig
from vitscale.data.pack.run import pack
from vitscale.data.pack.writer import open_shard, write_shards
from vitscale.data.reader import read_samples
from vitscale.data.samples import RawSample

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys
from pathlib import Path
from vitscale.data.pack.config import PackConfig
from vitscale.data.pack.run import pack
config = PackConfig(samples_per_shard=10, short_side=200, workers=int(sys.argv[3]))  # SHRINK's options
pack(sys.argv[1], Path(sys.argv[2]), config, lambda done, total: print(done, flush=True))
"""
SHRINK = PackConfig(samples_per_shard=10, short_side=200)


def make_samples(count: int) -> list[RawSample]:
    return [RawSample(f"k{n:03d}", jpeg(n), "jpg", (n % 3,) if n % 2 else (1, n)) for n in range(count)]


def make_photos(folder: Path, count: int = 25, size: int = 16) -> str:
    """`count` images in two class folders."""
    for number in range(count):
        path = folder / ["ant", "cat"][number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, size))
    return str(folder)


@pytest.fixture(scope="module")
def large_photos(tmp_path_factory) -> Path:
    """99 images that take a while to encode and a broken one, below photos/, and what SHRINK makes of
    them,
    uninterrupted, below whole/.
    """
    folder = tmp_path_factory.mktemp("large")
    source = make_photos(folder / "photos", 99, size=600)
    (folder / "photos" / "ant" / "broken.jpg").write_bytes(jpeg(1)[:200])
    pack(source, folder / "whole", SHRINK)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def read_all(shards: list[str]) -> list[RawSample]:
    index = build_index(shards)
    return list(read_samples(index, range(index.num_samples)))


def test_a_packing_holds_every_image_once_with_its_label(tmp_path: Path) -> None:
    source, seen = make_photos(tmp_path / "photos"), list[tuple[int, int]]()
    config = PackConfig(samples_per_shard=10)
    report = pack(source, tmp_path / "out", config, lambda done, total: seen.append((done, total)))
    assert [Path(path).name for path in report.shards["train"]] == [f"train-{n:06d}.tar" for n in range(3)]
    assert report.num_samples == {"train": 25} and report.num_left_out == 0
    assert seen == [(0, 25), (10, 25), (20, 25), (25, 25)]
    samples = read_all(report.shards["train"])
    assert {(s.image, s.labels) for s in samples} == {(jpeg(n), (n % 2,)) for n in range(25)}
    assert samples[0].key.startswith("train_00000000_") and len({s.key for s in samples}) == 25
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["ant", "cat"]
    assert {s.image for s in samples[:12]} != {jpeg(n) for n in range(0, 24, 2)}


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    source = make_photos(tmp_path / "photos", size=40)
    for workers in (0, 2):
        config = PackConfig(samples_per_shard=4, short_side=24, workers=workers)
        pack(source, tmp_path / str(workers), config)
    assert len(contents(tmp_path / "0")) == 7
    assert contents(tmp_path / "0") == contents(tmp_path / "2")


def test_the_seed_orders_the_samples_and_without_a_shuffle_the_source_does(tmp_path: Path) -> None:
    source = make_photos(tmp_path / "photos")
    orders = []
    for number, config in enumerate(
        [PackConfig(seed=1), PackConfig(seed=2), PackConfig(shuffle=False), PackConfig(seed=1)]
    ):
        report = pack(source, tmp_path / str(number), config)
        orders.append([s.image for s in read_all(report.shards["train"])])
    assert orders[0] != orders[1] and orders[0] == orders[3]
    by_name = sorted(Path(source).glob("*/*.jpg"))
    assert orders[2] == [path.read_bytes() for path in by_name]


def start(source: str, out: Path, workers: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, source, str(out), str(workers)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_packing_that_is_killed_again_and_again_ends_in_the_same_bytes(
    tmp_path: Path, large_photos: Path, workers: int
) -> None:
    source, out, kept = str(large_photos / "photos"), tmp_path / "out", []
    whole = contents(large_photos / "whole")
    for printed, delay in ((1, 0.004), (2, 0.03), (3, 0.0)):
        process = start(source, out, workers)
        assert process.stdout
        for _ in range(printed):
            process.stdout.readline()
        time.sleep(delay)
        children = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        assert len(children) == workers or printed == 1  # they come with the first shard
        assert not psutil.wait_procs(children, timeout=5)[1]
        kept.append(len(contents(out)))
        assert all(whole[name] == data for name, data in contents(out).items())
    (out / ".train-000099.tar.tmp-1").write_bytes(b"left over")
    report = pack(source, out, SHRINK)
    assert 0 < report.num_kept_shards < 10 and kept == sorted(kept)
    assert contents(out) == whole and not list(out.glob(".*"))
    assert report.num_samples == {"train": 99} and report.num_left_out == 1
    assert "broken.jpg: cannot be decoded" in report.left_out[0]
    one, other = ((folder / "pack-report.json").read_bytes() for folder in (out, large_photos / "whole"))
    assert one == other


def test_a_finished_packing_is_kept_and_a_removed_shard_is_written_again(tmp_path: Path) -> None:
    source, out = make_photos(tmp_path / "photos"), tmp_path / "out"
    config = PackConfig(samples_per_shard=10)
    pack(source, out, config)
    before, times = contents(out), [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))]
    (out / "train-000001.tar").unlink()
    assert pack(source, out, config).num_kept_shards == 2 and contents(out) == before
    assert (out / "train-000002.tar").stat().st_mtime_ns == times[2]


def test_another_source_or_other_options_are_refused_unless_overwritten(tmp_path: Path) -> None:
    source, out = make_photos(tmp_path / "photos"), tmp_path / "out"
    pack(source, out, PackConfig(samples_per_shard=10))
    with pytest.raises(ConfigError, match=r"other options \(samples_per_shard\); choose another folder"):
        pack(source, out, PackConfig(samples_per_shard=5))
    (tmp_path / "photos" / "ant" / "more.jpg").write_bytes(jpeg(99))
    with pytest.raises(ConfigError, match="another source, or the source has changed"):
        pack(source, out, PackConfig(samples_per_shard=10))
    report = pack(source, out, PackConfig(samples_per_shard=20, overwrite=True))
    assert report.num_samples == {"train": 26} and len(contents(out)) == 2
    (out / "pack-plan.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a plan"):
        pack(source, out, PackConfig(samples_per_shard=20))


def test_shards_of_another_origin_and_a_folder_within_the_source_are_refused(tmp_path: Path) -> None:
    source, out = make_photos(tmp_path / "photos"), tmp_path / "out"
    write_shards(make_samples(3), out, "train")
    with pytest.raises(ConfigError, match=r"already holds 1 shards of another origin, like train-000000.tar"):
        pack(source, out, PackConfig())
    with pytest.raises(ConfigError, match="choose a folder outside"):
        pack(source, tmp_path / "photos" / "shards", PackConfig())
    with pytest.raises(ConfigError, match="choose a folder outside"):
        pack(str(out / "train-*.tar"), out, PackConfig(format="shards", overwrite=True))
    assert len(contents(out)) == 1


def test_a_second_packing_into_the_same_folder_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("vitscale.data.pack.plan._LOCK_SECONDS", 0.1)
    source, out = make_photos(tmp_path / "photos"), tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match=r"another packing into .* is running"):
        pack(source, out, PackConfig())
    os.close(descriptor)
    pack(source, out, PackConfig())


def test_what_cannot_be_packed_is_counted_named_and_moves_no_boundary(tmp_path: Path) -> None:
    source = make_photos(tmp_path / "photos", 30)
    folder = tmp_path / "photos" / "ant"
    (folder / "notes.txt").write_text("hello")
    (folder / "text.jpg").write_text("not an image")
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (folder / "empty.png").touch()
    report = pack(source, tmp_path / "out", PackConfig(samples_per_shard=11, workers=2))
    assert report.num_samples == {"train": 30} and report.num_left_out == 4
    assert len(report.shards["train"]) == 3  # of 33 references
    for name in ("notes.txt", "text.jpg", "gone.jpg", "empty.png"):
        assert sum(name in sentence for sentence in report.left_out) == 1
    written = json.loads((tmp_path / "out" / "pack-report.json").read_text())
    assert written["num_left_out"] == 4 and written["left_out"] == list(report.left_out)
    assert len(read_all(report.shards["train"])) == 30


def test_a_shard_of_which_nothing_could_be_packed_is_not_indexed(tmp_path: Path, capsys) -> None:
    photos = Path(make_photos(tmp_path / "photos", 5))
    (photos / "ant" / "2.jpg").write_bytes(b"text")
    command = ["pack", str(photos), str(tmp_path / "out"), "--samples-per-shard", "1", "--workers", "0"]
    for _ in range(2):
        assert main(command) == 0
        assert "4 samples in 4 shards" in capsys.readouterr().out


def test_shards_that_are_links_into_the_folder_are_not_overwritten(tmp_path: Path) -> None:
    source = make_photos(tmp_path / "photos", 20)
    out, chosen = tmp_path / "out", tmp_path / "chosen"
    shard = Path(pack(source, out, PackConfig(samples_per_shard=10)).shards["train"][0])
    chosen.mkdir()
    (chosen / "train-000000.tar").symlink_to(shard)
    with pytest.raises(ConfigError, match="is where the source"):
        pack(str(chosen / "*.tar"), out, PackConfig(format="shards", overwrite=True))
    assert shard.exists()


def test_a_packing_anew_forgets_an_unfinished_index(tmp_path: Path) -> None:
    source, out = make_photos(tmp_path / "photos"), tmp_path / "out"
    shards = pack(source, out, PackConfig()).shards["train"]
    with pytest.raises(KeyboardInterrupt):
        build_index(
            shards, journal=out / "index.partial", progress=lambda _: signal.raise_signal(signal.SIGINT)
        )
    pack(source, out, PackConfig(seed=1, overwrite=True))  # the same images: a shard of the same size
    index = build_index(shards, journal=out / "index.partial")
    assert index.fingerprint() == build_index(shards).fingerprint()


def test_a_damaged_image_is_found_when_it_is_encoded_anew(tmp_path: Path) -> None:
    source = make_photos(tmp_path / "photos", 6)
    (tmp_path / "photos" / "cat" / "cut.jpg").write_bytes(jpeg(1)[:200])
    assert pack(source, tmp_path / "a", PackConfig()).num_left_out == 0
    report = pack(source, tmp_path / "b", PackConfig(short_side=8))
    assert report.num_samples == {"train": 6} and "cut.jpg: cannot be decoded" in report.left_out[0]


def test_nothing_usable_is_an_error_and_so_is_a_source_that_is_gone(tmp_path: Path) -> None:
    source = make_photos(tmp_path / "photos", 2)
    for path in (tmp_path / "photos").rglob("*.jpg"):
        path.write_text("not an image")
    with pytest.raises(ConfigError, match="none of the 2 images of train could be packed"):
        pack(source, tmp_path / "out", PackConfig())
    table = tmp_path / "table.csv"
    table.write_text("path,label\n" + "".join(f"gone/{number}.jpg,1\n" for number in range(40)))
    with pytest.raises(ConfigError, match=r"none of the 20 files of train-000000.tar can be read"):
        pack(str(table), tmp_path / "gone", PackConfig(format="csv", samples_per_shard=20, workers=2))
    assert not contents(tmp_path / "gone")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_cannot_be_written_ends_the_packing_with_one_sentence(
    tmp_path: Path, workers: int
) -> None:
    source, out = make_photos(tmp_path / "photos"), tmp_path / "out"
    config = PackConfig(samples_per_shard=10, workers=workers)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # what a full disk or a quota does
    try:
        with pytest.raises(ConfigError, match=r"cannot be written .File too large.*finished shards are kept"):
            pack(source, out, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not psutil.wait_procs(psutil.Process().children(), timeout=5)[1]
    assert not contents(out) and not list(out.glob(".train*"))
    assert pack(source, out, config).num_samples == {"train": 25}


def test_an_image_too_wide_for_a_jpeg_is_left_out(tmp_path: Path) -> None:
    source = Path(make_photos(tmp_path / "photos", 3))
    Image.new("RGB", (100_000, 4)).save(source / "ant" / "wide.png")
    report = pack(str(source), tmp_path / "out", PackConfig(short_side=3))
    assert report.num_left_out == 1 and "has at most 65,500 a side" in report.left_out[0]


def test_the_extension_follows_the_content(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "x.y.JPEG").write_bytes(buffer.getvalue())
    sample = read_all(pack(str(tmp_path / "photos"), tmp_path / "out", PackConfig()).shards["train"])[0]
    assert sample.extension == "png" and sample.key == "train_00000000_x_y"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"samples_per_shard": 0}, "must be above 0"),
        ({"quality": 101}, "from 1 to 100"),
        ({"workers": -1}, "must not be negative"),
        ({"seed": 2**64}, "--seed"),
        ({"format": "imagenet1k", "val_images": "val.tar"}, "belong together"),
        ({"val_images": "val.tar", "val_labels": "val.txt"}, "belongs to --format imagenet1k"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        PackConfig(**options)


def test_shards_hold_what_was_written_and_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    paths = write_shards(make_samples(25), tmp_path / "a", "train", samples_per_shard=10)
    assert [Path(path).name for path in paths] == [f"train-{n:06d}.tar" for n in range(3)]
    read = read_all(paths)
    assert [(s.key, s.image, s.labels) for s in read] == [
        (s.key, s.image, s.labels) for s in make_samples(25)
    ]
    again = write_shards(make_samples(25), tmp_path / "b", "train", samples_per_shard=10)
    assert all(Path(a).read_bytes() == Path(b).read_bytes() for a, b in zip(paths, again, strict=True))
    with pytest.raises(ConfigError, match="already holds 3 shards"):
        write_shards(make_samples(3), tmp_path / "a", "train")
    assert len(write_shards(make_samples(3), tmp_path / "a", "train", overwrite=True)) == 1


def test_a_shard_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_shard(tmp_path / "train-000000.tar") as write:
        write(make_samples(1)[0])
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_no_worker_behind_and_the_next_run_goes_on(
    tmp_path: Path, large_photos: Path
) -> None:
    source, out = str(large_photos / "photos"), tmp_path / "out"
    for _ in range(5):  # a busy machine may deliver the signal when all is done
        shutil.rmtree(out, ignore_errors=True)
        process = start(source, out, 2)
        assert process.stdout
        for _ in range(2):
            process.stdout.readline()
        children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        if process.wait(timeout=20) != 0:
            break
    assert process.returncode != 0 and len(children) == 2
    assert not psutil.wait_procs(children, timeout=5)[1] and not list(out.glob(".train*"))
    kept = len(contents(out))
    assert pack(source, out, SHRINK).num_kept_shards == kept > 0
    assert contents(out) == contents(large_photos / "whole")


def test_the_tool_packs_indexes_and_verifies(tmp_path: Path, capsys) -> None:
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(5):
            (tmp_path / "photos" / name / f"{number}.jpg").write_bytes(jpeg(number))
    out = tmp_path / "shards"
    assert main(["pack", str(tmp_path / "photos"), str(out)]) == 0
    assert json.loads((out / "classes.json").read_text()) == ["a", "b"]
    assert main(["verify", str(out / "index.json")]) == 0
    assert main(["stats", str(out / "index.json")]) == 0
    assert main(["index", str(out / "train-*.tar")]) == 0
    assert "10 samples in 1 shards" in capsys.readouterr().out
    shard = out / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    assert main(["verify", str(out / "index.json")]) == 2
    assert main(["index", str(out / "train-*.tar")]) == 2
    assert main(["index", str(out / "none-*.tar")]) == 2
    assert main(["index", str(out)]) == 2
    assert main(["stats", str(out)]) == 2
    assert main(["demo", str(shard / "below_a_file")]) == 2
    errors = capsys.readouterr().err
    assert "it was cut" in errors and "no file matches" in errors and "Traceback" not in errors


def test_a_pipe_is_passed_over_and_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    source = Path(make_photos(tmp_path / "photos"))
    folder = next(path for path in source.iterdir() if path.is_dir())
    os.mkfifo(folder / "waits-for-ever.jpg")
    report = pack(str(source), tmp_path / "out", PackConfig(samples_per_shard=50))
    assert sum(report.num_samples.values()) > 0
    os.mkdir(os.fsencode(source) + b"/caf\xe9")
    (Path(os.fsdecode(os.fsencode(source) + b"/caf\xe9")) / "x.jpg").write_bytes(b"")
    with pytest.raises(ConfigError, match="has no name in UTF-8; rename it"):
        pack(str(source), tmp_path / "other", PackConfig())
