"""What a sample in a shard is: consecutive files with one key, an image and its labels.

SampleKeys say which files these are; all others are passed over, unopened. A shard is data,
never code.
"""

import collections
import dataclasses
import functools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vitscale.data.tar import Bytes, Member, Slices, TarDamage, walk
from vitscale.errors import ConfigError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSIONS = ("cls", "json")
MAX_LABEL = 2**31 - 1
WITHOUT_KEY = "without a key"  # how files are counted that belong to no sample
_METADATA = re.compile(r"__[^/]*__(/|$)")
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}


def _names(key: str) -> tuple[str, ...]:
    return tuple(name.strip().removeprefix(".") for name in key.split(";"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleKeys:
    """Which files of a sample are its image and its labels, as webdataset users name them.

    image_key:  extensions, separated by `;`. The first that a sample has is its image.
    label_key:  extensions, the same way. A name that no file of the sample has is a field of
                KEY.json; a/b is the field b of the object a. "json" itself stands for the whole
                content, or its field labels, label or cls.
    classes:    labels by class name, for labels that are written as names.
    strict:     the meaning of indexes of version 2, so that a run on one continues on the same
                samples. A sample with other files than one image, one label file and KEY.txt
                cannot be used; files that have no key otherwise are samples, too; KEY.json must
                hold labels, and a number in quotes is none. image_key and label_key do not
                count.

    Raises ConfigError for keys that name nothing.
    """

    image_key: str = ";".join(IMAGE_EXTENSIONS)
    label_key: str = ";".join(LABEL_EXTENSIONS)
    classes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    strict: bool = False

    def __post_init__(self) -> None:
        for option, example in (("image_key", "jpg;png"), ("label_key", "cls;json")):
            if not all(_names(getattr(self, option))):
                raise ConfigError(
                    f"{option} {getattr(self, option)!r} has an empty name; write one like {example!r}"
                )

    @functools.cached_property
    def images(self) -> tuple[str, ...]:
        return tuple(name.lower() for name in _names(self.image_key))

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        return _names(self.label_key)


DEFAULT_KEYS = SampleKeys()


class RawSample(NamedTuple):
    """An undecoded sample. labels: class indices, several for multi-label data, or none.

    Evaluations leave out a sample without labels, and training replaces it. The image may be a
    view of the chunk that was read, which it then keeps in memory.
    """

    key: str
    image: Bytes
    extension: str
    labels: tuple[int, ...]


class BadSample(NamedTuple):
    """A sample that cannot be used, and why.

    reason: the same words for the same defect. found: what this sample has instead; may be "".
    """

    key: str
    reason: str
    found: str = ""

    def why(self) -> str:
        return f"{self.reason}: {self.found}" if self.found else self.reason

    def place(self, shard: str) -> str:
        """The sample as an example of its reason."""
        return f"{shard}: sample {self.key}" + (f", which has {self.found}" if self.found else "")

    def describe(self) -> str:
        return f"sample {self.key}: {self.why()}"


def parse_samples(data: bytes, offset: int, count: int, keys: SampleKeys) -> list[RawSample | BadSample]:
    """The `count` samples in a range of a shard, which begins at byte `offset` of the shard.

    Samples that damage hides are BadSamples.
    """
    samples: list[RawSample | BadSample] = []
    reason = "the range holds fewer samples than the index says"
    try:
        samples.extend(sample for sample, _ in group(walk(Slices(data), offset, whole=False), keys))
    except TarDamage as damage:
        reason = str(damage)
    if len(samples) > count:
        samples, reason = [], f"the range holds {len(samples)} samples, the index says {count}"
    return samples + [BadSample("?", reason)] * (count - len(samples))


def group(
    members: Iterable[Member], keys: SampleKeys, passed_over: collections.Counter[str] | None = None
) -> Iterator[tuple[RawSample | BadSample, int]]:
    """Join consecutive members with one key to samples, each with its first header's offset.

    passed_over: counts the files, by extension, that are neither an image nor labels.

    Where the members end in TarDamage, the current sample is yielded only if both its image and
    its labels are whole. The damage is then raised.
    """
    passed_over = collections.Counter() if passed_over is None else passed_over
    key, offset, files = "", 0, list[tuple[str, Bytes]]()
    try:
        for member in members:
            if not keys.strict and belongs_to_no_sample(member.name):
                passed_over[WITHOUT_KEY] += 1
                continue
            member_key, extension = split_name(member.name)
            if files and member_key != key:
                yield _assemble(key, files, keys, passed_over), offset
                files = []
            if not files:
                key, offset = member_key, member.offset
            files.append((extension, member.data))
    except TarDamage as damage:
        sample = _assemble(key, files, keys, passed_over)
        # Unless it has the first choice of labels, the damage may hide a better one. Strictly,
        # there is no choice.
        is_whole = keys.strict or keys.labels[0] in dict(files)
        if isinstance(sample, RawSample) and is_whole:
            yield sample, offset
        elif files:
            damage.whole_until = offset
        raise
    if files:
        yield _assemble(key, files, keys, passed_over), offset


def split_name(name: str) -> tuple[str, str]:
    """Key and extension by webdataset's rule: the file name's first dot divides them."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def belongs_to_no_sample(name: str) -> bool:
    """Whether webdataset passes a file over: hidden, without an extension, or __metadata__."""
    stem, _, extension = name.rpartition("/")[2].partition(".")
    return not stem or not extension or _METADATA.match(name) is not None


class Choice(NamedTuple):
    """Which files of a sample are used, by extension.

    fields: where in a JSON label file the labels are, the first that is there; () = as usual.
    """

    image: str
    label: str
    fields: tuple[str, ...] = ()


def choose(extensions: Sequence[str], keys: SampleKeys) -> Choice | str:
    """The image and the label file of a sample that has these files, or why there are none."""
    if keys.strict:
        return _choose_strictly(extensions)
    repeated = [extension for extension in extensions if extensions.count(extension) > 1]
    image = next((name for name in keys.images if name in extensions), "")
    label = _choose_label(extensions, keys.labels)
    if not image:
        return f"no image ({_list(keys.images)})"
    if not label:
        return f"no label ({_list(keys.labels)})"
    if image in repeated or label[0] in repeated:
        return f"more than one .{image if image in repeated else label[0]} under one key"
    return Choice(image, *label)


def _choose_label(extensions: Sequence[str], names: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
    """The label file, and the fields to look for in it."""
    for position, name in enumerate(names):
        if name.lower() in extensions:
            return name.lower(), ()
        if name not in LABEL_EXTENSIONS and "json" in extensions:
            return "json", names[position:]
    return None


def _choose_strictly(extensions: Sequence[str]) -> Choice | str:
    images = [extension for extension in extensions if extension in IMAGE_EXTENSIONS]
    labels = [extension for extension in extensions if extension in LABEL_EXTENSIONS]
    for extension in extensions:
        if extension not in (*IMAGE_EXTENSIONS, *LABEL_EXTENSIONS, "txt"):
            return f"a file with the extension .{extension}, which is not read"
    if len(images) != 1 or len(labels) != 1:
        return f"{len(images)} images and {len(labels)} label files instead of one of each"
    return Choice(images[0], labels[0])


class LabelError(ValueError):
    """A label file that holds no labels. found: what is there instead; may be ""."""

    def __init__(self, reason: str, found: str = "") -> None:
        super().__init__(reason)
        self.found = found


def read_labels(choice: Choice, data: Bytes, keys: SampleKeys) -> tuple[int, ...]:
    """The class indices in the content of a sample's label file.

        KEY.cls     3  or  3 17  or  3,17
        KEY.json    3  or  [3, 17]  or  {"labels": [3, 17]} ("label" and "cls" will do, too)

    An empty list says that the image has no label: (). An empty KEY.cls does not, as a write
    that failed leaves one. Raises LabelError for what holds no labels, or if one is neither a
    whole number from 0 to MAX_LABEL nor the name of a class.
    """
    is_json = choice.label.endswith("json")
    if is_json:
        labels = _json_labels(data, choice, may_be_empty=not keys.strict)
    else:
        try:
            text = bytes(data).decode().strip()
        except UnicodeDecodeError:
            raise LabelError(f"its .{choice.label} is not text") from None
        if text.isascii() and text.isdigit() and len(text) < 10:  # the usual case
            return (keys.classes.get(text, int(text)),)
        labels = [text] if text in keys.classes else re.split(r"[\s,]+", text)
    where = f".{choice.label}" + (f", field {choice.fields[0]}," if choice.fields else "")
    quoted_numbers = not (is_json and keys.strict)
    return tuple(_label(label, where, keys.classes, quoted_numbers=quoted_numbers) for label in labels)


def _json_labels(data: Bytes, choice: Choice, *, may_be_empty: bool) -> list[Any]:
    """The values that stand where labels are expected. Raises LabelError if nothing does."""
    try:
        content = json.loads(bytes(data))
    except (ValueError, RecursionError):  # the latter where it is nested too deeply
        raise LabelError(f"its .{choice.label} is not JSON") from None
    fields = choice.fields or ("json",)
    value = next((value for field in fields for value in _values(content, field)), None)
    values = value if isinstance(value, list) else [value]
    if value is None or not (values or may_be_empty):
        wanted = choice.fields or ("labels", "label", "cls")
        has = f"the fields {' '.join(content)}" if isinstance(content, dict) else _brief(content)
        raise LabelError(f"its .{choice.label} has no field {' or '.join(wanted)}", has[:200])
    return values


def _values(content: Any, field: str) -> list[Any]:
    """[the value of a field], or [] if there is none."""
    if field == "json":
        if not isinstance(content, dict):
            return [content]
        return [content[name] for name in ("labels", "label", "cls") if name in content][:1]
    if isinstance(content, dict) and field in content:
        return [content[field]]
    first, slash, rest = field.partition("/")
    return _values(content[first], rest) if slash and isinstance(content, dict) and first in content else []


def _label(label: object, where: str, classes: Mapping[str, int], *, quoted_numbers: bool) -> int:
    """The class index. quoted_numbers: whether a text of digits is one."""
    if isinstance(label, str):
        if label in classes:
            return classes[label]
        if quoted_numbers and label.isascii() and label.isdigit() and len(label) < 20:
            label = int(label)
    if type(label) is int and 0 <= label <= MAX_LABEL:
        return label
    if classes and isinstance(label, str):
        raise LabelError(f"its {where} is not the name of a class", _brief(label))
    raise LabelError(f"its {where} is not a whole number from 0 to {MAX_LABEL:,}", _brief(label))


def _brief(value: object) -> str:
    """A JSON value for messages; of what may be nested deeply, its kind alone."""
    return repr(value)[:50] if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def image_kind(data: Bytes) -> str:
    """The image format by its first bytes: "jpg", "png" or "webp"; "" for anything else."""
    head = bytes(data[:4])
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")


def _assemble(
    key: str, files: list[tuple[str, Bytes]], keys: SampleKeys, passed_over: collections.Counter[str]
) -> RawSample | BadSample:
    extensions = [extension for extension, _ in files]
    choice = choose(extensions, keys)
    used = () if isinstance(choice, str) else choice
    passed_over.update(f".{extension}" for extension in extensions if extension not in used)
    if isinstance(choice, str):
        return BadSample(key, choice, _list(extensions))
    content = dict(files)
    image = content[choice.image]
    if not image_kind(image):
        return BadSample(key, f"the content of .{choice.image} is not a JPEG, PNG or WebP image")
    try:
        labels = read_labels(choice, content[choice.label], keys)
    except LabelError as error:
        return BadSample(key, str(error), error.found)
    return RawSample(key, image, choice.image, labels)


def _list(extensions: Collection[str]) -> str:
    return " ".join(f".{extension}" for extension in extensions)[:100]
