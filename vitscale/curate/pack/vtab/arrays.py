"""The data sets that are arrays: CIFAR-100, SVHN, Patch Camelyon, dSprites and smallNORB."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from vitscale.curate.pack import cifar
from vitscale.curate.pack.config import PackConfig
from vitscale.curate.pack.imagefolder import list_files
from vitscale.curate.pack.listing import Listing, PixelReferences
from vitscale.curate.pack.vtab.examples import ArrayImage, Examples, array_images, make_listing
from vitscale.curate.pack.vtab.hdf5 import Hdf5File
from vitscale.curate.pack.vtab.matlab import read_mat
from vitscale.curate.pack.vtab.norb import read_matrix
from vitscale.data.tar import compression
from vitscale.errors import DataError
from vitscale.vtab import labels as rules
from vitscale.vtab.tasks import TASKS

DSPRITES_FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.hdf5"
CAMELYON_FILE = "camelyonpatch_level_2_split_{}_{}.h5"
NORB_FILES = {
    "train": "smallnorb-5x46789x9x18x6x2x96x96-training-{}.mat",
    "test": "smallnorb-5x01235x9x18x6x2x96x96-testing-{}.mat",
}


def list_cifar100(source: str, config: PackConfig) -> Listing:
    """cifar-100-binary.tar.gz, or its folder; keys are record numbers."""
    listing = cifar.list_cifar100(source, PackConfig(format="cifar100"))
    splits = {}
    for split, references in listing.splits.items():
        assert isinstance(references, PixelReferences)
        pixels = references.planes.reshape(-1, 3, cifar.SIDE, cifar.SIDE).transpose(0, 2, 3, 1)  # [n H W 3]
        splits[split] = _in_memory(pixels, references.labels.tolist(), references.name)
    return make_listing(TASKS["cifar100"], source, splits, listing.classes)


def list_svhn(source: str, config: PackConfig) -> Listing:
    """A folder with train_32x32.mat and test_32x32.mat; keys are record numbers."""
    splits = {}
    for split in ("train", "test"):
        path = find_file(source, f"{split}_32x32.mat", "svhn")
        content = Path(path).read_bytes()
        pixels, digits = (read_mat(content, path, variable) for variable in ("X", "y"))
        if pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3) or pixels.dtype != np.uint8:
            raise DataError(f"{path} has X of {pixels.shape} {pixels.dtype}, not (32, 32, 3, n) uint8")
        if digits.size and not 1 <= digits.min() <= digits.max() <= 10:
            raise DataError(f"{path} has y from {digits.min()} to {digits.max()}; SVHN writes 1 to 10")
        labels = [rules.svhn_digit(int(y)) for y in digits.ravel()]
        splits[split] = _in_memory(pixels.transpose(3, 0, 1, 2), labels, path)
    return make_listing(TASKS["svhn"], source, splits, [str(digit) for digit in range(10)])


def list_patch_camelyon(source: str, config: PackConfig) -> Listing:
    """A folder with the six files camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5.

    Keys are train_7, valid_7 and test_7. The images of the test set take 0.9 GB of memory.
    """
    splits = {}
    for split, part in (("train", "train"), ("validation", "valid"), ("test", "test")):
        images, labels = (
            Hdf5File(find_file(source, CAMELYON_FILE.format(part, kind), "patch_camelyon")) for kind in "xy"
        )
        count = images.check("x", (96, 96, 3))
        labels.check("y", (1, 1, 1))
        splits[split] = Examples(
            keys=[f"{part}_{row}" for row in range(count)],
            labels=labels.read("y").ravel().tolist(),
            images=functools.partial(_camelyon_images, images),
        )
    return make_listing(TASKS["patch_camelyon"], source, splits, ("normal", "tumour"))


def list_dsprites(source: str, config: PackConfig, *, task: str) -> Listing:
    """dsprites_ndarray_co1sh3sc6or40x32y32_64x64.hdf5; keys are record numbers.

    Its pixels of 0 and 1 become 0 and 255. The images of the test set take 0.3 GB of memory.
    """
    file = Hdf5File(find_file(source, DSPRITES_FILE, task))
    count = file.check("imgs", (64, 64))
    file.check("latents/classes", (6,))
    # Columns: colour, shape, scale, orientation, x, y.
    column, rule = {
        "dsprites_location": (4, rules.dsprites_location),
        "dsprites_orientation": (3, rules.dsprites_orientation),
    }[task]
    examples = Examples(
        keys=range(count),
        labels=[rule(int(value)) for value in file.read("latents/classes")[:, column]],
        images=functools.partial(_dsprites_images, file),
    )
    return make_listing(TASKS[task], source, {"train": examples})


def list_smallnorb(source: str, config: PackConfig, *, task: str) -> Listing:
    """A folder with the files dat and info of training and testing, as .mat or .mat.gz.

    The image is the first of each stereo pair; keys are record numbers.
    """
    # Columns: instance, elevation, azimuth, lighting.
    column, rule = {
        "smallnorb_azimuth": (2, rules.smallnorb_azimuth),
        "smallnorb_elevation": (1, rules.smallnorb_elevation),
    }[task]
    splits = {}
    for split, name in NORB_FILES.items():
        paths = [find_file(source, name.format(kind), task, ".gz") for kind in ("dat", "info")]
        pairs = read_matrix(paths[0], np.dtype(np.uint8), (2, 96, 96))
        info = read_matrix(paths[1], np.dtype("<i4"), (4,))
        labels = [rule(int(value)) for value in info[:, column]]
        splits[split] = _in_memory(pairs[:, 0], labels, paths[0])
    return make_listing(TASKS[task], source, splits)


def find_file(source: str, name: str, task: str, *endings: str) -> str:
    """The path of a file of that name: the source itself, or in its folder at any depth.

    endings: what may follow the name, for a compressed file that is read as it is. Raises
    DataError if there is none, and for one that must be decompressed.
    """
    if os.path.isdir(source):
        candidates = [path for path, _ in list_files(source)]
    else:
        candidates = [source] if os.path.isfile(source) else []
    for wanted in (name, *(f"{name}{ending}" for ending in endings)):
        for path in candidates:
            if os.path.basename(path) == wanted:
                return path
    packed = next((path for path in candidates if os.path.basename(path).startswith(f"{name}.")), "")
    if packed:
        with open(packed, "rb") as file:
            program = compression(file.read(8)) or "a program"
        raise DataError(f"{packed} is compressed with {program}; decompress it: {program} -dk {packed}")
    raise DataError(f"{source} holds no {name}; vtab/{task} reads a folder with that file, as distributed")


def _in_memory(pixels: np.ndarray, labels: Sequence[int], where: str) -> Examples:
    """Record i is pixels[i]."""
    images: Callable[[list[int]], list[ArrayImage]] = lambda rows: array_images(  # noqa: E731
        [pixels[row] for row in rows], rows, where
    )
    if len(pixels) != len(labels):
        raise DataError(
            f"{where} has {len(pixels):,} images, but {len(labels):,} labels; download both again"
        )
    return Examples(keys=range(len(pixels)), labels=labels, images=images)


def _camelyon_images(file: Hdf5File, rows: list[int]) -> list[ArrayImage]:
    return array_images(file.rows("x", rows), rows, file.path)


def _dsprites_images(file: Hdf5File, rows: list[int]) -> list[ArrayImage]:
    pixels: UInt8[np.ndarray, "n 64 64"] = file.rows("imgs", rows)
    if pixels.max(initial=0) > 1:
        raise DataError(f"{file.path} has a pixel of {pixels.max()}; those of dSprites are 0 and 1")
    return array_images(pixels * np.uint8(255), rows, file.path)
