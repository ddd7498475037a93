"""Decoding and augmentation: strict about damage, exact about geometry, keyed by the sample."""

import io
import itertools
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from make import jpeg
from PIL import Image

from vitscale import rng
from vitscale.data import decode as decoding
from vitscale.data.crops import inception_crop
from vitscale.data.decode import DamagedImage, Decoder, decode, resolve_decoder
from vitscale.data.transforms import (
    AugmentConfig,
    ViewKey,
    augment,
    choose_box,
    evaluation_view,
    finish_views,
    normalize,
    resize,
)
from vitscale.errors import ConfigError

ASPECTS = (0.75, 4 / 3)


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


def test_resize_is_antialiased_bilinear() -> None:
    pixels = decode(jpeg(3, size=64))
    ours = resize(pixels, 16, 24).permute(1, 2, 0).numpy().astype(int)
    pillow = np.asarray(Image.fromarray(pixels).resize((24, 16), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(ours - pillow).max() <= 1
    assert np.array_equal(resize(pixels, 64, 64).permute(1, 2, 0).numpy(), pixels)


def test_inception_crops_keep_to_area_and_aspect() -> None:
    areas = []
    for sample in range(300):
        top, left, height, width = inception_crop(
            90, 120, (0.2, 0.5), ASPECTS, rng.uniform(40, 0, "crop", 0, sample)
        )
        assert 0 <= top <= 90 - height and 0 <= left <= 120 - width
        assert 0.73 < width / height < 1.36
        areas.append(height * width / (90 * 120))
    assert 0.19 < min(areas) < 0.22 and 0.48 < max(areas) < 0.51 and abs(np.mean(areas) - 0.35) < 0.02


def test_an_image_that_no_crop_fits_is_taken_whole() -> None:
    draws = rng.uniform(40, 0, "crop", 0, 0)
    assert inception_crop(10, 1000, (0.9, 1.0), ASPECTS, draws) == (0, 0, 10, 1000)


def test_the_view_belongs_to_seed_epoch_and_sample() -> None:
    pixels = decode(jpeg(1, size=40))
    views = {
        key: augment(pixels, AugmentConfig(), 16, ViewKey(*key))
        for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1))
    }
    assert torch.equal(views[0, 0, 0], augment(pixels, AugmentConfig(), 16, ViewKey(0, 0, 0)))
    others = [view for key, view in views.items() if key != (0, 0, 0)]
    assert not any(torch.equal(views[0, 0, 0], other) for other in others)


def test_half_of_the_views_are_flipped_and_padding_shifts_by_up_to_its_size() -> None:
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    plain = resize(pixels, 8, 8)
    views = [augment(pixels, AugmentConfig(crop="resize"), 8, ViewKey(0, 0, n)) for n in range(400)]
    flipped = sum(torch.equal(view, plain.flip(-1)) for view in views)
    assert flipped + sum(torch.equal(view, plain) for view in views) == 400 and 160 < flipped < 240
    config = AugmentConfig(crop="pad", pad=2, flip=False)
    padded = {augment(pixels, config, 8, ViewKey(0, 0, n)).numpy().tobytes() for n in range(400)}
    assert len(padded) == 25


@pytest.mark.parametrize("pad", [0, 1, 3, 8, 20])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("fill", ["black", "grey"])
def test_many_views_at_once_are_those_of_each_sample_alone(pad: int, flip: bool, fill: str) -> None:
    """Each is the padded square, cut at its own draws and flipped by its own draw."""
    squares = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    config = AugmentConfig(crop="pad", pad=pad, flip=flip, pad_fill=fill)
    keys = [ViewKey(2**63 + 5, epoch=n % 3, sample=2**40 + n, view=n % 2) for n in range(40)]
    views = finish_views(list(squares), config, keys)
    assert views.is_contiguous()
    for view, square, key in zip(views, squares, keys, strict=True):
        padded = F.pad(
            torch.from_numpy(square).permute(2, 0, 1), [pad] * 4, value={"black": 0, "grey": 128}[fill]
        )
        top, left = (int(draw * (2 * pad + 1)) for draw in key.uniform(2, "crop"))
        expected = padded[:, top : top + 8, left : left + 8]
        if flip and key.uniform(1, "flip")[0] < 0.5:
            expected = expected.flip(-1)
        assert torch.equal(view, expected)
        assert torch.equal(view, finish_views([square], config, [key])[0])


