"""Building an index: in parallel, resumable, the same whoever builds it; and the data tools."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from make import jpeg, write_index, write_shards, write_tar
from PIL import Image

from tools.data import main
from vitscale.curate import stats
from vitscale.curate.stats import measure
from vitscale.data.index import Index
from vitscale.data.indexing import build_index, journal_of
from vitscale.data.samples import SampleKeys
from vitscale.errors import ConfigError, DataError
from vitscale.stores import storage
from vitscale.system.processes import ProgressCallback

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    return write_shards(tmp_path / "shards", [7 + n % 5 for n in range(24)])


def test_any_number_of_workers_builds_the_same_files(tmp_path: Path, shards: list[str]) -> None:
    for workers in (0, 1, 3):
        (tmp_path / str(workers)).mkdir()
        build_index(shards, chunk_samples=4, workers=workers).save(tmp_path / str(workers) / "index.json")
    files = [{path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("0", "1", "3")]
    assert len(files[0]) == 3 and files[0] == files[1] == files[2]


KILLED_BUILDER = """
import os, signal, sys
from pathlib import Path
from vitscale.data.indexing import build_index
journal, last, shards = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
def progress(num_done, num_shards):
    if num_done == last:
        os.kill(os.getpid(), signal.SIGKILL)
build_index(shards, workers=1, journal=journal, progress=progress)
"""


def test_a_killed_build_resumes_where_it_stopped(tmp_path: Path, shards: list[str]) -> None:
    """SIGKILL after so many shards, four times; a shard that is finished is not read again."""
    whole, journal = build_index(shards), tmp_path / "index.partial"
    for last in (1, 2, 7, 15):
        command = [sys.executable, "-c", KILLED_BUILDER, str(journal), str(last), *shards]
        assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
        assert journal.read_bytes().count(b"\n") == 1 + last  # with the header
        journal.write_bytes(journal.read_bytes() + b'{"shard": {"url": "to')  # torn while it is written
    for path in map(Path, shards[:15]):
        then = path.stat()  # of a finished shard, only the size and the time are looked at
        path.write_bytes(bytes(then.st_size))
        os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
    index = build_index(shards, journal=journal)
    assert index.shards == whole.shards and index.label_counts == whole.label_counts
    assert index.chunks.tolist() == whole.chunks.tolist()


class Stopped(Exception):
    """Raised in the middle of a build."""


def stop_after(num_shards: int) -> ProgressCallback:
    """A progress callback that ends a build after so many shards."""

    def progress(done: int, total: int) -> None:
        if done == num_shards:
            raise Stopped

    return progress


@pytest.mark.parametrize(
    ("number", "damage"),
    [
        (6, lambda line: bytes(4096) + b"\n"),
        (6, lambda line: line.replace(b'"max_labels": 1', b'"max_labels": 2')),
        (6, lambda line: line.partition(b" ")[2]),
        (12, lambda line: line[:-1]),
        (0, lambda header: header.replace(b" digest", b"")),
    ],
    ids=["a page of zeros", "another value", "no digest", "no end of the line", "of earlier commits"],
)
def test_a_journal_is_used_up_to_its_first_damaged_line(
    tmp_path: Path, shards: list[str], number: int, damage: Callable[[bytes], bytes]
) -> None:
    whole, journal = build_index(shards), tmp_path / "index.partial"
    with pytest.raises(Stopped):
        build_index(shards, journal=journal, progress=stop_after(12))
    lines = journal.read_bytes().splitlines(keepends=True)
    damaged = damage(lines[number])
    assert damaged != lines[number]
    journal.write_bytes(b"".join([*lines[:number], damaged, *lines[number + 1 :]]))
    with pytest.raises(Stopped):
        build_index(shards, journal=journal, progress=stop_after(0))
    assert journal.read_bytes() == b"".join(lines[: max(1, number)])
    index = build_index(shards, journal=journal)
    assert (index.shards, index.max_labels) == (whole.shards, whole.max_labels)


@pytest.mark.parametrize("num_classes", [5, 4], ids=["of other samples", "of other labels only"])
def test_a_shard_that_changed_since_is_read_again(
    tmp_path: Path, shards: list[str], num_classes: int
) -> None:
    journal = tmp_path / "index.partial"
    with pytest.raises(Stopped):
        build_index(shards, journal=journal, progress=stop_after(12))
    count = 7 if num_classes == 4 else 11
    (replaced,) = write_shards(tmp_path / "other", [count], num_classes)
    assert (Path(replaced).stat().st_size == Path(shards[0]).stat().st_size) == (count == 7)
    os.replace(replaced, shards[0])
    index = build_index(shards, journal=journal)
    assert index.shards == build_index(shards).shards and index.shards[0].num_samples == count


def test_an_index_that_cannot_be_saved_is_not_built_again_from_the_start(
    tmp_path: Path, shards: list[str], capsys
) -> None:
    build_index(shards).save(tmp_path / "elsewhere.json")
    (keys,) = tmp_path.glob("elsewhere.keys.*.npy")
    in_the_way = tmp_path / keys.name.replace("elsewhere", "index")
    in_the_way.mkdir()
    command = ["index", f"{tmp_path}/shards/*.tar", "--out", f"{tmp_path}/index.json", "--workers", "0"]
    assert main(command) == 2 and in_the_way.name in capsys.readouterr().err
    assert (tmp_path / "index.partial").read_bytes().count(b"\n") == 1 + len(shards)
    in_the_way.rmdir()
    assert main(command) == 0 and not (tmp_path / "index.partial").exists()


def test_one_command_at_a_time_makes_an_index(tmp_path: Path, shards: list[str], capsys, monkeypatch) -> None:
    monkeypatch.setattr("vitscale.system.file_lock._WAIT_SECONDS", 0.1)
    out = tmp_path / "index.json"
    command = ["index", f"{tmp_path}/shards/*.tar", "--out", str(out), "--workers", "0"]
    with journal_of(out):
        assert main(command) == 2
        assert f"another command is making {out}; wait for it, or stop it" in capsys.readouterr().err
    monkeypatch.undo()
    with ThreadPoolExecutor() as pool:
        with journal_of(out) as journal:
            waiting = pool.submit(main, command)
            time.sleep(0.2)
        assert waiting.result() == 0 and not journal.exists()


def test_a_refused_build_leaves_no_journal(tmp_path: Path, shards: list[str]) -> None:
    with pytest.raises(ConfigError), journal_of(tmp_path / "index.json") as journal:
        build_index(shards, chunk_samples=0, journal=journal)
    assert not journal.exists()


def test_a_build_with_other_chunks_is_not_resumed(tmp_path: Path, shards: list[str]) -> None:
    journal = tmp_path / "index.partial"
    with pytest.raises(Stopped):
        build_index(shards, chunk_samples=8, journal=journal, progress=stop_after(12))
    index = build_index(shards, chunk_samples=4, journal=journal)
    assert index.chunks.tolist() == build_index(shards, chunk_samples=4).chunks.tolist()


def test_what_was_allowed_to_be_damaged_is_refused_by_the_next_build(
    tmp_path: Path, shards: list[str]
) -> None:
    journal = tmp_path / "index.partial"
    Path(shards[0]).write_bytes(Path(shards[0]).read_bytes()[:4000])
    with pytest.raises(Stopped):
        build_index(shards, allow_damaged=True, journal=journal, progress=stop_after(3))
    with pytest.raises(DataError, match=r"restore the shard, .*data\.py index SHARDS --allow-damaged"):
        build_index(shards, journal=journal)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_shard_ends_the_build_with_its_sentence(shards: list[str], workers: int) -> None:
    Path(shards[5]).write_bytes(b"")
    with pytest.raises(DataError, match=r"train-000005\.tar: byte 0: the archive ends without its end mark"):
        build_index(shards, workers=workers)


def test_verify_lists_all_damage(tmp_path: Path, capsys) -> None:
    path = write_index(tmp_path / "shards", [40, 40, 40, 40])
    shards = [Path(shard.url) for shard in Index.load(str(path)).shards]
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:9000])
    data = bytearray(shards[3].read_bytes())
    data[5000] ^= 1
    shards[3].write_bytes(bytes(data))
    assert main(["verify", str(path), "--workers", "2"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0].split("/")[-1].split(" ")[0] for line in lines] == [
        "train-000000.tar",
        "train-000001.tar",  # it is broken
        "train-000001.tar",  # and was not when it was indexed
        "train-000003.tar",
    ]
    assert "does not exist" in lines[0] and "was cut" in lines[1] and "checksum differs" in lines[3]


def test_images_whose_headers_are_damaged_are_counted_as_unreadable(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    png = buffer.getvalue()
    images = [png, png[:11] + b"\5" + png[12:], png[:40]]  # in the second, a header of 5 bytes
    members = []
    for number, image in enumerate(images):
        members += [(f"s{number}.png", image), (f"s{number}.cls", b"0")]
    stats = measure(build_index([str(write_tar(tmp_path / "x.tar", members))]))
    assert (stats.unreadable, len(stats.short_sides)) == (2, 1)


@pytest.mark.parametrize("chunk_samples", [1, 16, 65_535])
def test_statistics_read_several_images_of_a_few_chunks(
    tmp_path: Path, monkeypatch, chunk_samples: int
) -> None:
    index = Index.load(str(write_index(tmp_path, [200, 3, 197], chunk_samples)))
    monkeypatch.setattr(stats, "NUM_SAMPLED", 40)
    assert 25 < len(measure(index).image_bytes) <= 40
    if chunk_samples == 16:
        before = bytes_read()
        measure(index)
        assert bytes_read() - before < index.num_bytes / 3
    monkeypatch.undo()
    assert len(measure(index).image_bytes) == index.num_samples


def bytes_read() -> int:
    """By this process so far."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def test_a_picture_of_the_data_set_is_drawn(tmp_path: Path, capsys) -> None:
    path = write_index(tmp_path / "shards", [40, 37])
    assert main(["stats", str(path), "--png", str(tmp_path / "new" / "stats.png")]) == 0
    shown = capsys.readouterr().out
    assert "2 of 37 to 40 samples" in shown and "samples per class  15 to 16" in shown
    assert f"16                 77  {'#' * stats.BAR_CHARACTERS}\n" in shown
    picture = Image.open(tmp_path / "new" / "stats.png")
    assert picture.size == (760, 940) and len(picture.getcolors(10**6) or []) > 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["index", "{shards}", "--out", "{shards}"], "does not end in .json"),
        (["index", "{shards}", "--out", "{folder}/classes.json"], "is there and is not an index; name anoth"),
        (["index", "{shards}", "--workers", "-1"], "must not be negative"),
        (["index", "{shards}", "--chunk-samples", "65536"], "from 1 to 65,535"),
        (["index", "{shards}", "--chunk-samples", "0"], "from 1 to 65,535"),
        (["index", "train-{{0..3.tar"], "without its other half"),
        (["index", "{shards}", "--out", "s3://bucket/index.json"], "is not a local path"),
        (["stats", "{index}", "--png", "stats"], "does not end in .png"),
        (
            ["dedup", "{index}", "--against", "{shards}", "--out", "{folder}/d.json", "--sheet", "x.txt"],
            ".png",
        ),
    ],
)
def test_wrong_options_are_one_sentence(tmp_path: Path, capsys, arguments: list[str], sentence: str) -> None:
    index = write_index(tmp_path, [3])
    shard = tmp_path / "train-000000.tar"
    before = shard.read_bytes()
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    try:
        status = main([text.format(shards=shard, index=index, folder=tmp_path) for text in arguments])
    except SystemExit as stopped:  # by argparse
        status = stopped.code
    assert status == 2 and sentence in capsys.readouterr().err
    assert shard.read_bytes() == before


