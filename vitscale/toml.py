"""Reads TOML, and writes plain values as TOML, which the standard library does not."""

import json
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

MAX_LEVELS = 50  # of tables and lists: what later walks through them would reach Python's limit


def parse(text: str) -> dict[str, Any]:
    """The values of a document.

    Raises tomllib.TOMLDecodeError, also for tables and lists deeper than MAX_LEVELS, and
    another ValueError for a number of thousands of digits.
    """
    try:
        values = tomllib.loads(text)
        _check_depth(values, 1 + MAX_LEVELS)
    except RecursionError:
        raise tomllib.TOMLDecodeError(f"tables or lists are more than {MAX_LEVELS} levels deep") from None
    return values


def _check_depth(entry: Any, levels: int) -> None:
    """Raise RecursionError, as tomllib does for lists at some depth of its own."""
    if levels < 0:
        raise RecursionError
    for item in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        _check_depth(item, levels - 1)


def lines(values: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """The lines of a table: its values, then the tables in it. where: its dotted name."""
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    for key, entry in values.items():
        if key not in tables:
            yield f"{_key(key)} = {value(entry)}"
    for key, table in tables.items():
        name = f"{where}.{_key(key)}" if where else _key(key)
        yield ""
        yield f"[{name}]"
        yield from lines(table, name)


def value(entry: Any) -> str:
    """A value; a table is an inline one."""
    if isinstance(entry, list):
        return f"[{', '.join(map(value, entry))}]"
    if isinstance(entry, Mapping):
        return f"{{{', '.join(f'{_key(key)} = {value(item)}' for key, item in entry.items())}}}"
    if isinstance(entry, str):
        return _string(entry)
    return repr(entry) if isinstance(entry, float) else json.dumps(entry)


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _string(key)


def _string(text: str) -> str:
    """A basic string: JSON's, but TOML has no surrogate pairs, and no DEL as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
