"""What a sample in a shard is: consecutive files with one key, an image and its labels.

A shard is data, never code.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vitscale.data.tar import Bytes, Member, Slices, TarDamage, walk

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSIONS = ("cls", "json")
IGNORED_EXTENSIONS = ("txt",)
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}


class RawSample(NamedTuple):
    """An undecoded sample. labels: class indices, several for multi-label data.

    The image may be a view of the chunk that was read, which it then keeps in memory.
    """

    key: str
    image: Bytes
    extension: str
    labels: tuple[int, ...]


class BadSample(NamedTuple):
    """A sample that cannot be used, and why."""

    key: str
    reason: str


def parse_samples(data: bytes, offset: int, count: int) -> list[RawSample | BadSample]:
    """The `count` samples in a range of a shard, which begins at byte `offset` of the shard.

    Samples that damage hides are BadSamples.
    """
    samples: list[RawSample | BadSample] = []
    reason = "the range holds fewer samples than the index says"
    try:
        samples.extend(sample for sample, _ in group(walk(Slices(data), offset, whole=False)))
    except TarDamage as damage:
        reason = str(damage)
    if len(samples) > count:
        samples, reason = [], f"the range holds {len(samples)} samples, the index says {count}"
    return samples + [BadSample("?", reason)] * (count - len(samples))


def group(members: Iterable[Member]) -> Iterator[tuple[RawSample | BadSample, int]]:
    """Join consecutive members with one key to samples, each with its first header's offset.

    Where the members end in TarDamage, the current sample is yielded only if both its image and
    its labels are whole. The damage is then raised.
    """
    key, offset, files = "", 0, list[tuple[str, Bytes]]()
    try:
        for member in members:
            member_key, extension = split_name(member.name)
            if files and member_key != key:
                yield _assemble(key, files), offset
                files = []
            if not files:
                key, offset = member_key, member.offset
            files.append((extension, member.data))
    except TarDamage as damage:
        sample = _assemble(key, files)
        if isinstance(sample, RawSample):
            yield sample, offset
        elif files:
            damage.whole_until = offset
        raise
    if files:
        yield _assemble(key, files), offset


def split_name(name: str) -> tuple[str, str]:
    """Key and extension by webdataset's rule: the file name's first dot divides them."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def parse_labels(extension: str, data: Bytes) -> tuple[int, ...]:
    """Class indices from the content of a label file.

        KEY.cls     3  or  3 17  or  3,17
        KEY.json    3  or  [3, 17]  or  {"labels": [3, 17]} ("label" and "cls" will do, too)

    Raises ValueError if there are none, or if they are not whole numbers from 0.
    """
    if extension == "cls":
        text = bytes(data).decode("ascii").strip()
        if text.isdigit():  # the usual case
            return (int(text),)
        words = re.split(r"[\s,]+", text)
        labels = [int(word) if word.isdigit() else -1 for word in words]  # int() would take "1_0"
    else:
        try:
            value = json.loads(bytes(data))
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if isinstance(value, dict):
            value = value.get("labels", value.get("label", value.get("cls")))
        labels = value if isinstance(value, list) else [value]
    parsed = tuple(label for label in labels if type(label) is int and label >= 0)
    if not parsed or len(parsed) < len(labels):
        raise ValueError("labels must be whole numbers from 0")
    return parsed


def image_kind(data: Bytes) -> str:
    """The image format by its first bytes: "jpg", "png" or "webp"; "" for anything else."""
    head = bytes(data[:4])
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")


def _assemble(key: str, files: list[tuple[str, Bytes]]) -> RawSample | BadSample:
    images, labels = [], []
    for extension, data in files:
        if extension in IMAGE_EXTENSIONS:
            images.append((extension, data))
        elif extension in LABEL_EXTENSIONS:
            labels.append((extension, data))
        elif extension not in IGNORED_EXTENSIONS:
            return BadSample(key, f"a file with the extension .{extension}, which is not read")
    if len(images) != 1 or len(labels) != 1:
        return BadSample(key, f"{len(images)} images and {len(labels)} label files instead of one of each")
    if not image_kind(images[0][1]):
        return BadSample(key, f"the content of .{images[0][0]} is not a JPEG, PNG or WebP image")
    try:
        parsed = parse_labels(*labels[0])
    except ValueError as error:
        return BadSample(key, f"its .{labels[0][0]} cannot be read as labels ({error})")
    return RawSample(key, images[0][1], images[0][0], parsed)
