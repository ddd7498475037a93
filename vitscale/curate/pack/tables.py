"""Lists tables of images, as CSV or lines of JSON: a path and its labels in each row."""

import csv
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vitscale.curate.pack.config import SPLITS, Omissions, PackConfig
from vitscale.curate.pack.listing import WHOLE, FileReferences, Listing
from vitscale.data.samples import MAX_LABEL
from vitscale.errors import DataError

HEADER = "path,label or path,labels"
COLUMNS = ("path", "label", "labels", "split")  # that are read


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One image of a table; `labels` are class indices or class names, as written."""

    where: str
    path: str
    labels: tuple[str, ...]
    split: str


def list_csv(source: str, config: PackConfig) -> Listing:
    """A CSV file with a header of these columns:

        path    of the image, relative to the table
        label   the whole cell is one label; or instead
        labels  several, separated by spaces, commas or `;`
        split   optional: train, val or test

    If all labels are whole numbers, they are the class indices. Otherwise they are class names,
    and their sorted order gives the indices. A decimal number is refused: it is neither.
    """
    return _list_table(source, _csv_rows)


def list_jsonl(source: str, config: PackConfig) -> Listing:
    """A file with a JSON object per line, with the keys of list_csv; `labels` may be a list."""
    return _list_table(source, _jsonl_rows)


def _list_table(source: str, read_rows: Callable[[str], Iterator[Row]]) -> Listing:
    # The index of a name is known only when all names are; the file is read twice, not held.
    classes = _class_names(source, {label for row in read_rows(source) for label in row.labels})
    label_of = {name: label for label, name in enumerate(classes)}
    omissions = Omissions()
    splits: dict[str, FileReferences] = {}
    for row in read_rows(source):
        if not row.path or not row.labels:
            omissions.add(f"{row.where}: no {'label' if row.path else 'path'}")
            continue
        references = splits.setdefault(row.split, FileReferences(os.path.dirname(source)))
        labels = (label_of[label] if classes else int(label) for label in row.labels)
        references.add(row.path, dict.fromkeys(labels), WHOLE)
    if not splits:
        raise DataError(f"{source} holds no row with a path and a label; its header must be {HEADER}")
    ordered = {split: splits[split] for split in SPLITS if split in splits}
    return Listing(splits=dict(ordered), classes=classes, omissions=omissions)


def _class_names(source: str, labels: set[str]) -> tuple[str, ...]:
    """The names in the order of their indices; () if the labels are indices already."""
    if not all(re.fullmatch(r"-?\d+", label) for label in labels):
        return tuple(sorted(labels))
    outside = [label for label in labels if not 0 <= int(label) <= MAX_LABEL]
    if outside:
        raise DataError(f"{source} has the label {outside[0]}; class indices are from 0 to {MAX_LABEL:,}")
    return ()


def _csv_rows(source: str) -> Iterator[Row]:
    last_line = 0  # where the row that was read last ends
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:
            # Not strict, a quote that is never closed would take all later rows into its cell.
            reader = csv.DictReader(file, strict=True)
            _check_columns(source, reader.fieldnames or [])
            last_line = reader.line_num
            for values in reader:
                if any("\n" in (values.get(name) or "") for name in COLUMNS):
                    raise DataError(
                        f"lines {last_line + 1:,} to {reader.line_num:,} of {source} are one row; close all "
                        "quotes there"
                    )
                last_line = reader.line_num
                where = f"line {last_line} of {source}"
                if None in values:
                    raise DataError(f"{where} has more cells than the header; quote what holds a comma")
                yield _row(where, {key: value or "" for key, value in values.items() if isinstance(key, str)})
    except csv.Error as error:
        raise DataError(
            f"{source} cannot be read as CSV after line {last_line:,} ({error}); close all quotes there"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read as CSV ({error}); name a UTF-8 file") from None


def _jsonl_rows(source: str) -> Iterator[Row]:
    try:
        with open(source, encoding="utf-8-sig") as file:
            for line_number, line in enumerate(file, 1):
                where = f"line {line_number} of {source}"
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{where} is not JSON ({error})") from None
                if not isinstance(values, dict):
                    raise DataError(f'{where} is not a JSON object; write {{"path": ..., "label": ...}}')
                _check_columns(where, list(values))
                yield _row(where, values)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read as lines of JSON ({error}); name a UTF-8 file") from None


def _check_columns(where: str, columns: Sequence[str]) -> None:
    if "path" not in columns or ("label" in columns) == ("labels" in columns):
        raise DataError(f"{where} has the columns {','.join(map(str, columns))}; they must be {HEADER}")
    for name in COLUMNS:
        if columns.count(name) > 1:
            raise DataError(f"{where} has {columns.count(name)} columns {name}; keep the right one")


def _row(where: str, values: Mapping[str, Any]) -> Row:
    split = values.get("split", "train")
    if split not in SPLITS:
        raise DataError(f"{where} has the split {split!r}; it must be one of {', '.join(SPLITS)}")
    path = values["path"]
    if not isinstance(path, str) or re.search("[\0\ud800-\udfff]", path):  # no file has such a name
        raise DataError(f"{where} has the path {path!r}; write a string")
    words = [str(label).strip() for label in _labels(where, values)]
    for word in words:
        if re.fullmatch(r"[+-]?\d+\.\d*", word):  # pandas writes whole numbers so beside empty cells
            raise DataError(f"{where} has the label {word}; write whole numbers, or names of classes")
    return Row(where, path.strip(), tuple(word for word in words if word), split)


def _labels(where: str, values: Mapping[str, Any]) -> list[str | int]:
    """The labels of a row; [] if the cell is empty: the row is then left out and reported."""
    if "label" in values:
        labels = [values["label"]]
        if isinstance(labels[0], str) and re.fullmatch(r"\s*\d+(\s*[\s,;]\s*\d+)+\s*", labels[0]):
            raise DataError(f"{where} has several labels, {labels[0]!r}; name the column labels, not label")
    elif isinstance(values["labels"], str):
        labels = re.split(r"[\s,;]+", values["labels"])
    else:
        labels = values["labels"] if isinstance(values["labels"], list) else [values["labels"]]
    labels = [label for label in labels if label is not None]
    if not all(isinstance(label, str | int) and not isinstance(label, bool) for label in labels):
        raise DataError(f"{where} has the labels {labels!r}; write whole numbers or class names")
    return labels
