"""The images that packing makes: shrunk ones, and the drawn ones of the demo."""

import io
from pathlib import Path

import numpy as np
import pytest
from make import jpeg
from PIL import Image

from vitscale.curate.pack.demo import COLOURS, KINDS, digit_samples, recorded, shape_samples
from vitscale.curate.pack.encode import shrink
from vitscale.data.decode import decode


def test_larger_images_are_encoded_to_the_short_side_and_smaller_ones_kept() -> None:
    stripes = np.zeros((300, 450, 3), np.uint8)
    stripes[::2] = 255  # finer than the small image can show: it must come out grey, without moiré
    stripes[:, 225:, 1:] = 0
    buffer = io.BytesIO()
    Image.fromarray(stripes).save(buffer, "PNG")
    small = shrink(buffer.getvalue(), 100, 90)
    image = Image.open(io.BytesIO(small))
    assert (image.format, image.size) == ("JPEG", (150, 100))
    pixels = decode(small)[10:-10].astype(int)
    assert np.abs(pixels[:, :60] - 128).max() < 12
    assert np.abs(pixels[:, 90:] - [128, 0, 0]).max() < 25
    assert len(shrink(buffer.getvalue(), 100, 50)) < len(small)
    assert shrink(small, 100, 90) == small and shrink(jpeg(1), 100, 90) == jpeg(1)
    tall = io.BytesIO()
    Image.new("L", (90, 1001)).save(tall, "JPEG")
    assert Image.open(io.BytesIO(shrink(tall.getvalue(), 30, 90))).size == (30, 334)


def test_the_luma_is_whole_and_the_chroma_halved() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (10, 200, 30)).save(buffer, "PNG")
    image = Image.open(io.BytesIO(shrink(buffer.getvalue(), 32, 90)))
    assert [layer[1:3] for layer in image.layer] == [(2, 2), (1, 1), (1, 1)]  # pyright: ignore


def test_demo_shapes_are_deterministic_and_their_labels_cover_all_classes() -> None:
    samples = list(shape_samples(0, 400, "class"))
    assert [s.image for s in samples[:20]] == [s.image for s in shape_samples(0, 20, "class")]
    assert {s.labels[0] for s in samples} == set(range(len(KINDS) * len(COLOURS)))
    for label in ("count", "position", "orientation"):
        assert {s.labels[0] for s in shape_samples(1, 60, label)} == {0, 1, 2, 3}
    assert Image.open(io.BytesIO(samples[0].image)).size == (48, 48)


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"version": 1}', "\udcff", None])
def test_a_demo_without_a_whole_record_is_not_complete(tmp_path: Path, content: str | None) -> None:
    record = tmp_path / "demo.json"
    if content is not None:
        record.write_text(content, errors="surrogateescape")
    assert recorded(record) is None
    record.write_text('{"version": 1, "sets": {"digits/train": 3}}')
    assert recorded(record) == {"digits/train": 3}


def test_demo_digits_are_all_of_scikit_learns_once() -> None:
    keys = [s.key for split in ("train", "test") for s in digit_samples(split)]
    assert len(keys) == len(set(keys)) == 1797
