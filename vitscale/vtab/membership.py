"""Which examples are in train800, val200 and test: the order in which TFDS stores a split.

The order is that of the MD5 digests of split name and key (tensorflow-datasets 4.9.9,
core/hashing.py, core/shuffle.py, core/split_builder.py), so it needs no TensorFlow.
"""

import collections
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence

from vitscale.errors import DataError
from vitscale.vtab.tasks import Task

Key = int | str | bytes
_SLICE = re.compile(r"(\w+)(?:\[(\d*):(\d*)\])?")


@dataclasses.dataclass(frozen=True)
class Slice:
    """The examples [start, stop) of a TFDS split in stored order."""

    split: str
    start: int
    stop: int


def key_bytes(key: Key) -> bytes:
    """An integer in decimal ASCII, text in UTF-8 with `/` for a backslash, bytes as they are.

    So the keys 1 and "1" are equal, and two equal keys may not be in one split.
    """
    if isinstance(key, bytes):
        return key
    return str(key).replace("\\", "/").encode()


def stored_order(split: str, keys: Sequence[Key]) -> list[int]:
    """The positions of the keys in the order in which TFDS stores its split of that name.

    Raises DataError for a key that occurs twice.
    """
    names = [key_bytes(key) for key in keys]
    if len(set(names)) < len(names):
        name, count = collections.Counter(names).most_common(1)[0]
        raise DataError(
            f"the {split} split has {name.decode(errors='replace')} {count} times; keep one of them"
        )
    salt = split.encode()
    digests = [hashlib.md5(salt + name, usedforsecurity=False).digest() for name in names]
    return sorted(range(len(names)), key=digests.__getitem__)


def parse_slice(text: str, size: int) -> Slice:
    """`train[63000:63200]`, `train[:800]`, `train[21600:]` or `train`, of a split of `size`."""
    match = _SLICE.fullmatch(text)
    assert match, text
    return Slice(match[1], int(match[2] or 0), int(match[3] or size))


def slices_of(task: Task, sizes: Mapping[str, int]) -> dict[str, Slice]:
    """The slices train800, val200 and test, for TFDS splits that have these sizes.

    A split that has the published size is cut as published. Any other keeps the order of its
    slices and cuts them without gaps: as long as published if it is large enough for all, else
    shorter in proportion, each of one example at least. A slice that is the whole split remains
    the whole split. For 100 examples in place of the 27,000 of EuroSAT:

        train800 [0:12]    of the published [0:800]
        val200   [12:15]                    [16200:16400]
        test     [15:100]                   [21600:27000]

    Raises DataError for a split with fewer examples than slices.
    """
    slices = {}
    for split, published in task.sizes.items():
        texts = {name: text for name, text in task.slices().items() if text.partition("[")[0] == split}
        cut = {name: parse_slice(text, published) for name, text in texts.items()}
        slices.update(cut if sizes[split] == published else _fitted(split, cut, published, sizes[split]))
    return {name: slices[name] for name in task.slices()}


def members(task: Task, keys: Mapping[str, Sequence[Key]]) -> dict[str, tuple[str, list[int]]]:
    """By slice name, the TFDS split and the positions in `keys[split]` that belong to it."""
    slices = slices_of(task, {split: len(names) for split, names in keys.items()})
    orders = {split: stored_order(split, names) for split, names in keys.items()}
    return {name: (cut.split, orders[cut.split][cut.start : cut.stop]) for name, cut in slices.items()}


def _fitted(split: str, published: Mapping[str, Slice], whole: int, size: int) -> dict[str, Slice]:
    """The slices of a split that has another size than the published one, `whole`."""
    names = sorted(published, key=lambda name: published[name].start)
    if size < len(names):
        raise DataError(
            f"the {split} split has {size} examples, too few for {' and '.join(names)}; "
            f"it needs {len(names)} at least, and has {whole:,} as published"
        )
    lengths = [published[name].stop - published[name].start for name in names]
    if lengths == [whole]:
        return {names[0]: Slice(split, 0, size)}
    total, bounds = sum(lengths), [0]
    for number, end in enumerate(itertools.accumulate(lengths), 1):
        scaled = end * size // total if size < total else end
        bounds.append(min(max(scaled, bounds[-1] + 1), size - (len(names) - number)))
    return {
        name: Slice(split, start, stop)
        for name, (start, stop) in zip(names, itertools.pairwise(bounds), strict=True)
    }
