"""A table of images: one row each, with its path and its labels, as CSV or as lines of JSON."""

import csv
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vitscale.config import ConfigError
from vitscale.data.pack.config import SPLITS, LeftOutTally, PackConfig
from vitscale.data.pack.listing import MAX_LABEL, WHOLE, FileReferences, Listing

HEADER = "path,label or path,labels"


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One image of a table; `labels` are class indices or names, as they are written."""

    where: str
    path: str
    labels: tuple[str, ...]
    split: str


def list_csv(source: str, config: PackConfig) -> Listing:
    """A CSV file with a header: `path` and `label` (one, the whole cell) or `labels` (several, separated
    by
    spaces, commas or `;`), and optionally `split`.

    Paths are relative to the file. If all labels are whole numbers they are the class indices; else they
    are
    class names, whose sorted order gives the indices.
    """
    return _list_table(source, _csv_rows)


def list_jsonl(source: str, config: PackConfig) -> Listing:
    """A file of JSON objects, one a line, with the keys of list_csv; `labels` may also be a list."""
    return _list_table(source, _jsonl_rows)


def _list_table(source: str, read_rows: Callable[[str], Iterator[Row]]) -> Listing:
    # Two passes, since a name's index is known when all names are; the file is read twice, not held.
    classes = _class_names(source, {label for row in read_rows(source) for label in row.labels})
    label_of = {name: label for label, name in enumerate(classes)}
    left_out = LeftOutTally()
    splits: dict[str, FileReferences] = {}
    for row in read_rows(source):
        if not row.path or not row.labels:
            left_out.add(f"{row.where}: no {'label' if row.path else 'path'}")
            continue
        references = splits.setdefault(row.split, FileReferences(os.path.dirname(source)))
        labels = (label_of[label] if classes else int(label) for label in row.labels)
        references.add(row.path, dict.fromkeys(labels), WHOLE)
    if not splits:
        raise ConfigError(f"{source} holds no row with a path and a label; its header must be {HEADER}")
    ordered = {split: splits[split] for split in SPLITS if split in splits}
    return Listing(splits=dict(ordered), classes=classes, left_out=left_out)


def _class_names(source: str, labels: set[str]) -> tuple[str, ...]:
    """() where all labels are class indices already."""
    if not all(re.fullmatch(r"-?\d+", label) for label in labels):
        return tuple(sorted(labels))
    wrong = [label for label in labels if not 0 <= int(label) <= MAX_LABEL]
    if wrong:
        raise ConfigError(f"{source} has the label {wrong[0]}; class indices are whole numbers from 0")
    return ()


def _csv_rows(source: str) -> Iterator[Row]:
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            _check_columns(source, reader.fieldnames or [])
            for values in reader:
                where = f"line {reader.line_num} of {source}"
                if None in values:
                    raise ConfigError(f"{where} has more cells than the header; quote what holds a comma")
                yield _row(where, {key: value or "" for key, value in values.items() if isinstance(key, str)})
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{source} cannot be read as CSV: {error}") from None


def _jsonl_rows(source: str) -> Iterator[Row]:
    try:
        with open(source, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                where = f"line {number} of {source}"
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ConfigError(f"{where} is not JSON: {error}") from None
                if not isinstance(values, dict):
                    raise ConfigError(f"{where} is not a JSON object; write {{'path': ..., 'label': ...}}")
                _check_columns(where, list(values))
                yield _row(where, values)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} cannot be read as lines of JSON: {error}") from None


def _check_columns(where: str, columns: Sequence[str]) -> None:
    if "path" not in columns or ("label" in columns) == ("labels" in columns):
        raise ConfigError(f"{where} has the columns {','.join(map(str, columns))}; they must be {HEADER}")


def _row(where: str, values: Mapping[str, Any]) -> Row:
    split = values.get("split", "train")
    if split not in SPLITS:
        raise ConfigError(f"{where} has the split {split!r}; it must be one of {', '.join(SPLITS)}")
    path = values["path"]
    if not isinstance(path, str) or re.search("[\0\ud800-\udfff]", path):  # no file has such a name
        raise ConfigError(f"{where} has the path {path!r}; write a string")
    words = [str(label).strip() for label in _labels(where, values)]
    return Row(where, path.strip(), tuple(word for word in words if word), split)


def _labels(where: str, values: Mapping[str, Any]) -> list[str | int]:
    """[] where the cell is empty, so that the row is left out and named."""
    if "label" in values:
        labels = [values["label"]]
        if isinstance(labels[0], str) and re.fullmatch(r"\s*\d+(\s*[\s,;]\s*\d+)+\s*", labels[0]):
            raise ConfigError(f"{where} has several labels, {labels[0]!r}; name the column labels, not label")
    elif isinstance(values["labels"], str):
        labels = re.split(r"[\s,;]+", values["labels"])
    else:
        labels = values["labels"] if isinstance(values["labels"], list) else [values["labels"]]
    labels = [label for label in labels if label is not None]
    if not all(isinstance(label, str | int) and not isinstance(label, bool) for label in labels):
        raise ConfigError(f"{where} has the labels {labels!r}; write whole numbers or class names")
    return labels
