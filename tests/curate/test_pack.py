"""Packing: what goes in comes out, in the same bytes each time; omissions are reported."""

import fcntl
import io
import json
import os
import resource
from pathlib import Path

import psutil
import pytest
from make import jpeg
from pack_files import read_all, shard_bytes, write_photos
from PIL import Image

from tools.data import main
from vitscale.curate.pack.config import PackConfig
from vitscale.curate.pack.run import pack
from vitscale.curate.pack.writer import open_shard, write_shards
from vitscale.data.indexing import build_index
from vitscale.data.samples import RawSample
from vitscale.errors import BusyError, ConfigError, DataError, StoreError, UserError


def make_samples(count: int) -> list[RawSample]:
    return [RawSample(f"k{n:03d}", jpeg(n), "jpg", (n % 3,) if n % 2 else (1, n)) for n in range(count)]


def test_a_packing_holds_every_image_once_with_its_label(tmp_path: Path) -> None:
    source, progress = write_photos(tmp_path / "photos"), list[tuple[int, int]]()
    config = PackConfig(samples_per_shard=10)
    report = pack(source, tmp_path / "out", config, lambda done, total: progress.append((done, total)))
    assert [Path(path).name for path in report.shards["train"]] == [f"train-{n:06d}.tar" for n in range(3)]
    assert report.num_samples == {"train": 25} and report.num_omissions == 0
    assert progress == [(0, 25), (10, 25), (20, 25), (25, 25)]
    samples = read_all(report.shards["train"])
    assert {(s.image, s.labels) for s in samples} == {(jpeg(n), (n % 2,)) for n in range(25)}
    assert samples[0].key.startswith("train_00000000_") and len({s.key for s in samples}) == 25
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["ant", "cat"]
    assert {s.image for s in samples[:12]} != {jpeg(n) for n in range(0, 24, 2)}  # both classes


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "photos", size=40)
    for workers in (0, 2):
        config = PackConfig(samples_per_shard=4, short_side=24, workers=workers)
        pack(source, tmp_path / str(workers), config)
    assert len(shard_bytes(tmp_path / "0")) == 7
    assert shard_bytes(tmp_path / "0") == shard_bytes(tmp_path / "2")


def test_the_seed_orders_the_samples_and_without_a_shuffle_the_source_does(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "photos")
    orders = []
    configs = [PackConfig(seed=1), PackConfig(seed=2), PackConfig(shuffle=False), PackConfig(seed=1)]
    for attempt, config in enumerate(configs):
        report = pack(source, tmp_path / str(attempt), config)
        orders.append([s.image for s in read_all(report.shards["train"])])
    assert orders[0] != orders[1] and orders[0] == orders[3]
    by_name = sorted(Path(source).glob("*/*.jpg"))
    assert orders[2] == [path.read_bytes() for path in by_name]


def test_a_finished_packing_is_kept_and_a_removed_shard_is_written_again(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO", "vitscale.curate.pack")
    source, out = write_photos(tmp_path / "photos"), tmp_path / "out"
    config = PackConfig(samples_per_shard=10)
    pack(source, out, config)
    before, times = shard_bytes(out), [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))]
    assert pack(source, out, config).num_kept_shards == 3
    (out / "train-000001.tar").unlink()
    assert pack(source, out, config).num_kept_shards == 2
    said = "shards finished already"
    assert caplog.messages == [
        f"{said}: 3 of 3; nothing is left to write",
        f"{said}: 2 of 3; writing the others",
    ]
    assert shard_bytes(out) == before
    assert (out / "train-000002.tar").stat().st_mtime_ns == times[2]


def test_another_source_or_other_options_are_refused_unless_overwritten(tmp_path: Path) -> None:
    source, out = write_photos(tmp_path / "photos"), tmp_path / "out"
    pack(source, out, PackConfig(samples_per_shard=10))
    with pytest.raises(ConfigError, match=r"other options \(samples_per_shard\); choose another folder"):
        pack(source, out, PackConfig(samples_per_shard=5))
    (tmp_path / "photos" / "ant" / "more.jpg").write_bytes(jpeg(99))
    with pytest.raises(ConfigError, match="another source, or the source has changed"):
        pack(source, out, PackConfig(samples_per_shard=10))
    (tmp_path / "photos" / "ant" / "more.jpg").rename(tmp_path / "more.jpg")
    assert pack(source, out, PackConfig(samples_per_shard=10)).num_kept_shards == 3
    (tmp_path / "more.jpg").rename(tmp_path / "photos" / "ant" / "more.jpg")
    report = pack(source, out, PackConfig(samples_per_shard=20, overwrite=True))
    assert report.num_samples == {"train": 26} and len(shard_bytes(out)) == 2
    for content in ("{}", "[" * 100_000):
        (out / "pack-plan.json").write_text(content)
        with pytest.raises(DataError, match="is not a plan"):
            pack(source, out, PackConfig(samples_per_shard=20))


