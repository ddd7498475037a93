"""Decoding: strict about damage, and exact about the pixels of a crop."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from make import jpeg
from PIL import Image

from vitscale import rng
from vitscale.data import decode as decoding
from vitscale.data.crops import inception_crop
from vitscale.data.decode import DamagedImage, Decoder, decode, resolve_decoder
from vitscale.errors import ConfigError


def encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "form"),
    [("RGB", "PNG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "WEBP"), ("CMYK", "JPEG"), ("L", "JPEG")],
)
def test_every_kind_of_image_becomes_rgb(mode: str, form: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    pixels = decode(encoded(image, form))
    assert pixels.shape == (9, 7, 3) and pixels.dtype == np.uint8
    if form == "PNG":
        assert np.array_equal(pixels, np.asarray(image.convert("RGB")))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks, by name and content."""
    parts = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# Colours from a palette that is not there; Pillow's words for it are an AssertionError.
WITHOUT_PALETTE = png(
    (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 3, 0, 0, 0)),
    (b"tRNS", bytes(1)),
    (b"IDAT", zlib.compress(bytes(20))),
    (b"IEND", b""),
)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>",
        jpeg(0)[:150],
        b"\xff\xd8\xff",
        encoded(Image.new("RGB", (9, 9)), "PNG")[:40],
        WITHOUT_PALETTE,
    ],
)
def test_damage_is_an_error_not_a_picture(data: bytes) -> None:
    with pytest.raises(DamagedImage):
        decode(data)


def test_every_flipped_bit_of_a_png_is_noticed() -> None:
    """Many leave a stream that inflates, to other pixels: only the chunk's checksum differs."""
    grey = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    data = encoded(Image.fromarray(grey), "PNG")
    assert np.array_equal(decode(data)[..., 0], grey)
    for bit in range(8 * (len(data) - 12)):  # the last chunk, of 12 bytes, has no content
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedImage):
            decode(bytes(damaged))


def test_garbage_inside_a_jpeg_is_noticed() -> None:
    data = jpeg(5, size=128)
    with pytest.raises(DamagedImage):
        decode(data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :])


def test_a_bomb_is_refused_by_its_header(monkeypatch) -> None:
    images = jpeg(0, 16), encoded(Image.new("RGB", (16, 16)), "PNG")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 256)
    assert [decode(data).shape for data in images] == [(16, 16, 3)] * 2
    monkeypatch.setattr(decoding, "MAX_PIXELS", 255)
    for data in images:
        with pytest.raises(DamagedImage, match="16 x 16 pixels; at most 255 are decoded"):
            decode(data)


def jpeg_of_scans(num_scans: int) -> bytes:
    """A valid progressive JPEG of 8 x 8 grey pixels: a scan of the DC, others of AC bits."""

    def segment(marker: int, *values: int) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(values) + 2) + bytes(values)

    def scan(first: int, before: int, after: int) -> bytes:
        return segment(0xDA, 1, 1, 0, first, first, before << 4 | after) + b"\x7f"  # one bit, a 0

    bits = [(0, 7), *((bit + 1, bit) for bit in range(6, -1, -1))]  # the highest first
    scans = [(ac, before, after) for ac in range(1, 64) for before, after in bits]
    code = [1, *[0] * 15, 0]  # of one bit, for a DC of 0 or the end of a block
    return b"".join(
        [
            b"\xff\xd8",
            segment(0xDB, 0, *[1] * 64),
            segment(0xC2, 8, 0, 8, 0, 8, 1, 1, 0x11, 0),
            segment(0xC4, 0x00, *code),
            segment(0xC4, 0x10, *code),
            scan(0, 0, 0),
            *itertools.starmap(scan, scans[: num_scans - 1]),
            b"\xff\xd9",
        ]
    )


@pytest.mark.parametrize("decoder", ["turbojpeg", "simplejpeg"])
def test_a_jpeg_of_very_many_scans_is_refused(decoder: Decoder) -> None:
    assert decode(jpeg_of_scans(100), decoder=decoder).shape == (8, 8, 3)
    with pytest.raises(DamagedImage, match="more than 100 scans"):
        decode(memoryview(jpeg_of_scans(101)), decoder=decoder)
    appended = b"\xff\xda" * 200 + b"\xff\xd9"  # as a phone appends a film
    assert decode(jpeg(0, size=16) + appended, decoder=decoder).shape == (16, 16, 3)


