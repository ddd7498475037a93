"""Deduplication: training images that are copies of test images are found, others are not."""

import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make import write_tar
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from vitscale.curate import dedup
from vitscale.curate.dedup import find_duplicates
from vitscale.curate.duplicates import contact_sheet
from vitscale.curate.phash import MIN_DETAIL, HashTable, choose_bands, hash_luminance, luminance
from vitscale.data.decode import decode
from vitscale.data.exclusions import load_exclusions
from vitscale.data.index import Index
from vitscale.data.indexing import build_index
from vitscale.data.reader import read_samples
from vitscale.errors import ConfigError, DataError
from vitscale.stores import storage

Edit = Callable[[Image.Image], Image.Image]


def drawing(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A picture with structure: shapes of many sizes on a gradient."""
    generator = np.random.default_rng(seed)
    corners = generator.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    image = Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for shape_number in range(30):
        x, y = generator.integers(-10, size[0]), generator.integers(-10, size[1])
        width, height = generator.integers(5, 60, 2)
        colour = tuple(generator.integers(0, 256, 3).tolist())
        shape = draw.ellipse if shape_number % 2 else draw.rectangle
        shape((x, y, x + width, y + height), fill=colour)
    return image


def encode(image: Image.Image, kind: str = "JPEG", quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality)
    return buffer.getvalue()


def write_set(path: Path, images: list[bytes]) -> Index:
    """A set of one shard; sample i has the key k{i}."""
    members = []
    for number, data in enumerate(images):
        extension = "png" if data.startswith(b"\x89PNG") else "jpg"
        members += [(f"k{number:04d}.{extension}", data), (f"k{number:04d}.cls", b"0")]
    return build_index([str(write_tar(path, members))], chunk_samples=4)


def write_test_set(tmp_path: Path, images: list[bytes]) -> str:
    write_set(tmp_path / "test.tar", images)
    return str(tmp_path / "test.tar")


def crop(image: Image.Image, share: float) -> Image.Image:
    width, height = image.size
    return image.crop(
        (round(width * share), round(height * share / 2), width, round(height * (1 - share / 2)))
    )


EDITS: dict[str, Edit] = {
    "resized up": lambda image: image.resize((400, 300), Image.Resampling.BICUBIC),
    "resized down": lambda image: image.resize((64, 48), Image.Resampling.BICUBIC),
    "cropped by 2 %": lambda image: crop(image, 0.02),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.7),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edited_copies_are_found_and_paired_with_their_originals(tmp_path: Path, edit: Edit) -> None:
    against = write_test_set(tmp_path, [encode(drawing(seed)) for seed in range(20)])
    index = write_set(tmp_path / "train.tar", [encode(edit(drawing(seed)), quality=70) for seed in range(20)])
    duplicates = find_duplicates(index, [against])
    assert [(pair.train_id, pair.test_id) for pair in duplicates.pairs] == [
        (number, number) for number in range(20)
    ]
    assert not any(pair.exact for pair in duplicates.pairs)
    assert all(pair.mirrored == (edit is EDITS["mirrored"]) for pair in duplicates.pairs)


def test_equal_pixels_are_exact_copies_whatever_the_container(tmp_path: Path) -> None:
    jpegs = [encode(drawing(seed)) for seed in range(3)]
    against = write_test_set(tmp_path, jpegs)
    as_png = encode(Image.fromarray(decode(jpegs[1])), "PNG")
    index = write_set(tmp_path / "train.tar", [encode(drawing(50)), jpegs[2], as_png])
    duplicates = find_duplicates(index, [against])
    matches = [(pair.train_id, pair.test_id, pair.distance, pair.exact) for pair in duplicates.pairs]
    assert matches == [(1, 2, 0, True), (2, 1, 0, True)]


def test_different_images_are_not_matched(tmp_path: Path) -> None:
    against = write_test_set(tmp_path, [encode(drawing(seed)) for seed in range(40)])
    index = write_set(tmp_path / "train.tar", [encode(drawing(seed)) for seed in range(1000, 1040)])
    duplicates = find_duplicates(index, [against])
    assert duplicates.pairs == () and duplicates.flat == duplicates.unreadable == 0


def flat_images() -> list[Image.Image]:
    """Blank ones, and smooth ones of much variance but without detail."""
    ramp = np.linspace(0, 1, 96)[:, None, None]
    skies = [np.broadcast_to(ramp * height + blue, (96, 96, 3)) for height, blue in ((60, 90), (40, 140))]
    blanks = [np.full((96, 96, 3), level) for level in (12, 200)]
    return [Image.fromarray(pixels.astype(np.uint8)) for pixels in skies + blanks]


def test_flat_images_match_exactly_only_and_are_counted(tmp_path: Path) -> None:
    flat = flat_images()
    assert np.asarray(flat[0]).std() > 15
    against = write_test_set(tmp_path, [encode(flat[0], "PNG"), encode(flat[2], "PNG"), encode(drawing(1))])
    index = write_set(
        tmp_path / "train.tar", [encode(flat[number], "PNG") for number in (1, 2, 3)] + [encode(drawing(2))]
    )
    duplicates = find_duplicates(index, [against])
    assert duplicates.flat == 3 and duplicates.test_sets[0].flat == 2
    assert [(pair.train_id, pair.test_id, pair.exact) for pair in duplicates.pairs] == [(1, 1, True)]


def test_a_test_set_of_flat_images_alone_can_be_compared_with(tmp_path: Path) -> None:
    against = write_test_set(tmp_path, [encode(image, "PNG") for image in flat_images()])
    index = write_set(tmp_path / "train.tar", [encode(drawing(1)), encode(flat_images()[3], "PNG")])
    assert [pair.train_id for pair in find_duplicates(index, [against]).pairs] == [1]


def test_damaged_samples_are_counted_reported_and_skipped(tmp_path: Path) -> None:
    good = [encode(drawing(seed)) for seed in range(8)]
    cut, text = good[1][: len(good[1]) // 2], b"not an image"
    against = write_test_set(tmp_path, [*good[:6], cut])
    index = write_set(tmp_path / "train.tar", [good[0], text, good[2], cut, text, good[5], good[7]])
    duplicates = find_duplicates(index, [against])
    assert [pair.train_id for pair in duplicates.pairs] == [0, 2, 5]
    assert duplicates.unreadable == 3 and duplicates.test_sets[0].unreadable == 1
    for key, sentence in zip(("k0001", "k0003", "k0004"), duplicates.damage, strict=True):
        assert key in sentence and "train.tar" in sentence


def test_the_list_is_the_same_for_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup, "_RANGE", 7)  # several tasks for few images
    originals = [encode(drawing(seed)) for seed in range(12)]
    against = [write_test_set(tmp_path, [*originals, *originals[:3]])]  # ties go to the first
    train = [encode(drawing(seed), quality=50) for seed in range(6, 40)]
    index = write_set(tmp_path / "train.tar", [*train, originals[0], b"damaged"])
    progress: list[tuple[int, int]] = []
    for workers in (0, 2):
        duplicates = find_duplicates(
            index, against, workers=workers, progress=lambda *numbers: progress.append(numbers)
        )
        duplicates.save(tmp_path / f"{workers}.json")
    assert progress == 2 * [(done, 51) for done in (0, 7, 14, 15, 22, 29, 36, 43, 50, 51)]  # 15 + 36
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    assert [pair.train_id for pair in duplicates.pairs] == [0, 1, 2, 3, 4, 5, 34]


def test_a_pair_names_the_test_set_that_holds_its_image(tmp_path: Path) -> None:
    write_set(tmp_path / "a.tar", [encode(drawing(seed)) for seed in range(3)]).save(tmp_path / "a.json")
    write_set(tmp_path / "b.tar", [encode(drawing(seed)) for seed in range(3, 8)])
    index = write_set(tmp_path / "train.tar", [encode(drawing(seed), quality=60) for seed in (6, 2)])
    duplicates = find_duplicates(index, [str(tmp_path / "a.json"), str(tmp_path / "b.tar")])
    sets, pairs = duplicates.test_sets, duplicates.pairs
    named = [(sets[pair.test_set].name, pair.test_id, pair.test_key) for pair in pairs]
    assert named == [(str(tmp_path / "b.tar"), 3, "k0003"), (str(tmp_path / "a.json"), 2, "k0002")]


def numeral(digit: int, seed: int) -> Image.Image:
    """A digit as a hand might write it."""
    generator = np.random.default_rng(seed)
    image = Image.new("L", (64, 64))
    size, *place = generator.integers((40, 8, -2), (56, 24, 10))
    ImageDraw.Draw(image).text(tuple(place), str(digit), fill=255, font=ImageFont.load_default(int(size)))
    return image.rotate(float(generator.uniform(-15, 15)), Image.Resampling.BICUBIC).convert("RGB")


@pytest.mark.parametrize(
    ("distances", "threshold"),
    [
        ([], dedup.THRESHOLD),
        ([5], dedup.THRESHOLD),  # of 200 images, one may be near to another
        ([5, 12, 15], 11),
        ([24, 23], 23),
        ([3, 4], dedup.LEAST_THRESHOLD),
    ],
)
def test_the_threshold_of_a_set_lies_below_what_is_near_in_it(distances: list[int], threshold: int) -> None:
    generator, num_images = np.random.default_rng(1), 400
    hashes = generator.integers(0, 2**64, (num_images, 2), dtype=np.uint64)  # 64 bits apart or so
    stored, queried = np.array_split(np.random.default_rng(0).permutation(num_images), 2)
    for pair, distance in enumerate(distances):
        hashes[queried[pair]] = hashes[stored[pair]] ^ np.array([2**distance - 1, 0], dtype=np.uint64)
    mirrored = generator.integers(0, 2**64, (num_images, 2), dtype=np.uint64)
    every = np.ones(num_images, dtype=bool)
    digests = np.arange(num_images, dtype=np.uint64)
    images = dedup._ImageHashes([""] * num_images, digests, hashes, mirrored, every, every, [])
    assert dedup.own_threshold(images) == threshold


def test_where_images_look_alike_fewer_bits_may_differ(tmp_path: Path) -> None:
    """Drawings, which do not look alike, keep the whole threshold."""
    numerals = [numeral(n % 10, n) for n in range(500)]
    write_set(tmp_path / "a.tar", [encode(image) for image in numerals[:400]])
    write_set(tmp_path / "b.tar", [encode(drawing(seed)) for seed in range(40)])
    copies = [*numerals[:20], crop(drawing(3), 0.02)]
    train = [encode(image, quality=80) for image in [*copies, *numerals[400:]]]
    index = write_set(tmp_path / "train.tar", train)
    against = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    duplicates = find_duplicates(index, against)
    assert duplicates.test_sets[0].threshold < duplicates.test_sets[1].threshold == dedup.THRESHOLD
    found = [pair.train_id for pair in duplicates.pairs]
    assert found[:21] == list(range(21)) and len(found) < 31
    assert len(find_duplicates(index, against, threshold=dedup.THRESHOLD).pairs) > 71


def near_hashes(
    generator: np.random.Generator, hashes: np.ndarray, count: int, most_flips: int
) -> np.ndarray:
    """Some of the hashes with up to `most_flips` bits flipped."""
    bits = np.unpackbits(generator.choice(hashes, count).view(np.uint8), axis=1)
    for row in bits:
        row[generator.choice(128, generator.integers(0, most_flips + 1), replace=False)] ^= 1
    return np.packbits(bits, axis=1).view(np.uint64)


@pytest.mark.parametrize("num_hashes", [1, 500, 30_000])
@pytest.mark.parametrize("threshold", [0, 1, 7, 20, 32])
def test_the_banded_search_equals_brute_force(num_hashes: int, threshold: int) -> None:
    generator = np.random.default_rng(threshold)
    hashes = generator.integers(0, 2**64, (num_hashes, 2), dtype=np.uint64)
    hashes[num_hashes // 2] = hashes[0]  # of equal hashes the first must be returned
    queries = np.concatenate(
        [
            near_hashes(generator, hashes, 60, threshold + 3),
            generator.integers(0, 2**64, (20, 2), dtype=np.uint64),
        ]
    )
    all_distances = np.bitwise_count(queries[:, None] ^ hashes).sum(axis=2, dtype=np.int64)  # [q, n]
    equal = np.full(num_hashes, threshold, dtype=np.uint8)
    for thresholds in (equal, generator.integers(0, threshold + 1, num_hashes, dtype=np.uint8)):
        numbers, distances = HashTable(hashes, thresholds).nearest(queries)
        allowed = np.where(all_distances <= thresholds, all_distances, 999)
        within = allowed.min(axis=1) < 999
        assert within.any() or (thresholds is not equal and not within.all())
        np.testing.assert_array_equal(numbers, np.where(within, allowed.argmin(axis=1), -1))
        np.testing.assert_array_equal(distances, np.where(within, allowed.min(axis=1), -1))


@pytest.mark.parametrize("num_hashes", [1, 10_000, 10_000_000])
def test_bands_do_not_overlap_and_miss_no_near_hash(num_hashes: int) -> None:
    for threshold in range(33):
        bands = choose_bands(threshold, num_hashes)
        assert sum(band.radius + 1 for band in bands) > threshold
        assert all(band.start + band.bits <= after.start for band, after in itertools.pairwise(bands))
        assert bands[-1].start + bands[-1].bits <= 128


def test_mirror_hash_is_the_hash_of_the_mirror_image() -> None:
    grey = np.stack([luminance(np.asarray(drawing(seed))) for seed in range(10)])
    _, mirrored, detail = hash_luminance(grey)
    np.testing.assert_array_equal(hash_luminance(np.ascontiguousarray(grey[:, :, ::-1]))[0], mirrored)
    assert detail.min() > MIN_DETAIL


@pytest.fixture
def listed(tmp_path: Path) -> tuple[Index, Path]:
    """A training set of which images 1 and 3 are copies, and its list."""
    against = write_test_set(tmp_path, [encode(drawing(seed)) for seed in (1, 3)])
    index = write_set(tmp_path / "train.tar", [encode(drawing(seed), quality=80) for seed in range(5)])
    find_duplicates(index, [against]).save(tmp_path / "duplicates.json")
    return index, tmp_path / "duplicates.json"


def test_the_list_is_read_back(listed: tuple[Index, Path]) -> None:
    index, path = listed
    ids = load_exclusions(str(path), index)
    assert ids.tolist() == [1, 3] and ids.dtype == np.int64
    values = json.loads(path.read_text())
    assert (values["format"], values["version"], values["num_samples"]) == ("vitscale-exclude", 1, 5)
    assert [pair["match"]["key"] for pair in sorted(values["pairs"], key=lambda pair: pair["id"])] == [
        "k0000",
        "k0001",
    ]
    assert values["pairs"][0]["shard"] == index.shards[0].url


def test_a_list_of_other_shards_is_refused(tmp_path: Path, listed: tuple[Index, Path]) -> None:
    other = write_set(tmp_path / "other.tar", [encode(drawing(seed)) for seed in range(5)])
    with pytest.raises(DataError, match="made for other shards"):
        load_exclusions(str(listed[1]), other)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "vitscale-index"}, "format vitscale-index 1, not"),
        ({"version": 2}, "format vitscale-exclude 2, not"),
        ({"ids": [3, 1]}, "do not rise"),
        ({"ids": [1, 1]}, "do not rise"),
        ({"ids": [1, 5]}, "within the 5 samples"),
        ({"ids": [-1]}, "do not rise"),
        ({"ids": [1.5]}, "do not rise"),
        ({"ids": [[1], [3]]}, "do not rise"),
        ({"ids": None}, "do not rise"),
    ],
    ids=str,
)
def test_a_damaged_or_foreign_list_is_refused(
    listed: tuple[Index, Path], change: dict[str, object], sentence: str
) -> None:
    index, path = listed
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values))
    assert len(load_exclusions(str(path), index)) == 2
    path.write_text(json.dumps(values | change))
    with pytest.raises(DataError, match=sentence):
        load_exclusions(str(path), index)


def test_a_cut_missing_or_senseless_list_is_refused(listed: tuple[Index, Path]) -> None:
    index, path = listed
    assert len(load_exclusions(str(path), index)) == 2
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"[1, 3]", b"\xff\xd8", b"{}"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="damaged, or not an exclusion list"):
            load_exclusions(str(path), index)
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        load_exclusions(str(path), index)


def test_the_sheet_shows_the_most_doubtful_pairs(tmp_path: Path) -> None:
    against = write_test_set(tmp_path, [encode(drawing(seed)) for seed in range(30)])
    edits: list[Edit] = [lambda image: image, lambda image: crop(image, 0.02)]
    train = [encode(edits[seed % 2](drawing(seed)), quality=60) for seed in range(30)]
    duplicates = find_duplicates(write_set(tmp_path / "train.tar", train), [against])
    sheet = contact_sheet(duplicates)
    heights = [contact_sheet(duplicates, count).height for count in (0, 1, 5)]
    assert sheet.height - heights[0] == 6 * (heights[1] - heights[0]) > 0  # 24 pairs in rows of 4
    assert heights[2] - heights[0] == 2 * (heights[1] - heights[0])
    assert np.asarray(sheet).std() > 20


@pytest.mark.parametrize(
    ("refused", "accepted", "sentence"),
    [
        ({"threshold": 33}, {"threshold": 32}, "--threshold 33"),
        ({"threshold": -1}, {"threshold": 0}, "--threshold -1"),
        ({"workers": -1}, {"workers": 0}, "--workers -1"),
        ({"against": []}, {}, "no test set"),
    ],
    ids=str,
)
def test_options_outside_their_range_are_refused(
    tmp_path: Path, refused: dict[str, Any], accepted: dict[str, Any], sentence: str
) -> None:
    options = {"against": [write_test_set(tmp_path, [encode(drawing(1))])]}
    index = write_set(tmp_path / "train.tar", [encode(drawing(1))])
    assert len(find_duplicates(index, **{**options, **accepted}).pairs) == 1
    with pytest.raises(ConfigError, match=sentence):
        find_duplicates(index, **{**options, **refused})


def test_copies_of_real_photographs_are_found_and_no_others(shared_data: Path, tmp_path: Path) -> None:
    photos = build_index(storage.expand(str(shared_data / "imagenet_samples" / "train-*.tar"))[:1])
    if photos.num_samples < 60:
        pytest.skip(f"{shared_data}/imagenet_samples has {photos.num_samples} photographs, not 60")
    images = [Image.fromarray(decode(sample.image)) for sample in read_samples(photos, range(30))]
    against = write_test_set(tmp_path, [encode(crop(image, 0.01), quality=60) for image in images])
    duplicates = find_duplicates(photos, [against])
    assert [(pair.train_id, pair.test_id) for pair in duplicates.pairs] == [
        (number, number) for number in range(30)
    ]
