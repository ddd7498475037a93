"""What the user chooses about a packing, what one returns, and the error that leaves one image out."""

import dataclasses
from typing import Literal, get_args

from vitscale.config import ConfigError

Format = Literal["imagefolder", "imagenet21k", "imagenet1k", "cifar10", "cifar100", "csv", "jsonl", "shards"]
FORMAT_NAMES: tuple[str, ...] = get_args(Format)
SPLITS = ("train", "val", "test")
LISTED = 20  # of what is left out, these many are named; all are counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackConfig:
    """The options of a packing. All but `workers` and `overwrite` are part of what the shards contain.

    seed: of the shuffle, where `shuffle` is on; else the order of the source is kept.
    short_side: images whose short side is larger are re-encoded to it as JPEG of `quality`; 0 keeps all
    bytes
    as they are.
    labels: which of CIFAR-100's two labels are taken.
    val_images, val_labels: ImageNet-1k's validation set, packed where both are given: the tar or folder of
    its JPEGs, and a text file of their synset names in the order of the file names.
    """

    format: Format = "imagefolder"
    samples_per_shard: int = 1000
    shuffle: bool = True
    seed: int = 0
    short_side: int = 0
    quality: int = 90
    labels: Literal["fine", "coarse"] = "fine"
    val_images: str = ""
    val_labels: str = ""
    workers: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ConfigError(f"--samples-per-shard {self.samples_per_shard} must be above 0, like 1000")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"--quality {self.quality} must lie from 1 to 100; 90 is a good choice")
        if min(self.short_side, self.workers, self.seed) < 0:
            raise ConfigError("--short-side, --workers and --seed must not be negative; 0 is the default")
        if self.seed >= 2**64:
            raise ConfigError(f"--seed {self.seed} must be below 2^64; 0 is the default")
        if bool(self.val_images) != bool(self.val_labels):
            raise ConfigError(
                "--val-images and --val-labels belong together: the tar or folder of the validation JPEGs, "
                "and the text file of their synset names"
            )
        if self.val_images and self.format != "imagenet1k":
            raise ConfigError(f"--val-images belongs to --format imagenet1k, not {self.format}")

    def content(self) -> dict[str, object]:
        """The options that decide the bytes of the shards: another run must share them to go on."""
        values = dataclasses.asdict(self)
        # Where the validation images lie may change; what they are stands in the listing.
        for key in ("workers", "overwrite", "val_images", "val_labels"):
            del values[key]
        if not self.shuffle:
            del values["seed"]
        if not self.short_side:
            del values["quality"]
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackReport:
    """What a packing made. `shards` has the paths of each split; `left_out` names the first LISTED sources
    that were left out, of `num_left_out`.

    num_kept_shards: those that an earlier, interrupted run had finished.
    """

    shards: dict[str, list[str]]
    num_samples: dict[str, int]
    num_kept_shards: int
    num_left_out: int
    left_out: tuple[str, ...]


class LeftOut(ValueError):
    """One source that cannot be a sample, and why: it is counted and named, and the packing goes on."""


class Unreadable(LeftOut):
    """Left out because its file could not be opened or read."""


@dataclasses.dataclass
class LeftOutTally:
    """How many sources were left out, and the first of them in words."""

    count: int = 0
    first: list[str] = dataclasses.field(default_factory=list)

    def add(self, sentence: str, count: int = 1) -> None:
        self.count += count
        if len(self.first) < LISTED:
            self.first.append(sentence)
