"""The data sets with lists of their own splits: DTD, Flowers-102 and Pets."""

import functools
import io
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int64
from PIL import Image

from vitscale.curate.pack.config import PackConfig
from vitscale.curate.pack.listing import Listing
from vitscale.curate.pack.vtab.archives import Files, StoredFile, open_files
from vitscale.curate.pack.vtab.examples import ConvertedImage, Examples, make_listing, named
from vitscale.curate.pack.vtab.matlab import read_mat
from vitscale.curate.pack.vtab.opencv import encode_jpeg
from vitscale.errors import DataError
from vitscale.vtab.tasks import TASKS

_DTD_ADVICE = "vtab/dtd reads dtd-r1.0.1.tar.gz, or the folder that it unpacks to"
_FLOWERS_ADVICE = "reads a folder with 102flowers.tgz or its jpg/, imagelabels.mat and setid.mat"
_PETS_ADVICE = (
    "reads a folder with images.tar.gz and annotations.tar.gz, or with the folders that they unpack to"
)
# Damaged, or no JPEGs: TFDS 4.0.0 decodes these and encodes them again.
_PETS_REENCODED = frozenset(
    {
        *(f"Abyssinian_{number}" for number in (5, 34)),
        *(f"Egyptian_Mau_{number}" for number in (14, 139, 145, 156, 167, 177, 186, 191)),
        *("beagle_116", "chihuahua_121"),
    }
)
_PETS_QUALITY = 95  # the default of tf.io.encode_jpeg


def list_dtd(source: str, config: PackConfig) -> Listing:
    """dtd-r1.0.1.tar.gz, fold 1 of its ten; the keys are the lines of its lists."""
    files = open_files(source, _DTD_ADVICE, ("dtd-r1.0.1",))
    lists = {
        split: files.lines(f"labels/{name}1.txt")
        for split, name in (("train", "train"), ("validation", "val"), ("test", "test"))
    }
    classes = sorted({key.partition("/")[0] for keys in lists.values() for key in keys})
    label_of = {name: label for label, name in enumerate(classes)}
    splits = {
        split: Examples(
            keys=keys,
            labels=[label_of[key.partition("/")[0]] for key in keys],
            images=named(files, [f"images/{key}" for key in keys], "its labels/"),
        )
        for split, keys in lists.items()
    }
    return make_listing(TASKS["dtd"], source, splits, classes)


def list_flowers102(source: str, config: PackConfig) -> Listing:
    """The training set is the small one: trnid, of 1,020 images."""
    return make_listing(TASKS["flowers102"], source, read_flowers102(source, config.format))


def list_pets(source: str, config: PackConfig) -> Listing:
    splits, classes = read_pets(source, config.format)
    return make_listing(TASKS["pets"], source, splits, classes)


def read_flowers102(source: str, name: str) -> dict[str, Examples]:
    """102flowers.tgz with imagelabels.mat and setid.mat; image n is jpg/image_0000n.jpg.

    name: of the format, for messages. Returns train (trnid), validation and test.
    """
    files = open_files(source, f"{name} {_FLOWERS_ADVICE}", ("102flowers",))
    labels = _numbers(files, "imagelabels.mat", "labels")
    splits = {}
    for split, variable in (("train", "trnid"), ("validation", "valid"), ("test", "tstid")):
        ids = _numbers(files, "setid.mat", variable)
        if ids.min(initial=1) < 1 or ids.max(initial=0) > len(labels):
            raise DataError(
                f"setid.mat in {source} names images from {ids.min()} to {ids.max()} in {variable}, but "
                f"imagelabels.mat has the labels of 1 to {len(labels)}; download both again"
            )
        keys = [f"image_{image:05d}.jpg" for image in ids]
        splits[split] = Examples(
            keys=keys,
            labels=[int(labels[image - 1]) - 1 for image in ids],
            images=named(files, keys, "setid.mat"),
        )
    return splits


def read_pets(source: str, name: str) -> tuple[Mapping[str, Examples], tuple[str, ...]]:
    """images.tar.gz and annotations.tar.gz: lists with the lines NAME class species breed.

    name: of the format, for messages. Returns train (trainval) and test, and the names of the
    breeds by class, () if a class has none.

    Twelve images are decoded and encoded again, as TFDS does; their pixels may differ from
    TensorFlow's by what two JPEG decoders differ.
    """
    files = open_files(source, f"{name} {_PETS_ADVICE}", ("images", "annotations"))
    splits, names = {}, dict[int, str]()
    for split, listed in (("train", "trainval.txt"), ("test", "test.txt")):
        rows = [line.split() for line in files.lines(f"annotations/{listed}") if not line.startswith("#")]
        for row in rows:
            if len(row) != 4 or not row[1].isdecimal():
                raise DataError(
                    f"annotations/{listed} in {source} has the line {' '.join(row)!r}; a line is "
                    "NAME CLASS SPECIES BREED, like Sphynx_158 34 1 12"
                )
            names.setdefault(int(row[1]) - 1, row[0].rpartition("_")[0])
        keys = [f"{row[0]}.jpg" for row in rows]
        splits[split] = Examples(
            keys=keys,
            labels=[int(row[1]) - 1 for row in rows],
            images=functools.partial(_pets_images, files, keys, f"annotations/{listed}"),
        )
    known = tuple(names[label] for label in sorted(names)) if sorted(names) == list(range(len(names))) else ()
    return splits, known


def reencode_pet(image: bytes) -> bytes:
    """Decode whatever the file is, drop alpha, and encode a JPEG; a grey image remains grey."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            pixels = np.asarray(opened if opened.mode == "L" else opened.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"its content cannot be decoded ({error})") from None
    return encode_jpeg(pixels, _PETS_QUALITY)


def _pets_images(files: Files, keys: Sequence[str], listed_in: str, rows: list[int]) -> list[StoredFile]:
    taken = files.take([f"images/{keys[row]}" for row in rows], listed_in)
    return [
        ConvertedImage(file, reencode_pet) if keys[row].removesuffix(".jpg") in _PETS_REENCODED else file
        for row, file in zip(rows, taken, strict=True)
    ]


def _numbers(files: Files, name: str, variable: str) -> Int64[np.ndarray, " n"]:
    return read_mat(files.read(name), f"{name} in {files.source}", variable).astype(np.int64).ravel()