@pytest.mark.parametrize(
    "options", [["--chunk-samples", "1"], ["--chunk-samples", "65535", "--workers", "0"]]
)
def test_options_at_their_bounds_are_accepted(tmp_path: Path, options: list[str]) -> None:
    (shard,) = write_shards(tmp_path, [3])
    out = tmp_path / "other.json"
    for _ in range(2):  # an index is replaced
        assert main(["index", shard, "--out", str(out), *options]) == 0
    assert Index.load(str(out)).num_samples == 3


def test_a_shard_whose_name_no_index_holds_is_refused_before_it_is_read(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    (folder / "a.tar").touch()  # is no tar
    arguments = ["index", f"{folder}/*.tar", "--out"]
    assert main([*arguments, str(tmp_path / "index.json")]) == 2
    assert "caf\\udce9/a.tar' is not UTF-8; rename it" in capsys.readouterr().err
    assert main([*arguments, str(folder / "index.json")]) == 2  # a relative name can be held
    assert "UTF-8" not in capsys.readouterr().err


def write_labels(folder: Path, labels: list[str]) -> str:
    """Two shards with these labels in turn; their pattern."""
    for shard in range(2):
        members = [
            (f"s{n}.{kind}", data)
            for n in range(shard, len(labels), 2)
            for kind, data in (("jpg", jpeg(n)), ("cls", labels[n].encode()))
        ]
        write_tar(folder / f"train-{shard}.tar", members)
    return str(folder / "train-*.tar")


def test_labels_that_stand_alone_are_named_with_their_samples(tmp_path: Path, capsys) -> None:
    labels = [str(n % 4) for n in range(16)] + ["999", "11", "11", "999", "12", "12", "12", "10"]
    assert main(["index", write_labels(tmp_path, labels), "--workers", "2"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("check: ")]
    assert lines == [
        f"check: label 999 stands alone among 8 labels: "
        f"{tmp_path}/train-0.tar: sample s16, {tmp_path}/train-1.tar: sample s19"
    ]  # 10 and 11 are not above twice the number of labels, and 12 has three samples
    assert main(["verify", str(tmp_path / "index.json"), "--workers", "0"]) == 0
    assert capsys.readouterr().err.splitlines() == lines


def test_labels_that_were_written_as_names_are_shown_with_them(tmp_path: Path) -> None:
    pattern = write_labels(tmp_path, ["cat", "dog", "puppy", "cat", "dog"])
    classes = {"cat": 0, "dog": 3, "puppy": 3}
    index = build_index(storage.expand(pattern), keys=SampleKeys(classes=classes))
    assert [index.named(label) for label in (0, 3, 4)] == ["0 (cat)", "3 (dog)", "4"]


def test_a_label_beyond_all_numbers_is_damage_and_named(tmp_path: Path, capsys) -> None:
    pattern = write_labels(tmp_path, ["0", "1", "0", "9" * 20])
    assert main(["index", pattern, "--workers", "0"]) == 0
    assert f"train-1.tar: sample s3, which has '{'9' * 20}')" in capsys.readouterr().err
    index = Index.load(str(tmp_path / "index.json"))
    assert index.label_counts == {0: 2, 1: 1} and index.num_damaged == 1


def test_where_all_labels_are_rare_none_stands_alone(tmp_path: Path) -> None:
    index = build_index(storage.expand(write_labels(tmp_path, ["7", "9"])))
    assert index.lone_labels == () and index.max_label == 9


@pytest.mark.parametrize(("num_high", "alone"), [(3, [1000, 1001, 1002]), (4, [])])
def test_many_high_labels_are_part_of_a_set_of_many_classes(
    tmp_path: Path, num_high: int, alone: list[int]
) -> None:
    """Of 10 labels, 3 may stand alone; of 1,000 labels, 50."""
    labels = [str(n % 10) for n in range(40)] + [str(1000 + n) for n in range(num_high)]
    index = build_index(storage.expand(write_labels(tmp_path, labels)))
    assert list(index.lone_labels) == alone


def test_a_bomb_does_not_end_the_statistics(tmp_path: Path, capsys, monkeypatch) -> None:
    index = write_index(tmp_path, [3], size=16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert main(["stats", str(index)]) == 0
    assert "3 unreadable" in capsys.readouterr().out


def test_dedup_writes_a_list_that_training_leaves_out(tmp_path: Path, capsys) -> None:
    train = write_index(tmp_path / "train", [40, 37])
    test = write_shards(tmp_path / "test", [12])  # the first twelve pictures of the training set
    out = tmp_path / "lists" / "duplicates.json"
    sheet = tmp_path / "sheet.png"
    command = ["dedup", str(train), "--against", test[0], "--out", str(out), "--sheet", str(sheet)]
    assert main([*command, "--workers", "2"]) == 0
    shown = capsys.readouterr()
    said = "up to 12 of 77 training images (15.6%) are copies of test images, 12 of them exact"
    assert said in shown.out and "warning: 15.6% is more than copies usually are" in shown.err
    assert json.loads(out.read_text())["ids"] == list(range(12))
    assert Image.open(sheet).size[0] > 500
    assert main([*command[:-3], str(tmp_path), "--workers", "0"]) == 2
    assert f"{tmp_path} is a folder; name a file in it" in capsys.readouterr().err
    one = write_shards(tmp_path / "one", [1])
    assert main(["dedup", str(train), "--against", one[0], "--out", str(out), "--workers", "0"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_verify_decodes_every_image_when_asked(tmp_path: Path, capsys) -> None:
    members = [
        (f"s{n}.{kind}", data) for n in range(6) for kind, data in (("jpg", jpeg(n, 64)), ("cls", b"1"))
    ]
    broken = bytearray(jpeg(3, 64))
    broken[len(broken) // 2 : len(broken) // 2 + 40] = bytes(40)
    members[6] = ("s3.jpg", bytes(broken))
    path = tmp_path / "index.json"
    build_index([str(write_tar(tmp_path / "x.tar", members)), *write_shards(tmp_path, [3])]).save(path)
    assert main(["verify", str(path)]) == 0
    assert main(["verify", str(path), "--decode"]) == 2
    assert "sample number 3: sample s3" in capsys.readouterr().out
