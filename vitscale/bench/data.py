"""`tools/bench.py data`: how fast one core reads, decodes and augments.

The baselines are Pillow, webdataset and the decoder alone. All are measured in CPU seconds of
this process, over the same images and crops, in interleaved rounds. Each figure is a median
over the rounds, so that other work on the machine spoils neither the figures nor their ratios.
"""

import dataclasses
import functools
import io
import time
import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from webdataset.compat import WebDataset

from vitscale.config import positive
from vitscale.data.data_config import DataConfig
from vitscale.data.decode import Decoder, decode, resolve_decoder
from vitscale.data.index import Index
from vitscale.data.indexing import open_index
from vitscale.data.lane import ViewConfig
from vitscale.data.loader import Stream, batches, pad_labels
from vitscale.data.reader import read_chunk
from vitscale.data.samples import RawSample
from vitscale.data.sources import Source, make_mixture
from vitscale.data.transforms import (
    AugmentConfig,
    ViewKey,
    choose_box,
    finish_views,
    resize,
    resize_box,
)
from vitscale.data.workers import reuse_memory
from vitscale.stores import storage

BATCH, LANES = 64, 16
READ_PASSES = 5  # one pass of reading takes a tenth of a second, too short to be timed
MIN_SAMPLES = 960  # smaller sets are repeated, so that their lanes are longer than a few chunks
Measure = Callable[[int], int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataBench:
    """What is measured.

    shards: a glob or brace pattern, or an index.json.
    image_size: of the views, in pixels.
    crop: how they are cut out, as in augment.crop; all of them are also flipped.
    rounds: each figure is a median over them.
    """

    shards: str
    image_size: int = 224
    crop: Literal["inception", "tensorflow", "torchvision", "proportional", "pad", "resize"] = "inception"
    rounds: int = 5

    def __post_init__(self) -> None:
        positive("", **{"--rounds": self.rounds, "--image-size": self.image_size})


def run(config: DataBench, progress: Callable[[str], None]) -> dict[str, Any]:
    """Images per CPU second, the ratios that matter, fidelity to Pillow, where time goes."""
    torch.set_num_threads(1)
    reuse_memory()  # as the loader's workers do; all that is measured profits from it
    progress(f"reading {config.shards}")
    index = _open(config.shards)
    samples = [sample for chunk in range(len(index.chunks)) for sample in read_chunk(index, chunk)]
    images = [sample for sample in samples if isinstance(sample, RawSample)]
    size, decoder = config.image_size, resolve_decoder("auto")
    augment = AugmentConfig(crop=config.crop)
    urls = [storage.local_path(shard.url) for shard in index.shards]
    ways: dict[str, Measure] = {
        "loader": functools.partial(_loader, index, augment, size, decoder),
        "loader, simplejpeg": functools.partial(_loader, index, augment, size, "simplejpeg"),
        "webdataset, same decode and crop": functools.partial(_webdataset, urls, augment, size, decoder),
        "Pillow decode + crop + resize": functools.partial(_pillow, images, augment, size),
        "decoder alone, whole image": functools.partial(_decode_whole, images, decoder),
        "decoder alone, crop": functools.partial(_decode_crops, images, augment, decoder),
        "tar reading, vitscale": functools.partial(_read, index),
        "tar reading, webdataset": functools.partial(_read_webdataset, urls),
    }
    speeds = {name: [] for name in ways}
    for round_index in range(config.rounds + 1):  # round 0 warms up caches and is not counted
        for name, way in ways.items():
            progress(f"round {round_index} of {config.rounds}: {name}")
            began = time.process_time()
            count = way(round_index)
            if round_index:
                speeds[name].append(count / (time.process_time() - began))
    medians = {name: median(values) for name, values in speeds.items()}
    progress("the pixels beside Pillow's, and where the time goes")
    return {
        "images": len(images),
        "kilobytes_per_image": index.num_bytes / 1e3 / max(1, len(images)),
        "decoder": decoder,
        "images_per_core_second": medians,
        "ratios": _ratios(medians),
        **fidelity(images, augment, size, decoder),
        "share_of_the_loader": _shares(index, images, augment, size, decoder, medians["loader"]),
    }


def fidelity(
    images: Sequence[RawSample], augment: AugmentConfig, size: int, decoder: Decoder
) -> dict[str, float]:
    """PSNR in dB of our views against Pillow's antialiased bilinear ones of the same crops."""
    values = []
    for sample_id, sample in enumerate(images):
        key = ViewKey(0, 0, sample_id)
        box = functools.partial(choose_box, augment, key)
        ours = resize(decode(sample.image, box, decoder), size, size).permute(1, 2, 0).numpy()
        error = np.square(ours.astype(np.float64) - _pillow_view(sample, box, size)).mean()
        values.append(10 * np.log10(255**2 / error) if error else 99.0)
    return {"psnr_to_pillow_mean_db": float(np.mean(values)), "psnr_to_pillow_worst_db": float(min(values))}


def _open(shards: str) -> Index:
    """The index, repeated until it has MIN_SAMPLES."""
    index = open_index(shards)
    times = -(-MIN_SAMPLES // index.num_samples)
    return dataclasses.replace(index, shards=index.shards * times, chunks=np.tile(index.chunks, times))


def _ratios(speeds: dict[str, float]) -> dict[str, float]:
    loader = speeds["loader"]
    return {
        "loader / Pillow": loader / speeds["Pillow decode + crop + resize"],
        "loader / webdataset": loader / speeds["webdataset, same decode and crop"],
        "loader / decoder alone, whole image": loader / speeds["decoder alone, whole image"],
        "loader / decoder alone, crop": loader / speeds["decoder alone, crop"],
        "tar reading / webdataset": speeds["tar reading, vitscale"] / speeds["tar reading, webdataset"],
    }


def _loader(index: Index, augment: AugmentConfig, size: int, decoder: Decoder, epoch: int) -> int:
    """One epoch of the real loader, in this process."""
    sources = (Source(name="0", index=index, label_map={}, excluded=np.empty(0, dtype=np.int64)),)
    mixture = make_mixture(sources, DataConfig(index="-", lanes=LANES), seed=0, global_batch=BATCH)
    stream = Stream(
        sources=sources,
        mixture=mixture,
        view_config=ViewConfig(augment, decoder, size, index.max_label + 1),
        lanes=mixture.rank_lanes(0, 1),
        first_step=epoch * mixture.steps_per_epoch,
        last_step=(epoch + 1) * mixture.steps_per_epoch,
    )
    return sum(len(batch.images) for batch in batches(stream, 0))


def _webdataset(urls: Sequence[str], augment: AugmentConfig, size: int, decoder: Decoder, epoch: int) -> int:
    """webdataset's pipeline: its reading and grouping, our decode and crop, its batching."""

    def view(sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
        key = ViewKey(0, epoch, hash(sample["__key__"]) & 0xFFFFFFFF)
        image = next(value for name, value in sample.items() if name in ("jpg", "jpeg", "png", "webp"))
        box = functools.partial(choose_box, augment, key)
        return finish_views([resize_box(decode(image, box, decoder), size)], augment, [key])[0], int(
            sample["cls"]
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = WebDataset(list(urls), shardshuffle=False, empty_check=False)
        pipeline = dataset.map(view).batched(BATCH)
        return sum(len(images) for images, _ in pipeline)  # pyright: ignore[reportGeneralTypeIssues]


def _read_webdataset(urls: Sequence[str], _: int) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = WebDataset(list(urls), shardshuffle=False, empty_check=False)
        return sum(1 for _ in range(READ_PASSES) for _ in dataset)


def _read(index: Index, _: int) -> int:
    chunks = range(len(index.chunks))
    return sum(len(read_chunk(index, chunk)) for _ in range(READ_PASSES) for chunk in chunks)


def _pillow(images: Sequence[RawSample], augment: AugmentConfig, size: int, epoch: int) -> int:
    for sample_id, sample in enumerate(images):
        _pillow_view(sample, functools.partial(choose_box, augment, ViewKey(0, epoch, sample_id)), size)
    return len(images)


def _pillow_view(sample: RawSample, choose: Callable[[int, int], Any], size: int) -> np.ndarray:
    """Decode all, crop, resize (antialiased bilinear): what torchvision does with Pillow."""
    image = Image.open(io.BytesIO(sample.image)).convert("RGB")
    top, left, height, width = choose(image.height, image.width)
    crop = image.crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR))


def _decode_whole(images: Sequence[RawSample], decoder: Decoder, _: int) -> int:
    for sample in images:
        decode(sample.image, decoder=decoder)
    return len(images)


def _decode_crops(images: Sequence[RawSample], augment: AugmentConfig, decoder: Decoder, epoch: int) -> int:
    for sample_id, sample in enumerate(images):
        decode(sample.image, functools.partial(choose_box, augment, ViewKey(0, epoch, sample_id)), decoder)
    return len(images)


def _shares(
    index: Index,
    images: Sequence[RawSample],
    augment: AugmentConfig,
    size: int,
    decoder: Decoder,
    speed: float,
) -> dict[str, float]:
    """Where the loader's time goes: each part alone, as a share of its time per image."""
    keys = [ViewKey(0, 1, sample_id) for sample_id in range(len(images))]
    crops = [
        decode(sample.image, functools.partial(choose_box, augment, key), decoder)
        for sample, key in zip(images, keys, strict=True)
    ]
    squares = [resize_box(crop, size) for crop in crops]
    parts: dict[str, Callable[[], Any]] = {
        "reading and checking the tar": lambda: [
            read_chunk(index, chunk) for chunk in range(len(index.chunks))
        ],
        "choosing the crop": lambda: [choose_box(augment, key, 375, 500) for key in keys],
        "decoding the crop": lambda: _decode_crops(images, augment, decoder, 1),
        "resize": lambda: [resize_box(crop, size) for crop in crops],
        "flip and batching": lambda: [
            (
                finish_views(squares[at : at + BATCH], augment, keys[at : at + BATCH]),
                pad_labels([(0,)] * BATCH, 1),
            )
            for at in range(0, len(squares), BATCH)
        ],
    }
    shares = {}
    for name, part in parts.items():
        times = []
        for _ in range(3):
            began = time.process_time()
            part()
            times.append(time.process_time() - began)
        shares[name] = median(times) / len(images) * speed
    # What was measured as decoding also chooses the crop.
    shares["decoding the crop"] -= shares["choosing the crop"]
    return {**shares, "the rest": 1 - sum(shares.values())}