def test_shards_of_another_origin_and_a_folder_within_the_source_are_refused(tmp_path: Path) -> None:
    source, out = write_photos(tmp_path / "photos"), tmp_path / "out"
    write_shards(make_samples(3), out, "train")
    with pytest.raises(ConfigError, match=r"already holds 1 shards of another origin, like train-000000.tar"):
        pack(source, out, PackConfig())
    with pytest.raises(ConfigError, match="choose a folder outside"):
        pack(source, tmp_path / "photos" / "shards", PackConfig())
    with pytest.raises(ConfigError, match="choose a folder outside"):
        pack(str(out / "train-*.tar"), out, PackConfig(format="shards", overwrite=True))
    assert len(shard_bytes(out)) == 1
    assert pack(str(out / "train-*.tar"), tmp_path / "beside", PackConfig(format="shards")).num_samples


def test_a_second_packing_into_the_same_folder_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("vitscale.system.file_lock._WAIT_SECONDS", 0.1)
    source, out = write_photos(tmp_path / "photos"), tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(BusyError, match=r"another packing into .* is running"):
        pack(source, out, PackConfig())
    os.close(descriptor)
    assert pack(source, out, PackConfig()).num_samples == {"train": 25}


def test_what_cannot_be_packed_is_counted_named_and_moves_no_boundary(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "photos", 30)
    folder = tmp_path / "photos" / "ant"
    (folder / "notes.txt").write_text("hello")
    (folder / "text.jpg").write_text("not an image")
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (folder / "empty.png").touch()
    report = pack(source, tmp_path / "out", PackConfig(samples_per_shard=11, workers=2))
    assert report.num_samples == {"train": 30} and report.num_omissions == 4
    assert len(report.shards["train"]) == 3  # of 33 references
    for name in ("notes.txt", "text.jpg", "gone.jpg", "empty.png"):
        assert sum(name in sentence for sentence in report.omissions) == 1
    written = json.loads((tmp_path / "out" / "pack-report.json").read_text())
    assert written["num_left_out"] == 4 and written["left_out"] == list(report.omissions)
    assert len(read_all(report.shards["train"])) == 30


def test_a_shard_of_which_nothing_could_be_packed_is_not_indexed(tmp_path: Path, capsys) -> None:
    photos = Path(write_photos(tmp_path / "photos", 5))
    (photos / "ant" / "2.jpg").write_bytes(b"text")
    command = ["pack", str(photos), str(tmp_path / "out"), "--samples-per-shard", "1", "--workers", "0"]
    for _ in range(2):
        assert main(command) == 0
        assert "4 samples in 4 shards" in capsys.readouterr().out


def test_shards_that_are_links_into_the_folder_are_not_overwritten(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "photos", 20)
    out, chosen = tmp_path / "out", tmp_path / "chosen"
    shard = Path(pack(source, out, PackConfig(samples_per_shard=10)).shards["train"][0])
    chosen.mkdir()
    (chosen / "train-000000.tar").symlink_to(shard)
    with pytest.raises(ConfigError, match="is inside the source"):
        pack(str(chosen / "*.tar"), out, PackConfig(format="shards", overwrite=True))
    assert shard.exists()


def interrupt_after_the_first(done: int, total: int) -> None:
    if done:
        raise KeyboardInterrupt


def test_overwriting_a_packing_removes_its_unfinished_index(tmp_path: Path) -> None:
    source, out = write_photos(tmp_path / "photos"), tmp_path / "out"
    shards = pack(source, out, PackConfig()).shards["train"]
    journal = out / "index.partial"
    with pytest.raises(KeyboardInterrupt):
        build_index(shards, journal=journal, progress=interrupt_after_the_first)
    assert journal.exists()
    pack(source, out, PackConfig(seed=1, overwrite=True))  # the same images: a shard of the same size
    index = build_index(shards, journal=journal)
    assert index.fingerprint() == build_index(shards).fingerprint()


