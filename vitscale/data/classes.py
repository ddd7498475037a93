"""Class names and their labels, for shards and tables that name the classes."""

import json
from collections.abc import Mapping

from vitscale.data.samples import MAX_LABEL
from vitscale.errors import DataError, StoreError, UserError
from vitscale.stores import storage


def read_classes(path: str) -> dict[str, int]:
    """The labels of class names, from a file of one of these forms:

        JSON    {"cat": 0, "dog": 1}, or ["cat", "dog"]
        text    one name per line; the first line is class 0

    Raises DataError for a file that is missing or has no such form, StoreError for one that
    cannot be read.
    """
    how = 'write {"cat": 0, ...} or ["cat", ...] as .json, or one name per line as .txt'
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
        names = json.loads(text) if path.endswith(".json") else text.splitlines()
    except FileNotFoundError:
        raise DataError(f"the class names {path} do not exist; {how}") from None
    except OSError as error:
        raise StoreError(f"the class names {path} cannot be read: {error.strerror or error}; {how}") from None
    except (ValueError, RecursionError):
        raise DataError(f"the class names {path} are not JSON or not UTF-8; {how}") from None
    if not isinstance(names, dict | list):
        raise DataError(f"the class names {path} are no list and no object; {how}")
    pairs = list(names.items()) if isinstance(names, dict) else [(name, n) for n, name in enumerate(names)]
    for name, label in pairs:
        if not isinstance(name, str) or type(label) is not int or not 0 <= label <= MAX_LABEL:
            raise DataError(f"the class names {path} give {name!r} the label {label!r}; {how}")
    classes = dict(pairs)
    if not classes or len(classes) < len(pairs):
        fault = "name a class twice" if classes else "are empty"
        raise DataError(f"the class names {path} {fault}; {how}")
    return classes


def names_beside(shard: str) -> dict[str, int]:
    """The classes.json that `pack` writes to the folder of a shard; {} if there is none."""
    try:
        return read_classes(storage.join(shard, "classes.json"))
    except UserError:
        return {}


def names_by_label(classes: Mapping[str, int]) -> tuple[str, ...]:
    """The first name of each label, from 0 on; () if a label has none."""
    names: dict[int, str] = {}
    for name, label in classes.items():
        names.setdefault(label, name)
    labels = range(len(names))
    return tuple(names[label] for label in labels) if sorted(names) == list(labels) else ()


def mapped_classes(classes: Mapping[str, int], label_map: Mapping[int, int]) -> dict[str, int]:
    """The labels of class names after a label map; {} = labels stay."""
    if not label_map:
        return dict(classes)
    return {name: label_map[label] for name, label in classes.items() if label in label_map}


def difference(ours: Mapping[str, int], our_place: str, theirs: Mapping[str, int], their_place: str) -> str:
    """How two sets of shards number their classes differently, in words; "" if they do not.

    They do if a name that both have stands at different numbers. Names that one side alone has
    say nothing: editions of a data set spell them differently.
    """
    moved = [name for name, label in ours.items() if theirs.get(name, label) != label]
    if not moved:
        return ""
    name = min(moved, key=lambda name: min(ours[name], theirs[name]))
    return f"{name!r} is class {ours[name]} in {our_place} and class {theirs[name]} in {their_place}"
