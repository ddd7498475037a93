"""What a run trains on ([data]): one index, or several mixed by weight into one label space."""

import dataclasses
import functools
import itertools
import json
import logging
import shlex
from collections.abc import Mapping, Sequence

import numpy as np
import xxhash
from jaxtyping import Int64

from vitscale.data.classes import difference, mapped_classes
from vitscale.data.data_config import DataConfig, SourceConfig
from vitscale.data.exclusions import load_exclusions
from vitscale.data.id_set import NO_IDS, IdSet
from vitscale.data.index import Index, check_shards, planned_index
from vitscale.data.mixture import Mixture
from vitscale.data.order import ShardLayout
from vitscale.data.split import in_fraction, share, split_classes, validation_ids
from vitscale.errors import ConfigError, DataError, StoreError
from vitscale.stores import storage

logger = logging.getLogger(__name__)
SHOWN_LABELS = 10  # of those that a split leaves without samples


def _no_ids() -> Int64[np.ndarray, " 0"]:
    return np.empty(0, dtype=np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """An opened source. label_map: {} = labels stay.

    excluded: the ids, rising, of samples to leave out. They keep their places in the order,
    where others replace them. held_out: those of the validation split, rising, which have no
    places. not_chosen: samples outside of data.fraction, which have none either; None = all are
    in it.
    """

    name: str
    index: Index
    label_map: Mapping[int, int]
    excluded: Int64[np.ndarray, " n"]
    held_out: Int64[np.ndarray, " h"] = dataclasses.field(default_factory=_no_ids)
    not_chosen: IdSet | None = None

    @functools.cached_property
    def layout(self) -> ShardLayout:
        """The layout of the index, with what no epoch draws."""
        held_out = self.not_chosen or NO_IDS
        if len(self.held_out):
            split = IdSet.of(self.held_out, self.index.num_samples)
            held_out = split.union(held_out) if held_out else split
        return dataclasses.replace(self.index.layout, held_out=held_out)

    def is_trained_on(self, sample_id: int) -> bool:
        return not _is_among(sample_id, self.excluded) and sample_id not in self.layout.held_out

    def replacement(self, draw: float) -> int:
        """The sample at a draw from [0, 1), which may be one that is not trained on."""
        if self.not_chosen is None:
            return int(draw * self.index.num_samples)
        return int(self.layout.drawn_ids(np.array([int(draw * self.layout.num_drawn)]))[0])

    @property
    def max_label(self) -> int:
        """The highest label of the run, but for those that stand alone (Index.lone_labels)."""
        return max(self.label_map[label] if self.label_map else label for label in self.index.usual_labels)

    def named(self, label: int) -> str:
        """A label of the run for messages, with the name of its class (Index.named)."""
        return named(label, self.index, self.label_map)

    @property
    def classes(self) -> dict[str, int]:
        """The run's labels of the class names; {} if the names are not known."""
        return mapped_classes(self.index.classes, self.label_map)

    def fingerprint(self, index_fingerprint: str = "") -> str:
        """Names what decides what a sample is: shards, label map, exclusions, split, fraction.

        index_fingerprint: of another index in place of the source's own; "" = its own.
        """
        parts = [index_fingerprint or self.index.fingerprint()]
        if self.label_map:
            parts.append(json.dumps(sorted(self.label_map.items())))
        if len(self.excluded):
            parts.append(self.excluded.tobytes().hex())
        if len(self.held_out):
            parts.append(f"validation {xxhash.xxh3_128(self.held_out.tobytes()).hexdigest()}")
        if self.not_chosen is not None:
            parts.append(f"fraction {self.not_chosen.digest()}")
        return " ".join(parts)


def missing_sources(config: DataConfig) -> list[SourceConfig]:
    """The sources whose index is not there, if all of them state num_samples; else []."""
    sources = config.all_sources()
    sizes = storage.sizes([source.index for source in sources])
    missing = [source for source, size in zip(sources, sizes, strict=True) if size is None]
    return missing if all(source.num_samples for source in missing) else []


def open_sources(config: DataConfig, missing: Sequence[SourceConfig] = ()) -> tuple[Source, ...]:
    """Load the indexes, label maps and exclusions.

    missing: sources for a plan, which cannot be read: they have the stated number of samples.
    Raises DataError or ConfigError for what does not fit, StoreError for what cannot be read.
    """
    sources = tuple(
        _planned_source(section, position, config)
        if section in missing
        else _open_source(section, position, config)
        for position, section in enumerate(config.all_sources())
    )
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError(f"data.sources have the names {', '.join(names)}; give each a different name")
    return sources


def _planned_source(section: SourceConfig, position: int, config: DataConfig) -> Source:
    num_samples = section.num_samples
    num_held_out = round(share(config.validation_fraction) * num_samples)  # about so many
    not_chosen = None
    if config.fraction < 1:
        num_chosen = round(share(config.fraction) * (num_samples - num_held_out))
        not_chosen = IdSet.where(np.arange(num_samples) >= num_held_out + num_chosen)
    return Source(
        name=section.name or str(position),
        index=planned_index(num_samples),
        label_map={},
        excluded=_no_ids(),
        held_out=np.arange(num_held_out),
        not_chosen=not_chosen,
    )


def _open_source(section: SourceConfig, position: int, config: DataConfig) -> Source:
    index = Index.load(section.index)
    _check_keys(index, section)
    if section.num_samples not in (0, index.num_samples):
        raise ConfigError(
            f"{section.index} has {index.num_samples:,} samples, data.num_samples says "
            f"{section.num_samples:,}; index all of the shards, or set it to {index.num_samples}"
        )
    excluded = load_exclusions(section.exclude, index) if section.exclude else _no_ids()
    if 2 * len(excluded) > index.num_samples:
        raise DataError(
            f"{section.exclude} leaves out {len(excluded):,} of {index.num_samples:,} samples, "
            "more than half; check the threshold that it was made with"
        )
    fraction = config.validation_fraction
    held_out = validation_ids(index, fraction, section.index) if fraction else _no_ids()
    not_chosen = None
    if config.fraction < 1:
        not_chosen = IdSet.where(~in_fraction(index, config.fraction, config.fraction_seed, section.index))
    return Source(
        name=section.name or str(position),
        index=index,
        label_map=read_label_map(section.label_map, index) if section.label_map else {},
        excluded=excluded,
        held_out=np.setdiff1d(held_out, excluded, assume_unique=True),  # what is excluded is in neither
        not_chosen=not_chosen,
    )


def _check_keys(index: Index, section: SourceConfig) -> None:
    """Labels are counted when indexing: a config cannot choose others."""
    for key, option in (("image_key", "--image-key"), ("label_key", "--label-key")):
        wanted, made_with = getattr(section, key), getattr(index.keys, key)
        if wanted and wanted != made_with:
            raise ConfigError(
                f"data.{key} {wanted!r} is not what {section.index} was made with, {made_with!r}; "
                f"index again: python tools/data.py index SHARDS {option} {shlex.quote(wanted)}"
            )


def make_mixture(
    sources: tuple[Source, ...], config: DataConfig, *, seed: int, global_batch: int, repeats: int = 1
) -> Mixture:
    """The order of a run over its sources. Raises ConfigError where they do not fit."""
    return Mixture.make(
        [source.layout for source in sources],
        [section.weight for section in config.all_sources()],
        seed=seed,
        global_batch=global_batch,
        lanes=config.lanes,
        window_samples=[config.window_chunks * source.index.chunk_samples for source in sources],
        repeats=repeats,
        stratified=config.chunk_order == "stratified",
    )


def check_sources(sources: tuple[Source, ...]) -> None:
    """Raise DataError if a shard is missing or has another size than when it was indexed."""
    for source in sources:
        check_shards(source.index)


def warn_of_classes(sources: tuple[Source, ...], config: DataConfig) -> None:
    """Warn, in one line, of sources that number the same classes differently."""
    pairs = zip(sources, config.all_sources(), strict=True)
    known = [(source.classes, section.index) for source, section in pairs]
    found = (difference(*one, *other) for one, other in itertools.combinations(known, 2))
    if words := next(filter(None, found), ""):
        logger.warning(
            "%s: the labels of data.sources differ; map those of one by its label_map, or pack both together",
            words,
        )  # fmt: skip


def check_labels(sources: tuple[Source, ...], config: DataConfig, num_classes: int) -> None:
    """Raise ConfigError for labels that the model or the config has no place for.

    Labels that stand alone do not count: their samples are replaced when they are drawn. Warns
    of labels that the validation split leaves without samples on one side.
    """
    if num_classes < 1:
        labels = [source.max_label for source in sources if source.index.label_counts]
        wanted = f"{max(labels) + 1}, as many as the data have" if labels else "the number of classes"
        raise ConfigError(f"model.num_classes is 0, which builds a model without a head; set it to {wanted}")
    for source, section in zip(sources, config.all_sources(), strict=True):
        if not source.index.label_counts:
            continue  # it is planned
        if source.max_label >= num_classes:
            raise ConfigError(
                f"{section.index} holds label {source.named(source.max_label)}, out of range for "
                f"model.num_classes {num_classes} (labels run from 0 to {num_classes - 1}); set "
                f"model.num_classes = {source.max_label + 1} or fix the labels"
            )
        for label in source.index.lone_labels:
            problem = label_problem([label], source.index, source.label_map, num_classes)
            if problem:
                logger.warning(
                    "%s: %s and stands alone: its %d samples will be replaced and counted; to see them: "
                    "python tools/data.py verify %s",
                    section.index, problem, source.index.label_counts[label], section.index,
                )  # fmt: skip
        if config.labels == "single" and source.index.max_labels > 1:
            raise ConfigError(
                f"{section.index} has samples with {source.index.max_labels} labels; "
                'set data.labels = "multi" and loss.name = "sigmoid"'
            )
        _warn_of_split(source, config)


def named(label: int, index: Index, label_map: Mapping[int, int]) -> str:
    """A mapped label for messages, with the name of its class (Index.named)."""
    if not label_map:
        return index.named(label)
    own = min((own for own, mapped in label_map.items() if mapped == label), default=None)
    return str(label) if own is None else f"{label} (from {index.named(own)})"


def label_problem(labels: Sequence[int], index: Index, label_map: Mapping[int, int], num_classes: int) -> str:
    """Why a model has no place for a sample's labels, "" if it has; with 0 classes, for any."""
    for label in labels:
        if label_map and label not in label_map:
            return f"label {index.named(label)} is not in the label map"
        if label_map.get(label, label) >= num_classes > 0:
            mapped = f"(mapped to {label_map[label]}) " if label_map else ""
            return f"label {index.named(label)} {mapped}is out of range for model.num_classes {num_classes}"
    return ""


def _warn_of_split(source: Source, config: DataConfig) -> None:
    if not config.validation_fraction:
        return
    classes = split_classes(source.index, config.validation_fraction)
    for lacking, labels in (("validation", classes.only_training), ("training", classes.only_validation)):
        if labels:
            names = map(source.index.named, labels[:SHOWN_LABELS])
            shown = ", ".join(names) + (", ..." if labels[SHOWN_LABELS:] else "")
            logger.warning(
                "data.validation_fraction %s leaves %d of %d classes without %s samples: label %s",
                config.validation_fraction, len(labels), len(source.index.label_counts), lacking, shown,
            )  # fmt: skip


def read_label_map(path: str, index: Index) -> dict[int, int]:
    """A label map, which has all labels of an index but those that stand alone.

    Raises DataError for a file that is no such map, StoreError for one that cannot be read.
    """
    try:
        content = storage.read_bytes(path)
    except FileNotFoundError:
        raise DataError(f'label map {path} does not exist; write {{"0": 17, ...}} or a list') from None
    except OSError as error:
        reason = error.strerror or error
        raise StoreError(f"label map {path} cannot be read: {reason}; name a JSON file") from None
    try:
        values = json.loads(content)
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        mapping = {int(label): run_label for label, run_label in pairs}
    except (ValueError, TypeError, RecursionError):
        raise DataError(
            f'label map {path} is not a label map; it must be JSON: {{"0": 17, ...}} or a list of new labels'
        ) from None
    wrong = [label for label in mapping.values() if type(label) is not int or label < 0]
    if wrong:
        raise DataError(f"label map {path} maps to {wrong[0]!r}; labels are whole numbers from 0")
    missing = sorted(set(index.label_counts) - set(mapping) - set(index.lone_labels))
    if missing:
        label = index.named(missing[0])
        raise DataError(f"label map {path} has no entry for label {label}, which the shards hold")
    return mapping


def _is_among(sample_id: int, ids: Int64[np.ndarray, " n"]) -> bool:
    place = int(np.searchsorted(ids, sample_id))
    return place < len(ids) and int(ids[place]) == sample_id