def test_a_damaged_image_is_found_when_it_is_re_encoded(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "photos", 6)
    (tmp_path / "photos" / "cat" / "cut.jpg").write_bytes(jpeg(1)[:200])
    assert pack(source, tmp_path / "a", PackConfig()).num_omissions == 0
    report = pack(source, tmp_path / "b", PackConfig(short_side=8))
    assert report.num_samples == {"train": 6} and "cut.jpg: cannot be decoded" in report.omissions[0]


def test_a_source_without_any_image_is_refused_and_one_image_is_enough(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "photos", 2)
    for path in (tmp_path / "photos").rglob("*.jpg"):
        path.write_text("not an image")
    with pytest.raises(DataError, match="none of the 2 images of train could be packed"):
        pack(source, tmp_path / "out", PackConfig())
    path.write_bytes(jpeg(0))
    report = pack(source, tmp_path / "one", PackConfig())
    assert report.num_samples == {"train": 1} and report.num_omissions == 1


def test_a_shard_of_which_everything_is_left_out_does_not_appear(tmp_path: Path) -> None:
    source, out = write_photos(tmp_path / "photos", 4), tmp_path / "out"
    (tmp_path / "photos" / "cat" / "1.jpg").write_bytes(bytes(100))
    config = PackConfig(shuffle=False, samples_per_shard=1)
    report = pack(source, out, config)
    names = [f"train-{number:06d}.tar" for number in (0, 1, 3)]
    assert list(shard_bytes(out)) == [Path(path).name for path in report.shards["train"]] == names
    assert [s.labels for s in read_all(sorted(map(str, out.glob("*.tar"))))] == [(0,), (0,), (1,)]
    again = pack(source, out, config)
    assert again.num_kept_shards == 4 and again.omissions == report.omissions and report.num_omissions == 1
    (tmp_path / "photos" / "cat" / "1.jpg").write_bytes(jpeg(1)[:100])  # it only had no JPEG header
    left_out = out / "pack-left-out" / "train-000002.tar.json"
    left_out.write_text("")
    remedy = rf"delete it and {out}/train-000002\.tar, and run again"
    with pytest.raises(UserError, match=rf"{left_out} is damaged, or of another version; {remedy}"):
        pack(source, out, config)
    left_out.unlink()
    assert pack(source, out, config).num_samples == {"train": 4}