def test_views_that_are_no_squares_are_shifted_and_flipped_within_their_own_sides() -> None:
    """Of 2 x 3 pixels, padded by 1 pixel: each of the 3 x 3 shifts, and its mirror image."""
    box = np.arange(1, 7, dtype=np.uint8).reshape(2, 3, 1).repeat(3, 2)
    config = AugmentConfig(crop="pad", pad=1)
    views = finish_views([box] * 300, config, [ViewKey(0, 0, sample) for sample in range(300)])
    assert views.shape == (300, 3, 2, 3)
    rows = [[0, 0, 0, 0, 0], [0, 1, 2, 3, 0], [0, 4, 5, 6, 0], [0, 0, 0, 0, 0]]
    windows = [[row[left : left + 3] for row in rows[top : top + 2]] for top in range(3) for left in range(3)]
    expected = {str(window) for window in windows} | {str([row[::-1] for row in w]) for w in windows}
    assert {str(view[0].tolist()) for view in views} == expected and len(expected) == 18


def test_a_crop_is_chosen_as_for_a_square_and_resized_to_both_sides() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    config = AugmentConfig(flip=False)
    for sample in range(5):
        key = ViewKey(0, 0, sample)
        top, left, height, width = choose_box(config, key, 40, 60)
        expected = resize(pixels[top : top + height, left : left + width], 6, 9)
        assert torch.equal(augment(pixels, config, (6, 9), key), expected)
    assert torch.equal(
        augment(pixels, AugmentConfig(crop="resize", flip=False), (6, 9), key), resize(pixels, 6, 9)
    )


def test_a_config_that_does_not_say_pads_black() -> None:
    pixels = np.full((8, 8, 3), 255, dtype=np.uint8)
    corners = {}
    for name, config in {
        "absent": AugmentConfig(crop="pad"),
        "black": AugmentConfig(crop="pad", pad_fill="black"),
        "grey": AugmentConfig(crop="pad", pad_fill="grey"),
    }.items():
        views = torch.stack([augment(pixels, config, 8, ViewKey(0, 0, n)) for n in range(20)])
        corners[name] = set(views.unique().tolist()) - {255}
    assert corners == {"absent": {0}, "black": {0}, "grey": {128}}
    grey = torch.full((1, 3, 1, 1), 128, dtype=torch.uint8)
    assert normalize(grey, torch.float32).abs().max() < 0.004


def test_evaluation_views_and_normalisation() -> None:
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 10:30] = 255
    assert evaluation_view(pixels, "resize", 14).shape == (3, 14, 14)
    squeezed = evaluation_view(pixels, "resize_center", 14)
    assert torch.equal(squeezed, resize(pixels, 16, 16)[:, 1:15, 1:15])
    assert (evaluation_view(pixels, "center", 14) == 255).all()
    levels = normalize(torch.tensor([0, 255, 127], dtype=torch.uint8).reshape(1, 3, 1, 1), torch.float32)
    assert levels.flatten().tolist() == pytest.approx([-1.0, 1.0, -0.5 / 127.5])


@pytest.mark.usefixtures("without_type_checks")
def test_an_evaluation_view_takes_no_other_word_for_a_crop() -> None:
    with pytest.raises(AssertionError, match="centre"):
        evaluation_view(np.zeros((8, 8, 3), dtype=np.uint8), "centre", 8)  # pyright: ignore[reportArgumentType]