def box_of(sample: int):
    return lambda h, w: inception_crop(
        h, w, (0.05, 1.0), (0.75, 4 / 3), rng.uniform(40, 0, "crop", 0, sample)
    )


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "keep_grey"])
@pytest.mark.parametrize("progressive", [False, True])
def test_decoding_only_the_crop_gives_the_same_pixels(subsampling: str, progressive: bool) -> None:
    """libjpeg-turbo's partial decode equals simplejpeg's whole one bit for bit, anywhere."""
    if resolve_decoder("auto") != "turbojpeg":
        pytest.skip("libjpeg-turbo 3 is not installed: pip install turbojpeg")
    draws = np.random.default_rng(0)
    for _ in range(25):
        height, width = draws.integers(1, 130, 2)
        pixels = draws.integers(0, 256, (max(1, height // 5), max(1, width // 5), 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((int(width), int(height)))
        options = {"quality": 90, "progressive": progressive}
        if subsampling == "keep_grey":
            image = image.convert("L")
        else:
            options["subsampling"] = subsampling
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", **options)
        for sample in range(4):
            partial = decode(buffer.getvalue(), box_of(sample), "turbojpeg")
            assert np.array_equal(partial, decode(buffer.getvalue(), box_of(sample), "simplejpeg"))


@pytest.mark.parametrize("decoder", ["turbojpeg", "simplejpeg"])
def test_a_jpeg_cut_behind_the_crop_is_noticed_too(decoder: str) -> None:
    if resolve_decoder("auto") != "turbojpeg":
        pytest.skip("libjpeg-turbo 3 is not installed: pip install turbojpeg")
    data = jpeg(5, size=128)
    assert decode(data, lambda h, w: (0, 0, 8, 8), decoder).shape == (8, 8, 3)
    for cut in (len(data) // 2, len(data) - 40, len(data) - 1):
        with pytest.raises(DamagedImage):
            decode(data[:cut], lambda h, w: (0, 0, 8, 8), decoder)


@pytest.mark.parametrize("decoder", ["turbojpeg", "simplejpeg"])
def test_a_damaged_header_does_not_touch_the_images_after_it(decoder: str) -> None:
    if resolve_decoder("auto") != "turbojpeg":
        pytest.skip("libjpeg-turbo 3 is not installed: pip install turbojpeg")
    whole = jpeg(0)
    table = whole.index(b"\xff\xdb")
    before = decode(whole, decoder=decoder)
    with pytest.raises(DamagedImage, match="extraneous bytes"):
        decode(whole[:table] + bytes(60) + whole[table:], decoder=decoder)
    np.testing.assert_array_equal(decode(whole, decoder=decoder), before)
    with pytest.raises(DamagedImage):  # nor is it given the tables of the image before it
        decode(whole.replace(b"\xff\xdb", b"\xff\xec"), decoder=decoder)


def test_sixteen_bits_of_grey_keep_their_upper_eight() -> None:
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = decode(encoded(Image.fromarray(levels), "PNG"))
    assert np.array_equal(pixels[..., 0], (levels >> 8).astype(np.uint8))
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_an_animation_is_refused_by_name(form: str) -> None:
    still, *others = [Image.new("RGB", (9, 9), (40 * n, 0, 0)) for n in range(3)]
    assert decode(encoded(still, form)).shape == (9, 9, 3)
    buffer = io.BytesIO()
    still.save(buffer, form, save_all=True, append_images=others)
    with pytest.raises(DamagedImage, match="an animation of 3 frames"):
        decode(buffer.getvalue())


def test_the_decoder_that_a_run_names_must_be_installed(monkeypatch) -> None:
    monkeypatch.setattr(decoding, "open_turbojpeg", lambda: None)
    assert resolve_decoder("auto") == resolve_decoder("simplejpeg") == "simplejpeg"
    with pytest.raises(ConfigError, match=r"pip install turbojpeg"):
        resolve_decoder("turbojpeg")
