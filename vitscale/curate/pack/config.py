"""The options of a packing, its report, and the error by which one image is left out."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from vitscale.config import check_choices
from vitscale.curate.formats import FORMAT_NAMES
from vitscale.data.classes import read_classes
from vitscale.data.samples import DEFAULT_KEYS, SampleKeys
from vitscale.errors import ConfigError
from vitscale.vtab.tasks import TRAIN800, TRAIN800VAL200, VAL200

SPLITS = ("train", "val", "test")
# With those of VTAB-1k. A split's place in it is part of the seed of its order: only append.
SHARD_SPLITS = (*SPLITS, TRAIN800, VAL200, TRAIN800VAL200)
WITH_MEMBERSHIP = ("vtab/caltech101", "vtab/sun397", "vtab/kitti_distance")
NUM_LISTED = 20  # how many omissions a report describes; all are counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackConfig:
    """The options of a packing.

    shuffle, seed   the order of the samples: shuffled by the seed, or that of the source
    format          one of FORMAT_NAMES
    short_side      images whose short side is larger are re-encoded to it; 0 keeps all bytes
    quality         of the JPEGs that are re-encoded
    labels          which of CIFAR-100's two labels to take
    val_images      ImageNet-1k's validation images: their tar, or the folder of the JPEGs
    val_labels      their synsets: a text file with one per line, in the order of the file names
                    (of the format "imagenet_real": real.json)
    membership      of WITH_MEMBERSHIP: the file or folder that says which images train
    image_key, label_key, classes
                    of the format "shards": see SampleKeys; classes is a file (read_classes)
    workers         number of processes; 0 works in this one
    overwrite       replace the shards that are in OUT

    All but the last two decide the bytes of the shards.
    """

    format: str = "imagefolder"
    samples_per_shard: int = 1000
    shuffle: bool = True
    seed: int = 0
    short_side: int = 0
    quality: int = 90
    labels: Literal["fine", "coarse"] = "fine"
    val_images: str = ""
    val_labels: str = ""
    membership: str = ""
    image_key: str = DEFAULT_KEYS.image_key
    label_key: str = DEFAULT_KEYS.label_key
    classes: str = ""
    workers: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        if self.format not in FORMAT_NAMES:
            raise ConfigError(f"--format {self.format} is none of {', '.join(FORMAT_NAMES)}")
        if self.samples_per_shard < 1:
            raise ConfigError(f"--samples-per-shard {self.samples_per_shard} must be above 0, like 1000")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"--quality {self.quality} must be from 1 to 100; 90 is a good choice")
        for key, way_out in (
            ("short_side", "0, the default, keeps all images as they are"),
            ("workers", "the default is one per core"),
            ("seed", "0 is the default"),
        ):
            if (value := getattr(self, key)) < 0:
                raise ConfigError(f"--{key.replace('_', '-')} {value} must not be negative; {way_out}")
        if self.seed >= 2**64:
            raise ConfigError(f"--seed {self.seed} must be below 2^64; 0 is the default")
        if self.format == "imagenet_real" and not self.val_labels:
            raise ConfigError(
                "--format imagenet_real needs --val-labels real.json "
                "(github.com/google-research/reassessed-imagenet)"
            )
        if self.format != "imagenet_real" and bool(self.val_images) != bool(self.val_labels):
            raise ConfigError(
                "--val-images and --val-labels belong together: the tar or folder of the validation JPEGs, "
                "and the text file of their synset names"
            )
        defaults = (DEFAULT_KEYS.image_key, DEFAULT_KEYS.label_key, "")
        if (self.image_key, self.label_key, self.classes) != defaults and self.format != "shards":
            raise ConfigError(
                f"--image-key, --label-key and --classes belong to --format shards, not {self.format}"
            )
        if self.val_images and self.format != "imagenet1k":
            raise ConfigError(f"--val-images belongs to --format imagenet1k, not {self.format}")
        if self.membership and self.format not in WITH_MEMBERSHIP:
            raise ConfigError(
                f"--membership belongs to --format {' or '.join(WITH_MEMBERSHIP)}, not {self.format}"
            )

    def sample_keys(self) -> SampleKeys:
        """What holds the images and labels of existing shards."""
        classes = read_classes(self.classes) if self.classes else {}
        return SampleKeys(image_key=self.image_key, label_key=self.label_key, classes=classes)

    def content(self) -> dict[str, object]:
        """What decides the bytes of the shards; a run that continues must have the same."""
        values = dataclasses.asdict(self)
        # What decides the listing need not be here: the digest of the listing identifies it.
        by_listing = ("val_images", "val_labels", "membership", "image_key", "label_key", "classes")
        for key in ("workers", "overwrite", *by_listing):
            del values[key]
        if not self.shuffle:
            del values["seed"]
        if not self.short_side:
            del values["quality"]
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackReport:
    """What a packing wrote, by split.

    shards: their paths.
    num_kept_shards: how many an earlier, interrupted run had finished.
    num_omissions: how many sources were left out; `omissions` describes the first NUM_LISTED.
    edition: which edition of the data set this is, in words; "" if it has none.
    passed_over: by extension, how many files of existing shards are neither image nor label.
    """

    shards: dict[str, list[str]]
    num_samples: dict[str, int]
    num_kept_shards: int
    num_omissions: int
    omissions: tuple[str, ...]
    edition: str = ""
    passed_over: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Omission(ValueError):
    """Why one source cannot be a sample. It is reported, and the packing continues."""


class UnreadableFile(Omission):
    """The file of a source cannot be opened or read."""


@dataclasses.dataclass
class Omissions:
    """How many sources were left out, and one sentence for each of the first NUM_LISTED."""

    count: int = 0
    first: list[str] = dataclasses.field(default_factory=list)

    def add(self, sentence: str, count: int = 1) -> None:
        """Add a sentence about `count` sources."""
        self.count += count
        if len(self.first) < NUM_LISTED:
            self.first.append(sentence)