def test_evaluation_views_that_are_no_squares() -> None:
    """By hand. 14 x 7 of an image of 32 x 32: it is resized to cover 16 x 8, so to 16 x 16, and
    rows 1 to 15 and columns 4 to 11 are kept. 7 x 14 of 20 x 32 (8 x 16 to cover): 10 x 16.
    Squeezed, it is 16 x 8 before the crop.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert torch.equal(evaluation_view(pixels, "resize", (14, 7)), resize(pixels, 14, 7))
    tall = evaluation_view(pixels, "resize_center", (14, 7))
    assert torch.equal(tall, resize(pixels, 16, 8)[:, 1:15, 0:7])
    tall = evaluation_view(pixels, "center", (14, 7))
    assert torch.equal(tall, resize(pixels, 16, 16)[:, 1:15, 4:11])
    wide = evaluation_view(pixels[:20], "center", (7, 14))
    assert torch.equal(wide, resize(pixels[:20], 10, 16)[:, 1:8, 1:15])
    square = evaluation_view(pixels[:20], "center", (14, 14))
    assert torch.equal(square, evaluation_view(pixels[:20], "center", 14))


def test_the_middle_of_a_very_long_image_is_enough() -> None:
    """As a whole, 1 x 65,000 pixels of size 224 would be resized to 256 x 16,640,000: 13 GB."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 65_000, 3), dtype=np.uint8)
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (num_pages * resource.getpagesize() + (2 << 30), limits[1]))
    try:
        view = evaluation_view(pixels, "center", 224)
        turned = evaluation_view(pixels.transpose(1, 0, 2), "center", 224)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert torch.equal(view, evaluation_view(pixels[:, 32_450:32_550], "center", 224))
    assert torch.equal(turned, evaluation_view(pixels[:, 32_450:32_550].transpose(1, 0, 2), "center", 224))
    whole = resize(pixels[:, 32_400:32_600], 16, 3200)[:, 1:15, 1593:1607]
    assert torch.equal(evaluation_view(pixels[:, 32_400:32_600], "center", 14), whole)


def box_of(sample: int):
    return lambda h, w: inception_crop(h, w, (0.05, 1.0), ASPECTS, rng.uniform(40, 0, "crop", 0, sample))


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


def test_distortions_come_in_their_order_and_leave_the_size() -> None:
    pixels = decode(jpeg(1, size=40))
    plain = augment(pixels, AugmentConfig(), 32, ViewKey(0, 0, 7))
    for change in (
        {"randaugment": "augreg", "randaugment_ops": 3},
        {"randaugment": "deit", "randaugment_magnitude": 9.0, "randaugment_magnitude_std": 0.5},
        {"color_jitter": 0.4},
        {"random_erasing": 1.0},
    ):
        view = augment(pixels, AugmentConfig(**change), 32, ViewKey(0, 0, 7))
        assert view.shape == (3, 32, 32) and view.dtype == torch.uint8 and view.is_contiguous()
        assert not torch.equal(view, plain)


@pytest.mark.parametrize(
    ("accepted", "refused", "sentence"),
    [
        ({"crop_area": (0.1, 1.0)}, {"crop_area": (0.0, 1.0)}, "must rise within"),
        ({"crop_area": (0.5, 0.5)}, {"crop_area": (0.5, 0.4)}, "must rise within"),
        ({"crop_area": (0.5, 1.0)}, {"crop_area": (0.5, 1.1)}, "must rise within"),
        ({"crop_aspect": (1.0, 1.0)}, {"crop_aspect": (1.0, 0.9)}, "must rise from above 0"),
        ({"crop_aspect": (0.1, 1.0)}, {"crop_aspect": (0.0, 1.0)}, "must rise from above 0"),
        ({"repeats": 1}, {"repeats": 0}, "augment.repeats"),
        ({"pad": 0}, {"pad": -1}, "augment.pad -1 must not be negative"),
        ({"color_jitter": 1.5}, {"color_jitter": -0.1}, "augment.color_jitter -0.1 must not be negative"),
        ({"mixup": 0.8}, {"mixup": -0.8}, "augment.mixup -0.8 and augment.cutmix 0.0 must not be"),
        ({"cutmix": 1.0}, {"cutmix": -1.0}, "augment.mixup 0.0 and augment.cutmix -1.0 must not be"),
        ({"cutmix_share": 1.0}, {"cutmix_share": 1.1}, "augment.cutmix_share 1.1 must lie in"),
        ({"random_erasing": 0.0}, {"random_erasing": -0.1}, "augment.random_erasing -0.1 must lie in"),
    ],
)
def test_an_augment_config_out_of_bounds_is_refused(accepted: dict, refused: dict, sentence: str) -> None:
    AugmentConfig(**accepted)
    with pytest.raises(ConfigError, match=sentence):
        AugmentConfig(**refused)


def test_only_deit_varies_the_magnitude() -> None:
    AugmentConfig(randaugment="deit", randaugment_magnitude_std=0.5)
    with pytest.raises(ConfigError, match="has no deviation"):
        AugmentConfig(randaugment="augreg", randaugment_magnitude_std=0.5)
