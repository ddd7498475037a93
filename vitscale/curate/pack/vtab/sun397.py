"""SUN397 with the split of TFDS, whose lists are in the wheel of tensorflow-datasets."""

import numpy as np

from vitscale.curate.pack.config import PackConfig
from vitscale.curate.pack.listing import Listing
from vitscale.curate.pack.vtab.archives import open_files
from vitscale.curate.pack.vtab.examples import Examples, make_listing, named
from vitscale.curate.pack.vtab.opencv import decode_rgb, encode_jpeg, resize
from vitscale.errors import DataError
from vitscale.vtab.tasks import TASKS

MAX_PIXELS = 120_000
QUALITY = 95  # OpenCV's default: TFDS passes none, though its description says 72
_ADVICE = "vtab/sun397 reads the folder that SUN397.tar.gz unpacks to, or that archive as a .tar"
_LISTS_ADVICE = (
    "--membership takes the folder of sun397_tfds_tr.txt, sun397_tfds_va.txt and sun397_tfds_te.txt, or the "
    "wheel that holds them, from: pip download --no-deps tensorflow-datasets"
)
# TFDS 4.9.9 skips these: their files are damaged.
_SKIPPED = frozenset(
    {"/c/church/outdoor/sun_bhenjvsvrtumjuri.jpg", "/t/track/outdoor/sun_aophkoiosslinihb.jpg"}
)


def list_sun397(source: str, config: PackConfig) -> Listing:
    """SUN397/a/abbey/sun_x.jpg; keys, as in the lists, are /a/abbey/sun_x.jpg.

    The lists may also be in the source. Two files that TFDS skips as damaged are not read.
    """
    lists = open_files(config.membership or source, _LISTS_ADVICE)
    listed = {
        split: lists.lines(f"sun397_tfds_{part}.txt")
        for split, part in (("train", "tr"), ("validation", "va"), ("test", "te"))
    }
    files = open_files(source, _ADVICE, ("SUN397",))
    classes = sorted({key.rpartition("/")[0] for keys in listed.values() for key in keys})
    label_of = {name: label for label, name in enumerate(classes)}
    splits = {}
    for split, keys in listed.items():
        kept = [key for key in keys if key not in _SKIPPED]
        if bad := [key for key in kept if not key.startswith("/")]:
            raise DataError(f"{lists.source} lists {bad[0]!r}; a line is a path like /a/abbey/sun_x.jpg")
        labels = [label_of[key.rpartition("/")[0]] for key in kept]
        names = [key.removeprefix("/") for key in kept]
        splits[split] = Examples(
            keys=kept, labels=labels, images=named(files, names, "the list of its split", reencode)
        )
    return make_listing(TASKS["sun397"], source, splits, classes)


def reencode(image: bytes) -> bytes:
    """A JPEG of at most 120,000 pixels, by a bilinear resize (TFDS sun397 4.0.0).

    Some files are BMP, PNG or GIF. Where OpenCV cannot read GIF (4.10), TFDS swaps red and
    blue of those few; this does not.
    """
    pixels = decode_rgb(image)
    count = pixels.shape[0] * pixels.shape[1]
    if count > MAX_PIXELS:
        pixels = resize(pixels, float(np.sqrt(MAX_PIXELS / count)))
    return encode_jpeg(pixels, QUALITY)