def test_a_source_that_is_gone_is_refused_and_one_file_is_enough(tmp_path: Path) -> None:
    table, out = tmp_path / "table.csv", tmp_path / "out"
    table.write_text("path,label\n" + "".join(f"gone/{number}.jpg,1\n" for number in range(20)))
    config = PackConfig(format="csv", samples_per_shard=20, workers=2)
    with pytest.raises(DataError, match=r"none of the 20 files of train-000000.tar can be read"):
        pack(str(table), out, config)
    assert not shard_bytes(out)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "7.jpg").write_bytes(jpeg(0))
    report = pack(str(table), out, config)
    assert report.num_samples == {"train": 1} and report.num_omissions == 19


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_cannot_be_written_ends_the_packing_with_one_sentence(
    tmp_path: Path, workers: int
) -> None:
    source, out = write_photos(tmp_path / "photos"), tmp_path / "out"
    config = PackConfig(samples_per_shard=10, workers=workers)
    others = set(psutil.Process().children())  # what other tests have started
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # what a full disk or a quota does
    try:
        with pytest.raises(StoreError, match=r"cannot be written .File too large.*finished shards are kept"):
            pack(source, out, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not psutil.wait_procs(set(psutil.Process().children()) - others, timeout=5)[1]
    assert not shard_bytes(out) and not list(out.glob(".train*"))
    assert pack(source, out, config).num_samples == {"train": 25}


def test_an_image_too_wide_for_a_jpeg_is_left_out(tmp_path: Path) -> None:
    source = Path(write_photos(tmp_path / "photos", 3))
    Image.new("RGB", (100_000, 4)).save(source / "ant" / "wide.png")
    report = pack(str(source), tmp_path / "out", PackConfig(short_side=3))
    assert report.num_omissions == 1 and "has at most 65,500 a side" in report.omissions[0]


def test_the_extension_follows_the_content(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "x.y.JPEG").write_bytes(buffer.getvalue())
    sample = read_all(pack(str(tmp_path / "photos"), tmp_path / "out", PackConfig()).shards["train"])[0]
    assert sample.extension == "png" and sample.key == "train_00000000_x_y"


@pytest.mark.parametrize(
    ("refused", "accepted", "sentence"),
    [
        ({"samples_per_shard": 0}, {"samples_per_shard": 1}, "must be above 0"),
        ({"quality": 0}, {"quality": 1}, "from 1 to 100"),
        ({"quality": 101}, {"quality": 100}, "from 1 to 100"),
        ({"workers": -1}, {"workers": 0}, "^--workers -1 must not be negative; the default is one per core$"),
        ({"short_side": -1}, {"short_side": 0}, "^--short-side -1 must not be negative; 0, the default,"),
        ({"seed": -1}, {"seed": 0}, "^--seed -1 must not be negative; 0 is the default$"),
        ({"seed": 2**64}, {"seed": 2**64 - 1}, "--seed"),
        ({"val_labels": ""}, {"val_labels": "val.txt"}, "belong together"),
        ({"format": "imagefolder"}, {"format": "imagenet1k"}, "belongs to --format imagenet1k"),
    ],
    ids=str,
)
def test_options_outside_their_range_are_refused(refused: dict, accepted: dict, sentence: str) -> None:
    validation = {"format": "imagenet1k", "val_images": "val.tar", "val_labels": "val.txt"}
    PackConfig(**{**validation, **accepted})
    with pytest.raises(ConfigError, match=sentence):
        PackConfig(**{**validation, **refused})


def test_shards_hold_what_was_written_and_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    paths = write_shards(make_samples(25), tmp_path / "a", "train", samples_per_shard=10)
    assert [Path(path).name for path in paths] == [f"train-{n:06d}.tar" for n in range(3)]
    read = read_all(paths)
    assert [(s.key, s.image, s.labels) for s in read] == [
        (s.key, s.image, s.labels) for s in make_samples(25)
    ]
    again = write_shards(make_samples(25), tmp_path / "b", "train", samples_per_shard=10)
    assert all(Path(a).read_bytes() == Path(b).read_bytes() for a, b in zip(paths, again, strict=True))
    (tmp_path / "a" / ".train-000000.tar.tmp-1").touch()
    write_shards(make_samples(3), tmp_path / "a", "train")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["train-000000.tar"]


def write_shard(path: Path, stop: type[BaseException] | None) -> None:
    with open_shard(path) as write:
        write(make_samples(1)[0])
        if stop:
            raise stop


def test_a_shard_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "train-000000.tar", KeyboardInterrupt)
    assert not list(tmp_path.iterdir())
    write_shard(tmp_path / "train-000000.tar", None)
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]


def test_the_tool_packs_indexes_and_verifies(tmp_path: Path, capsys) -> None:
    out = tmp_path / "shards"
    assert main(["pack", write_photos(tmp_path / "photos", 10), str(out)]) == 0
    assert json.loads((out / "classes.json").read_text()) == ["ant", "cat"]
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


def test_classes_without_an_image_are_counted_and_named(tmp_path: Path, capsys) -> None:
    for name in ("a", "b", "c", "d"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    for name in ("a", "c"):
        (tmp_path / "photos" / name / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "photos" / "d" / "1.heic").write_bytes(b"heic")
    assert main(["pack", str(tmp_path / "photos"), str(tmp_path / "out"), "--workers", "0"]) == 0
    shown = capsys.readouterr()
    assert "2 samples in 1 shards, 2 classes\nto train on them: model.num_classes = 4\n" in shown.out
    assert "check: no image of class 1 (b), 3 (d)\n" in shown.err


def test_a_named_pipe_is_skipped(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "photos")
    os.mkfifo(tmp_path / "photos" / "ant" / "blocks.jpg")
    assert pack(source, tmp_path / "out", PackConfig()).num_samples == {"train": 25}


def test_a_class_folder_whose_name_is_not_text_is_refused(tmp_path: Path) -> None:
    source = write_photos(tmp_path / "photos")
    latin1 = Path(os.fsdecode(os.fsencode(source) + b"/caf\xe9"))
    latin1.mkdir()
    (latin1 / "x.jpg").write_bytes(jpeg(0))
    with pytest.raises(DataError, match="is not UTF-8; rename it"):
        pack(source, tmp_path / "out", PackConfig())
    latin1.rename(tmp_path / "photos" / "café")
    assert pack(source, tmp_path / "out", PackConfig()).num_samples == {"train": 26}
