"""The training data as a config names them ([data])."""

import dataclasses
import math
from typing import Literal

from vitscale.config import check_choices
from vitscale.data.split import NUM_HASHES
from vitscale.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several sources ([[data.sources]]).

    index:      its index.json.
    weight:     its share of the samples, relative to the other weights.
    label_map:  a JSON file from its labels to the run's, {"0": 17, ...} or a list; "" = as is.
    exclude:    a list of samples to leave out, from `tools/data.py dedup`; "" = none.
    image_key:  what its samples' images are; must be what the index was made with. "" = that.
    label_key:  as image_key, of their labels.
    name:       for metrics and messages; "" = its position.
    num_samples:
                how many samples the index must have, so that --dry-run needs none; 0 = any.
    """

    index: str
    weight: float = 1.0
    label_map: str = ""
    exclude: str = ""
    image_key: str = ""
    label_key: str = ""
    name: str = ""
    num_samples: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ConfigError(
                f"data.sources: the weight {self.weight} of {self.index} must be above 0 and finite"
            )


SINGLE_SOURCE_KEYS = ("index", "label_map", "exclude", "image_key", "label_key", "num_samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training data ([data]).

    index:             the index.json of a single source.
    label_map:         of a single source, as in SourceConfig.
    exclude:           of a single source, as in SourceConfig.
    image_key:         of a single source, as in SourceConfig.
    label_key:         of a single source, as in SourceConfig.
    num_samples:       of a single source, as in SourceConfig.
    validation_fraction:
                       the share of a single source's samples, in [0, 1), that are not trained
                       on, but read by evaluations with split = "validation". Hashes of their
                       keys choose them (split.py). 0 = all are trained on.
    fraction:          the part of a single source that is trained on, in (0, 1]; what the
                       validation split has is taken from it. Hashes of the keys choose it
                       (split.py), so that a small part lies inside every larger one. Whole
                       chunks are read for it all the same.
    fraction_seed:     which part of that size.
    sources:           several sources, to be mixed, instead of the keys above.
    labels:            "single" if each sample has one label, "multi" if it may have several.
    lanes:             streams that each global batch is put together from. The world size must
                       divide it, and the sample order depends on it. 0 = the largest divisor of
                       global_batch up to 1,024.
    window_chunks:     chunks of a lane that are shuffled together, and held in memory.
    chunk_order:       "shuffled": a lane's chunks come from anywhere in the data set.
                       "stratified": from a few parts of it in each epoch, so that batches have
                       all classes where the shards are sorted by class.
    decoder:           of JPEGs; "auto" is libjpeg-turbo 3 if it is installed, else simplejpeg.
    max_bad_fraction:  the share of replaced samples, in [0, 1], above which the run ends.
    """

    index: str = ""
    label_map: str = ""
    exclude: str = ""
    image_key: str = ""
    label_key: str = ""
    num_samples: int = 0
    validation_fraction: float = 0.0
    fraction: float = 1.0
    fraction_seed: int = 0
    sources: tuple[SourceConfig, ...] = ()
    labels: Literal["single", "multi"] = "single"
    lanes: int = 0
    window_chunks: int = 2
    chunk_order: Literal["shuffled", "stratified"] = "shuffled"
    decoder: Literal["auto", "turbojpeg", "simplejpeg"] = "auto"
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        check_choices(self)
        if self.lanes < 0:
            raise ConfigError(f"data.lanes {self.lanes} must be 0 or more")
        if self.window_chunks < 1:
            raise ConfigError(f"data.window_chunks {self.window_chunks} must be 1 or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"data.max_bad_fraction {self.max_bad_fraction} must lie in [0, 1]")
        if self.sources and any(getattr(self, key) for key in SINGLE_SOURCE_KEYS):
            raise ConfigError(
                f"data.{', data.'.join(SINGLE_SOURCE_KEYS)} are for a single source; "
                "with [[data.sources]], write them into each of the sources"
            )
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(
                f"data.validation_fraction {self.validation_fraction} must lie in [0, 1), like 0.1"
            )
        if self.validation_fraction and len(self.sources) > 1:
            raise ConfigError(
                "data.validation_fraction is for a single source; with several data.sources, name test "
                "shards in [evals] instead"
            )
        if not 1 / NUM_HASHES <= self.fraction <= 1:
            raise ConfigError(f"data.fraction {self.fraction} must lie in [1/{NUM_HASHES}, 1], like 0.1")
        if self.fraction < 1 and len(self.sources) > 1:
            raise ConfigError(
                "data.fraction is for a single source; with several data.sources, set their weights"
            )
        if self.fraction_seed < 0:
            raise ConfigError(f"data.fraction_seed {self.fraction_seed} must not be negative")
        if min(source.num_samples for source in self.all_sources()) < 0:
            raise ConfigError("data.num_samples must not be negative; 0 = as many as the index has")

    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The sources, in whichever way they were written."""
        single = SourceConfig(**{key: getattr(self, key) for key in SINGLE_SOURCE_KEYS})
        return self.sources or (single,)
